"""AdaRound against an exhaustive search, and the laws of soft rounding, for every kind of grid."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import affine, formats, ptq
from quantjax.formats import Codebook, Format, IntFormat, Levels
from quantjax.ptq.adaround import adaround_matrix, descended, output_error
from quantjax.ptq.matrix import Cells, MatrixForm, on_grid
from quantjax.ptq.soft_rounding import (
    Anneal,
    hardened,
    indecision,
    neighbours,
    share,
    softened,
    start_at,
)
from quantjax.spec import QuantSpec
from tests.daily import daily

SEEDS = range(5)
FORM = MatrixForm((), (0,), (1,))
SPECS: dict[str, dict[str, Any]] = {
    "int4": dict(format=IntFormat(4), observer=qj.mse()),
    "int2 half": dict(format=IntFormat(2, levels=Levels.HALF), observer=qj.mse()),
    "binary": dict(format=formats.binary),
    "int3 asymmetric": dict(format=IntFormat(3), symmetric=False, observer=qj.minmax()),
    "uint4 asymmetric": dict(
        format=IntFormat(4, signed=False), symmetric=False, observer=qj.minmax()
    ),
    "nf4": dict(format=formats.nf4),
    "kmeans3": dict(format=Codebook.learned(3)),
    "e2m1": dict(format=formats.e2m1),
    "e4m3": dict(format=formats.e4m3),
    "int4 short groups": dict(format=IntFormat(4), block=(1, 5)),
    "nvfp4": dict(format=formats.e2m1, scale_format=formats.e4m3, block=(1, 4)),
}
CORE = ("int4", "int2 half", "kmeans3")
each_format = pytest.mark.parametrize("name", daily(SPECS, CORE))

solved = jax.jit(adaround_matrix, static_argnames=("format", "anneal"))
descent = jax.jit(descended, static_argnames="format")


def made(name: str) -> QuantSpec:
    return QuantSpec(**{"block": (1, None), **SPECS[name]})


def problem(seed: int, o: int = 3, i: int = 8, rows: int = 200) -> tuple[jax.Array, jax.Array]:
    """Weights, and the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(o, i)).astype(np.float32)
    mixed = np.eye(i) + 0.5 * rng.normal(size=(i, i))
    x = rng.normal(size=(rows, i)) @ mixed + rng.normal(size=i)
    return jnp.asarray(w), jnp.asarray(x.T @ x / rows, jnp.float32)


def cells_of(w: jax.Array, spec: QuantSpec) -> tuple[Cells, affine.Scales]:
    scales = affine.find_scales(w, spec)
    cells = FORM.cells(scales, spec, w.shape)
    codebook = None if cells.codebook is None else cells.codebook[0]
    zero = None if cells.zero_point is None else cells.zero_point[0]
    return Cells(cells.scale[0], zero, codebook), scales


def exact_error(v: Any, w: Any, h: Any) -> np.ndarray:
    """(v - w)' H (v - w) of every output, in float64."""
    e = np.asarray(v, np.float64) - np.asarray(w, np.float64)
    return np.einsum("oi,ij,oj->o", e, np.asarray(h, np.float64), e)


def best_rounding(w: jax.Array, h: jax.Array, cells: Cells, format: Format) -> np.ndarray:
    """The least error of every output over all 2^I choices between neighbours."""
    low, high = (np.asarray(x, np.float64) for x in neighbours(w, cells, format))
    choices = np.array(list(itertools.product([0.0, 1.0], repeat=w.shape[1])))
    return np.array(
        [min(exact_error(low[o] + choices * (high - low)[o], w[o], h)) for o in range(w.shape[0])]
    )


@pytest.mark.parametrize("name", daily(["int4", "int2 half"], ["int2 half"]))
def test_is_close_to_the_best_of_all_roundings(name: str) -> None:
    """Within 10 % on five seeds together, and on each below rounding to nearest; descent over all
    levels may even go below the best choice between neighbours."""
    spec = made(name)
    found = best = 0.0
    for seed in SEEDS:
        w, h = problem(seed)
        cells, _ = cells_of(w, spec)
        own = exact_error(solved(w, h, cells, format=spec.format), w, h).sum()
        assert own <= exact_error(on_grid(w, cells, spec.format), w, h).sum()
        found, best = found + own, best + best_rounding(w, h, cells, spec.format).sum()
    assert found <= 1.1 * best


