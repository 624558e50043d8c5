"""Is the blocked, compiled GPTQ that of the paper, on every grid, and safe on bad input?"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments import gptq_paper
from quantjax import affine, formats
from quantjax.formats import Codebook, IntFormat, Levels
from quantjax.ptq import factor, sweep
from quantjax.ptq.gptq import Rounded, gptq_matrix
from quantjax.ptq.matrix import Cells, MatrixForm, on_grid
from quantjax.spec import QuantSpec
from tests.daily import daily

FORM = MatrixForm((), (0,), (1,))  # a leaf that is its own matrix w_OI
FORMATS: dict[str, dict[str, Any]] = {
    "int8": dict(format=IntFormat(8)),
    "int4": dict(format=IntFormat(4), observer=qj.mse()),
    "int3 full": dict(format=IntFormat(3, levels=Levels.FULL), observer=qj.mse()),
    "int2 half": dict(format=IntFormat(2, levels=Levels.HALF), observer=qj.mse()),
    "binary": dict(format=formats.binary, observer=qj.mse()),
    "uint4 asymmetric": dict(
        format=IntFormat(4, signed=False), symmetric=False, observer=qj.minmax()
    ),
    "nf4": dict(format=formats.nf4),
    "kmeans3": dict(format=Codebook.learned(3)),
    "e4m3": dict(format=formats.e4m3),
    "e2m1": dict(format=formats.e2m1),
}
BLOCKS = {"channel": (1, None), "tensor": (None, None), "group": (1, 8), "tile": (5, 7)}

# A quarter of the formats daily, each with one way to share scales; in the full run all of the
# product.
CELLS = [
    pytest.param(f, b, id=f"{f}-{b}", marks=[] if (i + 2 * k) % 16 == 0 else pytest.mark.full)
    for i, f in enumerate(FORMATS)
    for k, b in enumerate(BLOCKS)
]


def correlated(seed: int, n: int, rows: int = 256) -> np.ndarray:
    """H of inputs that share a few directions, some far larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, n)) + rng.normal(size=(rows, 3)) @ rng.normal(size=(3, n)) * 2
    x *= np.geomspace(0.2, 4, n)[rng.permutation(n)]
    return (x.T @ x / rows).astype(np.float32)


def sample(seed: int, o: int, i: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(o, i)).astype(np.float32)


def cells_of(w: np.ndarray, **spec: Any) -> tuple[Cells, QuantSpec]:
    spec = QuantSpec(**spec)
    cells = FORM.cells(affine.find_scales(jnp.asarray(w), spec), spec, w.shape)
    codebook = None if cells.codebook is None else cells.codebook[0]
    return jax.tree.map(lambda a: a[0], cells._replace(codebook=None))._replace(
        codebook=codebook
    ), spec


@functools.partial(jax.jit, static_argnames=("format", "damping", "act_order"))
def solve(w, h, cells, format, damping=0.01, act_order=True) -> Rounded:
    return gptq_matrix(w, h, cells, format, damping=damping, act_order=act_order)


def error(w, q, h) -> np.ndarray:
    """(w - q)' H (w - q) of every output, in float64."""
    e = np.asarray(w, np.float64) - np.asarray(q, np.float64)
    return np.einsum("oi,ij,oj->o", e, np.asarray(h, np.float64), e)


