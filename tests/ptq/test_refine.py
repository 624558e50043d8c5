"""Do codes and scales, found in turn, lose ever less, and are fitted scales the best there are?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import affine
from quantjax.formats import Codebook, IntFormat, Levels, e2m1
from quantjax.ptq.matrix import MatrixForm, on_grid
from quantjax.ptq.output_scales import rounded_by_output
from quantjax.ptq.refine import descended, fitted, refined
from quantjax.ptq.tiling import Tiling
from quantjax.spec import QuantSpec
from tests.daily import daily

DENSE = MatrixForm((), (1,), (0,))  # (I, O), as a kernel
CONV = MatrixForm((), (3,), (0, 1, 2), groups=2)  # two groups
EXPERTS = MatrixForm((0,), (2,), (1,))
CASES = {
    "channel": (DENSE, (20, 6), (None, 1)),
    "tensor": (DENSE, (20, 6), (None, None)),
    "group": (DENSE, (20, 6), (8, 1)),
    "tile": (DENSE, (20, 6), (7, 4)),
    "conv": (CONV, (3, 3, 2, 6), (None, None, None, 1)),
    "conv group": (CONV, (3, 3, 2, 6), (3, 1, 1, 1)),
    "experts": (EXPERTS, (3, 10, 4), (None, 1)),
}
INT2 = IntFormat(2, levels=Levels.HALF)

# One program for each, where eager calls would be one for each operation.
find_scales = jax.jit(affine.find_scales, static_argnames="spec")
fit_scales = jax.jit(fitted, static_argnames="tiling")


@functools.partial(jax.jit, static_argnames="format")
def rounded(w, cells, format):
    return jax.vmap(functools.partial(on_grid, format=format))(w, cells)


class Subject:
    """A leaf, H of its inputs, and what plain rounding makes of it."""

    def __init__(self, case: str, format=INT2, **spec):
        self.form, shape, block = CASES[case]
        self.spec = QuantSpec(format=format, block=block, **{"observer": qj.mse(steps=20), **spec})
        self.tiling = Tiling(self.form, self.spec.block_shape, shape)
        rng = np.random.default_rng(len(case))
        self.leaf = jnp.asarray(rng.normal(size=shape), jnp.float32)
        self.w = self.form.matrices(self.leaf)
        b, _, i = self.w.shape
        x = rng.normal(size=(b, 64, i)) + 2 * rng.normal(size=(b, 64, 1))
        self.h = jnp.asarray(np.einsum("bti,btj->bij", x, x) / 64, jnp.float32)
        self.scales = find_scales(self.leaf, self.spec)
        self.cells = self.form.cells(self.scales, self.spec, shape)
        self.q = rounded(self.w, self.cells, format)

    def error(self, q) -> float:
        e = np.asarray(self.w, np.float64) - np.asarray(q, np.float64)
        return np.einsum("boi,bij,boj->", e, np.asarray(self.h, np.float64), e)

    def of_scales(self, q) -> np.ndarray:
        """The error of all outputs that have a scale, or another that depends on it, in common."""
        e = self.w - q
        return np.asarray(self.tiling.of_outputs((e * (e @ self.h)).sum(-1)))

    def on(self, scale):
        return self.cells._replace(scale=self.tiling.spread(scale))


@pytest.mark.parametrize("case", daily(CASES, ["channel", "tile"]))
def test_sums_and_spread_go_through_the_blocks_of_the_leaf(case):
    s = Subject(case)
    number = np.arange(s.scales.scale.size).reshape(s.scales.scale.shape)
    of_each = np.asarray(s.tiling.spread(jnp.asarray(number)), np.int64)
    want = np.bincount(of_each.reshape(-1), np.asarray(s.w).reshape(-1))
    np.testing.assert_allclose(s.tiling.sums(s.w).reshape(-1), want, rtol=1e-4, atol=1e-5)
    # Inputs of one block have the same scale whatever the output.
    for a in range(s.w.shape[2]):
        same = (of_each == of_each[:, :, a : a + 1]).all((0, 1))
        np.testing.assert_array_equal(same, s.tiling.input_blocks == s.tiling.input_blocks[a])


@pytest.mark.parametrize("case", daily(CASES, ["tile", "experts"]))
def test_fitted_scales_solve_the_normal_equations(case):
    """Against the least squares of a dense system, one unknown a scale, in float64."""
    s = Subject(case)
    got = np.asarray(fit_scales(s.w, s.q, s.h, s.scales.scale, s.tiling))
    number = np.asarray(s.tiling.spread(jnp.arange(got.size).reshape(got.shape)), np.int64)
    level = np.asarray(s.q, np.float64) / np.asarray(s.tiling.spread(s.scales.scale), np.float64)
    roots = np.linalg.cholesky(np.asarray(s.h, np.float64) + 1e-9 * np.eye(s.h.shape[-1]))
    rows, aims = [], []
    for b, o in np.ndindex(*s.w.shape[:2]):
        each = np.zeros((s.w.shape[2], got.size))
        each[np.arange(s.w.shape[2]), number[b, o]] = level[b, o]
        rows.append(roots[b].T @ each)
        aims.append(roots[b].T @ np.asarray(s.w[b, o], np.float64))
    want = np.linalg.lstsq(np.concatenate(rows), np.concatenate(aims), rcond=None)[0]
    # Six steps for at most six scales of an output: what is left is float32's.
    near = np.clip(want, s.scales.scale.reshape(-1) / 4, 4 * s.scales.scale.reshape(-1))
    np.testing.assert_allclose(got.reshape(-1), near, rtol=5e-3)


@pytest.mark.parametrize("case", daily(["channel", "group", "tile", "conv", "experts"], ["group"]))
def test_the_error_falls_round_by_round(case):
    """Codes alone, then scales as well: whichever comes first takes most of the error, and would
    hide that the other does nothing."""
    s = Subject(case)
    step = jax.jit(
        functools.partial(
            refined, s.w, h_BII=s.h, cells=s.cells, format=s.spec.format, tiling=s.tiling, rounds=1
        ),
        static_argnames="fit",
    )
    errors, q, scale = [s.error(s.q)], s.q, s.scales.scale
    for fit in (False, False, True, True):
        before, old = q, scale
        q, scale = step(q, scale=scale, fit=fit)
        errors.append(s.error(q))
        on = rounded(q, s.on(scale), s.spec.format)
        np.testing.assert_array_equal(on, q)
        if fit:  # new scales are taken where they lower the error, and only there
            new = fit_scales(s.w, before, s.h, old, s.tiling)
            moved = before / s.tiling.spread(old) * s.tiling.spread(new)
            want = np.where(s.of_scales(moved) < s.of_scales(before), new, old)
            # Where the errors are equal to rounding, so are the scales to its square root.
            np.testing.assert_allclose(scale, want, rtol=2e-3)
        else:
            np.testing.assert_array_equal(scale, old)
    assert all(b <= a * (1 + 1e-5) for a, b in zip(errors, errors[1:], strict=False))
    assert errors[2] < 0.6 * errors[0] and errors[3] < 0.95 * errors[2]


@pytest.mark.parametrize(
    "format", daily([IntFormat(3), Codebook.learned(2), e2m1], [Codebook.learned(2)]), ids=str
)
def test_descent_ends_where_no_weight_alone_can_do_better(format):
    s = Subject("channel", format, observer=qj.absmax())
    w, h, cells = s.w[0], s.h[0], jax.tree.map(lambda a: a[0], s.cells)
    q = s.q[0]
    one = jax.jit(lambda q: descended(q, (w - q) @ h, h, cells, format))
    for _ in range(20):
        q = one(q)
    np.testing.assert_array_equal(one(q), q)
    best = s.error(q[None])
    levels = np.asarray(cells.codebook if format == Codebook.learned(2) else format.grid)
    for o, i in np.ndindex(*q.shape):
        for level in levels:
            other = np.asarray(q).copy()
            other[o, i] = level * cells.scale[o, i]
            assert s.error(other[None]) >= best * (1 - 1e-5)


def test_descent_leaves_inputs_that_were_never_seen():
    s = Subject("channel")
    h = s.h[0].at[3].set(0).at[:, 3].set(0)
    cells = jax.tree.map(lambda a: a[0], s.cells)
    got = descended(s.q[0], (s.w[0] - s.q[0]) @ h, h, cells, INT2)
    np.testing.assert_array_equal(got[:, 3], s.q[0][:, 3])


FORMATS = {
    "int2 half": {},
    "int4": dict(format=IntFormat(4)),
    "uint3 asymmetric": dict(
        format=IntFormat(3, signed=False), symmetric=False, observer=qj.minmax()
    ),
    "kmeans2": dict(format=Codebook.learned(2), observer=qj.absmax()),
    "e2m1": dict(format=e2m1),
}


@pytest.mark.parametrize("case", daily(CASES, ["group", "tensor"]))
@pytest.mark.parametrize("fmt", daily(FORMATS, ["int2 half", "uint3 asymmetric"]))
def test_scales_by_the_output(fmt, case):
    """On the grid of the scales given, and never above plain rounding."""
    if list(FORMATS).index(fmt) % 3 != list(CASES).index(case) % 3:
        pytest.skip("dealt to another pair")
    s = Subject(case, **FORMATS[fmt])
    got, scales = jax.jit(rounded_by_output, static_argnames=("spec", "tiling"))(
        s.w, s.h, s.scales, s.spec, s.tiling
    )
    on = rounded(got, s.on(scales.scale), s.spec.format)
    np.testing.assert_array_equal(on, got)
    assert s.error(got) < s.error(s.q)


@pytest.mark.parametrize("seed", range(5))
def test_correlated_inputs_ask_for_other_scales(seed):
    """Errors of inputs that move together add up, and the scale that makes them cancel is not the
    one that makes each small."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
    params = {"kernel": w}
    x = jnp.asarray(rng.normal(size=(256, 32)) + 3 * rng.normal(size=(256, 1)), jnp.float32)

    def apply(p, x):
        return x @ p["kernel"]

    def loss(p):
        return float(jnp.square(apply(qj.dequantize(p), x) - apply(params, x)).mean())

    whole = loss(qj.calibrate(apply, params, [x], qj.ptq.rtn("w2")))
    alone = loss(qj.calibrate(apply, params, [x], qj.ptq.rtn("w2", correlations=False)))
    assert whole < 0.7 * alone