@pytest.mark.parametrize("name", daily(SPECS, ["int2 half", "kmeans3"]))
def test_the_result_is_on_the_grid_and_its_codes_are_recovered(name: str) -> None:
    spec = made(name)
    w, h = problem(0)
    cells, scales = cells_of(w, spec)
    v = solved(w, h, cells, format=spec.format, anneal=Anneal(100))
    np.testing.assert_array_equal(on_grid(v, cells, spec.format), v)
    q = affine.quantize_array(v, scales, spec=spec)
    np.testing.assert_array_equal(affine.dequantize_array(q), v)
    plain = exact_error(on_grid(w, cells, spec.format), w, h)
    assert (exact_error(v, w, h) <= plain * (1 + 1e-4)).all()  # sums of 8 products in float32


@each_format
def test_neighbours_are_next_to_each_other_and_around_the_weight(name: str) -> None:
    spec = made(name)
    w, _ = problem(1)
    cells, _ = cells_of(w, spec)
    low, high = neighbours(w, cells, spec.format)
    for level in (low, high):
        np.testing.assert_array_equal(on_grid(level, cells, spec.format), level)
    assert (low < high).all()
    middle = low + (high - low) * np.float32(0.49)
    np.testing.assert_array_equal(on_grid(middle, cells, spec.format), low)
    nearest = on_grid(w, cells, spec.format)
    assert ((nearest == low) | (nearest == high)).all()


def test_soft_rounding_starts_at_the_weights_and_ends_at_the_nearest() -> None:
    w, _ = problem(2)
    cells, _ = cells_of(w, made("int4"))
    between = neighbours(w, cells, IntFormat(4))
    v = start_at(w, between)
    # A hundredth of a gap at the ends, where the start keeps off h = 0 and h = 1.
    near, inside = 0.0101 * float(cells.scale.max()), jnp.clip(w, *between)
    np.testing.assert_allclose(softened(v, between), inside, atol=near)
    np.testing.assert_array_equal(hardened(v, between), on_grid(w, cells, IntFormat(4)))