def by_the_paper(w, h, cells: Cells, format, **options) -> np.ndarray:
    """In float64, but for the rounding, which is the same function of float32."""

    def rounded(v: np.ndarray, j: int) -> np.ndarray:
        zero = cells.zero_point
        own = Cells(cells.scale[:, j], None if zero is None else zero[:, j], cells.codebook)
        return np.asarray(on_grid(jnp.asarray(v, jnp.float32), own, format), np.float64)

    wide = (np.asarray(a, np.float64) for a in (w, h))
    return gptq_paper.gptq(*wide, rounded, **options)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of all sizes within a few dozen columns."""
    for name, value in {"LARGE": 24, "MIDDLE": 12, "SMALL": 4}.items():
        monkeypatch.setattr(sweep, name, value)
    monkeypatch.setattr(factor, "BLOCKS", (16, 6))
    monkeypatch.setattr(factor, "DIRECT", 16)


@pytest.mark.parametrize("act_order", daily([True, False], [True]))
@pytest.mark.parametrize("n", daily([1, 5, 41, 96], [41]))
def test_it_is_the_papers_algorithm(n, act_order, small_blocks):
    w, h = sample(0, 12, n), correlated(1, n)
    cells, spec = cells_of(w, format=IntFormat(4), block=(1, None))
    got = gptq_matrix(jnp.asarray(w), jnp.asarray(h), cells, spec.format, act_order=act_order)
    expected = by_the_paper(w, h, cells, spec.format, act_order=act_order, block=16)
    # A column may come within float32's error of a tie; here none does.
    kept = np.asarray(got.error_O) < np.asarray(got.nearest_error_O)
    np.testing.assert_array_equal(np.asarray(got.q_OI)[kept], expected[kept].astype(np.float32))
    assert kept.sum() >= (0 if n == 1 else 6) and bool(got.ok)


@pytest.mark.parametrize("fmt, block", CELLS)
def test_every_grid(fmt, block):
    """On the grid to the bit, the paper's values, and never above rounding to nearest."""
    w, h = sample(2, 10, 24), correlated(3, 24)
    cells, spec = cells_of(w, block=BLOCKS[block], **FORMATS[fmt])
    got = solve(w, h, cells, spec.format)
    nearest = on_grid(jnp.asarray(w), cells, spec.format)
    np.testing.assert_array_equal(on_grid(got.q_OI, cells, spec.format), got.q_OI)
    expected = by_the_paper(w, h, cells, spec.format)
    ours, theirs, plain = error(w, got.q_OI, h), error(w, expected, h), error(w, nearest, h)
    # Sums of 24 x 24 terms in float32, of which the largest are some 100 times their sum.
    close = dict(rtol=1e-3, atol=1e-5 * plain.max())
    np.testing.assert_allclose(ours, np.minimum(theirs, plain), **close)
    np.testing.assert_allclose(got.error_O, ours, **close)
    np.testing.assert_allclose(got.nearest_error_O, plain, **close)
    assert (ours <= plain * (1 + 1e-6)).all() and ours.sum() < plain.sum()


@pytest.mark.parametrize("seed", daily(range(5), range(3)))
def test_outputs_gain_what_weights_lose(seed):
    w, h = sample(seed, 32, 64), correlated(seed + 10, 64)
    cells, spec = cells_of(w, format=IntFormat(3), block=(1, None), observer=qj.mse())
    got = solve(w, h, cells, spec.format)
    nearest = np.asarray(on_grid(jnp.asarray(w), cells, spec.format))
    assert error(w, got.q_OI, h).sum() < 0.7 * error(w, nearest, h).sum()
    assert ((w - got.q_OI) ** 2).sum() > ((w - nearest) ** 2).sum()


def test_large_inputs_first_helps():
    """Over seeds; the columns that matter most are rounded while all others can still follow."""
    ratios = []
    for seed in range(5):
        w, h = sample(seed, 32, 64), correlated(seed + 10, 64)
        cells, spec = cells_of(w, format=IntFormat(3), block=(1, None), observer=qj.mse())
        first, as_is = (solve(w, h, cells, spec.format, act_order=a) for a in (True, False))
        ratios.append(error(w, first.q_OI, h).sum() / error(w, as_is.q_OI, h).sum())
    assert np.mean(ratios) < 0.95


def test_it_is_rounding_where_inputs_are_uncorrelated():
    w, h = sample(4, 8, 20), np.diag(np.geomspace(0.1, 10, 20)).astype(np.float32)
    cells, spec = cells_of(w, format=IntFormat(4), block=(1, None))
    got = solve(w, h, cells, spec.format)
    np.testing.assert_array_equal(got.q_OI, on_grid(jnp.asarray(w), cells, spec.format))


def test_an_output_that_clips_keeps_its_rounding():
    """Errors are handed on to columns that can not follow, as their grid ends; the sum of it may
    be worse than not to hand on anything."""
    w, h = 2 * sample(9, 100, 6), correlated(3, 6)
    cells = Cells(jnp.ones((1, 1), jnp.float32))
    got = solve(w, h, cells, IntFormat(2))
    raw = by_the_paper(w, h, Cells(jnp.ones(w.shape)), IntFormat(2))
    plain = error(w, on_grid(jnp.asarray(w), cells, IntFormat(2)), h)
    assert (error(w, raw, h) > 1.01 * plain).any()
    assert (error(w, got.q_OI, h) <= plain * (1 + 1e-5)).all()


