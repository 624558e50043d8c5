"""Is a product in integers the product of the rounded values?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.interpret import intercept
from quantjax.ops import fake_rows, fits_integers, integer_dot

ACT = qj.QuantSpec(format=qj.IntFormat(8))
PLAIN = (((1,), (0,)), ((), ()))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernel(preset: str, *shape: int) -> qj.QTensor:
    return qj.quantize({"kernel": normal(*shape, seed=1)}, preset)["kernel"]


def close(got, x, q, summed, numbers) -> None:
    """Equal to the product of the rounded values in float64, but for float32's roundings: of two
    scales, their product and the result, 4 of 2^-24; and of the values in the reference, 2 more
    on each term of the sum."""
    x = np.asarray(fake_rows(x, ACT, summed), np.float64)
    w = np.asarray(qj.dequantize(q), np.float64)
    numbers = jax.tree.map(int, numbers)
    with jax.enable_x64(True):
        expected = np.asarray(jax.lax.dot_general(x, w, numbers))
        size = np.asarray(jax.lax.dot_general(np.abs(x), np.abs(w), numbers))
    assert np.all(np.abs(got - expected) <= 8 * 2.0**-24 * size)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("preset", ["w8", "w4", "w3", "w2", "w1", "ternary"])
def test_matrices(preset, rows):
    x, q = normal(rows, 64), kernel(preset, 64, 24)
    assert fits_integers(q, ACT, (0,)) == ""
    close(integer_dot(x, q, ACT, PLAIN), x, q, (1,), PLAIN)
    jitted = jax.jit(lambda x, q: integer_dot(x, q, ACT, PLAIN))(x, q)
    np.testing.assert_allclose(jitted, integer_dot(x, q, ACT, PLAIN), rtol=4 * 2.0**-24)


def test_batches_several_axes_and_transposed_weights():
    spec = qj.QuantSpec(format=qj.IntFormat(8), block=(1, None, 1))
    x, w = normal(3, 5, 16), normal(3, 16, 7, seed=1)
    q = qj.quantize({"w": w}, qj.Policy([("w", spec)]))["w"]
    numbers = (((2,), (1,)), ((0,), (0,)))
    close(integer_dot(x, q, ACT, numbers), x, q, (2,), numbers)
    spec = qj.QuantSpec(format=qj.IntFormat(8), block=(1, None, None))
    q = qj.quantize({"w": normal(7, 3, 16, seed=1)}, qj.Policy([("w", spec)]))["w"]
    x, numbers = normal(2, 3, 5, 16), (((1, 3), (1, 2)), ((), ()))
    close(integer_dot(x, q, ACT, numbers), x, q, (1, 3), numbers)


def test_a_row_with_nan_is_nan_and_the_others_are_not():
    x = normal(6, 64).at[1, 3].set(jnp.nan).at[4, 0].set(jnp.inf)
    y = integer_dot(x, kernel("w8", 64, 24), ACT, PLAIN)
    np.testing.assert_array_equal(jnp.isnan(y).all(1), [False, True, False, False, True, False])
    assert bool(jnp.isfinite(y[jnp.array([0, 2, 3, 5])]).all())


def test_a_row_of_zeros_is_zero():
    y = integer_dot(jnp.zeros((2, 64)), kernel("w8", 64, 24), ACT, PLAIN)
    np.testing.assert_array_equal(y, 0)


def test_the_gradient_passes_straight_through():
    x, q = normal(3, 64), kernel("w8", 64, 24)
    got = jax.grad(lambda x: integer_dot(x, q, ACT, PLAIN).sum())(x)
    np.testing.assert_allclose(got, jnp.ones((3, 24)) @ qj.dequantize(q).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["w4g16", "nf4", "fp8", "mxfp8"])
def test_what_has_no_integers_says_why(preset):
    assert fits_integers(kernel(preset, 64, 24), ACT, (0,))


APPLIES = {
    "plain": (lambda p, x: x @ p["kernel"], (64, 24)),
    "transposed": (lambda p, x: x @ p["kernel"].T, (24, 64)),
    "weight first": (lambda p, x: (p["kernel"].T @ x.T).T, (64, 24)),
    "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["kernel"]), (64, 3, 8)),
    "heads, swapped": (lambda p, x: jnp.einsum("td,dhk->tkh", x, p["kernel"]), (64, 3, 8)),
    "two sums": (
        lambda p, x: jnp.einsum("tab,abo->to", x.reshape(-1, 4, 16), p["kernel"]),
        (4, 16, 5),
    ),
    "merged": (lambda p, x: x @ p["kernel"].reshape(64, 24), (64, 3, 8)),
}


@pytest.mark.parametrize("name", APPLIES)
@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4g16a8", "w8a4"])
def test_interception_means_the_same_however_the_model_writes_it(name, preset):
    apply, shape = APPLIES[name]
    q = qj.quantize({"kernel": normal(*shape, seed=1)}, preset)
    x, act = normal(5, 64), q["kernel"].act
    got = intercept(apply)(q, x)
    # One scale a row of x is one a row of every form above, as each sums over all of a row.
    expected = apply(qj.dequantize(q), fake_rows(x, act, (1,)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
    (site,) = intercept(apply).report(q, x).sites
    assert site.act == str(act.format)
    # By its name the last axis of a kernel is the output; this model sums over it.
    across = name == "transposed" or "g" in preset
    assert site.lowering.startswith("float" if across else "int8 product")


def test_highest_precision_keeps_the_activation():
    def apply(p, x):
        return jnp.matmul(x, p["kernel"], precision="highest")

    q, x = qj.quantize({"kernel": normal(64, 24)}, "w8a8"), normal(5, 64)
    np.testing.assert_array_equal(intercept(apply)(q, x), apply(qj.dequantize(q), x))


def test_an_intercepted_model_exports_to_three_platforms_at_once():
    q, x = qj.quantize({"kernel": normal(64, 24)}, "w8a8"), normal(5, 64)
    run = jax.jit(lambda x: intercept(lambda p, x: x @ p["kernel"])(q, x))
    data = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(x), run(x))