def test_indecision_is_zero_on_levels_and_its_gradient_is_the_formula() -> None:
    assert indecision(jnp.array([-9.0, 9.0]), jnp.float32(3)) == 0
    v, beta = jnp.array([-1.0, 0.0, 0.7]), 3.0
    h = np.asarray(share(v), np.float64)
    s = 1 / (1 + np.exp(-np.asarray(v, np.float64)))
    formula = -beta * np.abs(2 * h - 1) ** (beta - 1) * np.sign(2 * h - 1) * 2 * 1.2 * s * (1 - s)
    np.testing.assert_allclose(jax.grad(indecision)(v, jnp.float32(beta)), formula, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_descent_never_raises_the_error(seed: int) -> None:
    """On more columns than are taken together, so that their blocks work on each other."""
    spec = made("int4")
    w, h = problem(seed, i=150, rows=300)
    cells, _ = cells_of(w, spec)
    start = on_grid(w, cells, spec.format)
    end = descent(start, w, h, None, cells, format=spec.format)
    assert (exact_error(end, w, h) < exact_error(start, w, h)).all()
    # And no single weight can be bettered much any more: two sweeps are close to the end.
    again = descent(end, w, h, None, cells, format=spec.format)
    assert exact_error(again, w, h).sum() > 0.8 * exact_error(end, w, h).sum()


@pytest.mark.parametrize("seed", daily(SEEDS, SEEDS[:3]))
def test_makes_good_for_what_the_layers_before_lost(seed: int) -> None:
    """With E[f x'] the outputs are nearer to those of the float model than without."""
    rng = np.random.default_rng(seed)
    w, spec = jnp.asarray(rng.normal(size=(4, 10)), jnp.float32), made("int4")
    f = rng.normal(size=(500, 10)) @ rng.normal(size=(10, 10))
    x = f + 0.5 * rng.normal(size=f.shape) * f.std()
    h, cross = (jnp.asarray(a.T @ x / len(x), jnp.float32) for a in (x, f))
    cells, _ = cells_of(w, spec)

    def error(v: jax.Array) -> float:
        return float(np.mean((f @ np.asarray(w).T - x @ np.asarray(v).T) ** 2))

    paired = solved(w, h, cells, format=spec.format, cross_II=cross)
    assert error(paired) < error(solved(w, h, cells, format=spec.format))
    r = jnp.matmul(w, cross - h)
    lost = output_error(paired, w, h, r) - output_error(w, w, h, r)
    expected = len(w) * (error(paired) - error(w))  # the part that v does not change cancels
    np.testing.assert_allclose(float(lost.sum()), expected, rtol=1e-3)


def test_outputs_do_not_mix() -> None:
    w, h = problem(3)
    spec = made("int4")
    cells, _ = cells_of(w, spec)
    whole = solved(w, h, cells, format=spec.format, anneal=Anneal(200))
    one = solved(w[1:2], h, Cells(cells.scale[1:2]), format=spec.format, anneal=Anneal(200))
    np.testing.assert_array_equal(whole[1:2], one)


@pytest.mark.parametrize("case", ["one sample", "constant", "unseen", "on the grid"])
def test_poor_data_does_no_harm(case: str) -> None:
    spec = made("int4")
    w, h = problem(4)
    cells, _ = cells_of(w, spec)
    x = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    if case == "one sample":
        h = jnp.asarray(x.T @ x)
    elif case == "constant":  # the first features never change, the last are always 0
        x = np.concatenate([np.ones((9, 5)), np.zeros((9, 3))], 1).astype(np.float32)
        h = jnp.asarray(x.T @ x / 9)
    elif case == "unseen":
        h = jnp.zeros((8, 8), jnp.float32)
    else:
        w = on_grid(w, cells, spec.format)
    v, nearest = solved(w, h, cells, format=spec.format), on_grid(w, cells, spec.format)
    assert np.isfinite(v).all()
    assert (exact_error(v, w, h) <= exact_error(nearest, w, h) * (1 + 1e-4)).all()
    if case in ("unseen", "on the grid"):
        np.testing.assert_array_equal(v, nearest)


def test_steps_are_checked() -> None:
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        Anneal(0)


def network(p: Any, x: jax.Array) -> jax.Array:
    """A convolution with groups, a stack of layers that a scan takes off, a dense layer."""
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, p["conv"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
    )
    x, _ = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x.mean((1, 2)), p["layers"])
    return x @ p["head"]


def variables(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 2, 8), "layers": (2, 8, 8), "head": (8, 3)}
    return {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)
        for name, shape in shapes.items()
    }


def images(seed: int, n: int = 32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n, 5, 5, 4)) + 0.5


@pytest.mark.full
def test_calibrates_a_network_nearer_to_the_float_one_than_rounding() -> None:
    ours = nearest = 0.0
    for seed in (0, 1):
        params, x = variables(seed), images(seed, 64)
        target = network(params, x)

        def error(q: Any, x: jax.Array = x, target: jax.Array = target) -> float:
            return float(jnp.mean((network(qj.dequantize(q), x) - target) ** 2))

        method = ptq.adaround("w3", steps=200)
        ours += error(qj.calibrate(network, params, [x[:32], x[32:]], method))
        nearest += error(qj.quantize(params, "w3"))
    assert ours < 0.6 * nearest


def test_nan_in_an_activation_is_named() -> None:
    x = images(0).at[3].set(jnp.nan)
    with pytest.raises(ValueError, match="conv: batch 1: the activation holds NaN"):
        qj.calibrate(network, variables(0), [images(1), x], ptq.adaround("w4", steps=2))
