"""The rows that a product sees, against the product itself: y = w x, matrix by matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpret.rows import Rows, rows_of
from quantjax.ptq.moments import add_rows, no_moments
from tests.daily import daily


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def conv(shape, numbers=("NHWC", "HWIO", "NHWC"), **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def ragged(w, x):
    return lax.ragged_dot(x, w, jnp.array([2, 0, 5], jnp.int32))


# name: (product of w and x, shapes of both, the output as (rows, outputs) of each matrix)
PRODUCTS = {
    "dense": (lambda w, x: x @ w, (3, 4), (5, 3), lambda y: y[None]),
    "weight first": (lambda w, x: w @ x, (4, 3), (3, 5), lambda y: y.T[None]),
    "heads": (
        lambda w, x: jnp.einsum("tij,ijo->to", x, w),
        *((2, 3, 4), (5, 2, 3), lambda y: y[None]),
    ),
    "experts": (
        lambda w, x: jnp.einsum("eti,eio->eto", x, w),
        *((2, 3, 4), (2, 5, 3), lambda y: y),
    ),
    "ragged": (ragged, (3, 4, 6), (7, 4), lambda y: y),
    "convolution": (conv((3, 3)), (3, 2, 4, 6), (2, 5, 5, 4), lambda y: y.reshape(1, -1, 6)),
    "strided, padded, dilated": (
        conv((3, 3), window_strides=(2, 1), padding=((1, 0), (2, 1)), rhs_dilation=(1, 2)),
        *((3, 3, 2, 4), (2, 7, 6, 2), lambda y: y.reshape(1, -1, 4)),
    ),
    "transposed": (
        conv((3, 3), padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)),
        *((3, 3, 2, 4), (2, 4, 4, 2), lambda y: y.reshape(1, -1, 4)),
    ),
    "grouped": (
        conv((3, 3), feature_group_count=2),
        *((3, 3, 2, 6), (2, 4, 4, 4), lambda y: jnp.moveaxis(y.reshape(-1, 2, 3), 1, 0)),
    ),
    "channels first": (
        conv((3, 3), ("NCHW", "OIHW", "NCHW")),
        *((4, 2, 3, 3), (2, 2, 5, 5), lambda y: jnp.moveaxis(y, 1, 3).reshape(1, -1, 4)),
    ),
    "all of these at once": (
        conv(
            (3, 3), ("NCHW", "OIHW", "NCHW"), feature_group_count=2, window_strides=(2, 1),
            padding=((1, 0), (2, 1)), rhs_dilation=(1, 2), lhs_dilation=(2, 1),
        ),
        (6, 2, 3, 3),
        (2, 4, 5, 6),
        lambda y: jnp.moveaxis(jnp.moveaxis(y, 1, 3).reshape(-1, 2, 3), 1, 0),
    ),
}  # fmt: skip


def moments_of(name):
    """What a calibration finds of the product."""
    product, w_shape, x_shape, outputs = PRODUCTS[name]
    w, x = normal(*w_shape, seed=1), normal(*x_shape, seed=2)
    found = {}

    class Solver:
        paired = True

        def __call__(self, problem):
            found["problem"] = problem
            scales = qj.quantize({"w": problem.w}, qj.Policy([("w", problem.spec)]))
            return scales["w"]

    method = qj.ptq.Layerwise(qj.Policy([("w", "w8")]), Solver())
    qj.calibrate(lambda p, x: product(p["w"], x), {"w": w}, [x], method)
    return found["problem"], outputs(product(w, x))


CORE = ("dense", "experts", "ragged", "all of these at once")


@pytest.mark.parametrize("name", daily(PRODUCTS, CORE))
def test_moments_give_the_energy_of_the_output(name):
    """sum over outputs of E[y^2] = tr(w H w'), and E[y] = w E[x], for each matrix."""
    problem, y_BTO = moments_of(name)
    m, w_BOI, y_BTO = jax.tree.map(np.asarray, (problem.moments, problem.w_BOI, y_BTO))
    if name == "ragged":  # experts see two, no and five rows
        np.testing.assert_array_equal(m.rows, [2, 0, 5])
        y_BTO = [y_BTO[:2], y_BTO[:0], y_BTO[2:]]
    for b, y_TO in enumerate(y_BTO):
        energy = np.einsum("oi,ij,oj->o", w_BOI[b], m.h[b], w_BOI[b])
        want = (y_TO**2).sum(0) / max(len(y_TO), 1)
        # eps * the terms of a sum, with a margin of 10
        np.testing.assert_allclose(energy, want, rtol=1e-4, atol=1e-5)
        mean = y_TO.sum(0) / max(len(y_TO), 1)
        np.testing.assert_allclose(w_BOI[b] @ m.mean[b], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(m.cross[b], m.h[b])  # nothing before it is quantized


def test_moments_of_parts_are_those_of_the_whole():
    x = normal(2, 12, 3)
    f = normal(2, 12, 3, seed=1)
    mine = jnp.asarray(np.random.default_rng(2).random((2, 12)) < 0.6)
    m = no_moments(2, 3, cross=True)
    for i in range(0, 12, 4):
        m = add_rows(m, Rows(x[:, i : i + 4], mine[:, i : i + 4]), f[:, i : i + 4])
    for b in range(2):
        own, other = np.float64(x[b][mine[b]]), np.float64(f[b][mine[b]])
        n = len(own)
        assert m.rows[b] == n
        np.testing.assert_allclose(m.h[b], own.T @ own / n, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m.cross[b], other.T @ own / n, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m.mean[b], own.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m.float_mean[b], other.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m.magnitude[b], np.abs(own).mean(0), rtol=1e-5)
        np.testing.assert_array_equal(m.widest[b], np.abs(own).max(0))


def test_bfloat16_is_accumulated_in_float32():
    # 1 + 2^-8 is no bfloat16: a mean kept in bfloat16 would be 1.
    x = jnp.concatenate([jnp.ones((1, 255, 1)), jnp.full((1, 1, 1), 2.0)], 1).astype(jnp.bfloat16)
    m = add_rows(no_moments(1, 1, cross=False), Rows(x))
    assert m.h.dtype == jnp.float32
    np.testing.assert_allclose(m.mean[0, 0], 1 + 2**-8, rtol=1e-6)


def test_a_kind_of_product_whose_rows_are_not_known():
    def apply(w, x):
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), batch_group_count=2
        )

    eqn = jax.make_jaxpr(apply)(normal(3, 3, 2, 4), normal(2, 4, 4, 2)).jaxpr.eqns[0]
    assert rows_of(eqn, (normal(2, 4, 4, 2), normal(3, 3, 2, 4)), 1) is None


@pytest.mark.parametrize("name", ["dense", "grouped", "strided, padded, dilated"])
def test_some_rows_are_rows_of_all(name):
    product, w_shape, x_shape, _ = PRODUCTS[name]
    w, x = normal(*w_shape, seed=1), normal(*x_shape, seed=2)
    eqn = jax.make_jaxpr(product)(w, x).jaxpr.eqns[0]
    operands = (x, w)
    whole = np.asarray(rows_of(eqn, operands, 1).x_BTI)
    some = np.asarray(rows_of(eqn, operands, 1, 4).x_BTI)
    assert some.shape == (whole.shape[0], 4, whole.shape[2])
    at = [
        next(t for t in range(whole.shape[1]) if (whole[:, t] == some[:, i]).all())
        for i in range(4)
    ]
    assert at == sorted(at) and len(set(at)) == 4
    np.testing.assert_array_equal(rows_of(eqn, operands, 1, 10**6).x_BTI, whole)