@pytest.mark.full
def test_matrices_side_by_side_are_each_alone(small_blocks):
    w = np.stack([sample(k, 6, 30) for k in range(3)])
    h = np.stack([correlated(0, 30), np.zeros((30, 30), np.float32), -np.eye(30, dtype=np.float32)])
    cells = Cells(jnp.asarray(np.abs(w).max(2, keepdims=True) / 7))
    one = functools.partial(gptq_matrix, format=IntFormat(4))
    got = jax.jit(jax.vmap(one))(w, h, cells)
    for k in range(3):
        alone = one(jnp.asarray(w[k]), jnp.asarray(h[k]), jax.tree.map(lambda a, k=k: a[k], cells))
        np.testing.assert_array_equal(got.q_OI[k], alone.q_OI)
        assert got.damping[k] == alone.damping and got.ok[k] == alone.ok


def nearest_of(w, cells) -> np.ndarray:
    return np.asarray(on_grid(jnp.asarray(w), cells, IntFormat(4)))


BAD = {
    "never seen": (np.zeros((16, 16)), True, "all"),
    "one sample": (np.outer(np.arange(16.0), np.arange(16.0)), True, "none"),
    "constant features": (np.ones((16, 16)), True, "none"),
    "all but tiny": (np.eye(16) * 1e-30, True, "all"),
    "huge": (np.eye(16) * 1e30, True, "all"),
    "an indefinite H": (np.eye(16) - 0.2 * np.ones((16, 16)), True, "none"),
    "NaN": (np.full((16, 16), np.nan), False, "all"),
    "one NaN": (np.where(np.arange(256).reshape(16, 16) == 17, np.nan, np.eye(16)), False, "all"),
    "infinity": (np.full((16, 16), np.inf), False, "all"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_moments(case):
    """Always finite and on the grid; what can not be factored says so and is rounded."""
    h, ok, rounded = BAD[case]
    w = sample(5, 8, 16)
    cells = Cells(jnp.asarray(np.abs(w).max(1, keepdims=True) / 7))
    got = solve(w, h.astype(np.float32), cells, IntFormat(4))
    assert bool(got.ok) == ok
    assert np.isfinite(got.q_OI).all()
    if rounded == "all":
        np.testing.assert_array_equal(got.q_OI, nearest_of(w, cells))
    if case == "an indefinite H":  # its lowest eigenvalue, -2.2, asks for three tens more
        np.testing.assert_allclose(got.damping, 10.0, rtol=1e-5)


def test_inputs_never_seen_are_rounded_and_the_others_not_touched_by_them():
    w, h = sample(6, 8, 20), correlated(7, 20)
    h[[3, 11]], h[:, [3, 11]] = 0, 0
    keep = np.setdiff1d(np.arange(20), [3, 11])
    cells = Cells(jnp.asarray(np.abs(w).max(1, keepdims=True) / 7))
    got = np.asarray(solve(w, h, cells, IntFormat(4)).q_OI)
    np.testing.assert_array_equal(got[:, [3, 11]], nearest_of(w, cells)[:, [3, 11]])
    alone = solve(w[:, keep], h[np.ix_(keep, keep)], cells, IntFormat(4)).q_OI
    np.testing.assert_array_equal(got[:, keep], alone)


def test_cholesky_by_blocks(small_blocks):
    h = correlated(8, 50) + np.eye(50, dtype=np.float32)
    got = np.asarray(factor.cholesky(jnp.asarray(h)), np.float64)
    # The bound of Higham 2002, theorem 10.3, is n eps |L| |L|'; inverses of blocks add a little.
    bound = 4 * 50 * np.finfo(np.float32).eps * (np.abs(got) @ np.abs(got).T)
    assert (np.abs(got @ got.T - h) <= bound).all()
    assert (np.triu(got, 1) == 0).all()
    assert not np.isfinite(np.diagonal(factor.cholesky(jnp.asarray(-h)))).all()
