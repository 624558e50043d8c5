"""Is the integer product exact, for all dimension numbers, mapped, and on every platform's form?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from quantjax.ops import u8s8
from quantjax.ops.u8s8 import u8s8_dot

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (4, 3, 70)).astype(np.uint8)
W = RNG.integers(-128, 128, (4, 70, 5)).astype(np.int8)
X[0, 0], W[0, :, 0] = 255, -128  # the largest sums there are
PLAIN = (((1,), (0,)), ((), ()))
CASES = {
    "matrix": (X[0], W[0], PLAIN),
    "one row": (X[0, :1], W[0], PLAIN),
    "transposed": (X[0], W[0].T, (((1,), (1,)), ((), ()))),
    "batch": (X, W, (((2,), (1,)), ((0,), (0,)))),
    "batch within": (X.transpose(1, 0, 2), W.transpose(1, 2, 0), (((2,), (0,)), ((1,), (2,)))),
    "two sums": (
        X,
        RNG.integers(-128, 128, (3, 70, 5)).astype(np.int8),
        (((1, 2), (0, 1)), ((), ())),
    ),
    "vectors": (X[0, 0], W[0, :, 0], (((0,), (0,)), ((), ()))),
}


def exact(x, w, numbers):
    return lax.dot_general(x.astype(jnp.int32), w.astype(jnp.int32), numbers)


@pytest.mark.parametrize("name", CASES)
def test_sums_are_exact(name):
    x, w, numbers = CASES[name]
    x, w = jnp.asarray(x), jnp.asarray(w)
    expected = exact(x, w, numbers)
    forms = {
        "eager": u8s8_dot(x, w, numbers),
        "jit": jax.jit(u8s8_dot, static_argnums=2)(x, w, numbers),
        "of other platforms": u8s8._reference(x, w, dimension_numbers=numbers),
    }
    for form, got in forms.items():
        assert got.dtype == jnp.int32, form
        np.testing.assert_array_equal(got, expected, err_msg=form)


@pytest.mark.parametrize("axes", [(0, None), (1, None), (2, None), (None, 0), (None, 1), (None, 2)])
def test_vmap_over_one_operand(axes):
    x = jnp.asarray(X[0] if axes[0] is None else np.moveaxis(X, 0, axes[0]))
    w = jnp.asarray(W[0] if axes[1] is None else np.moveaxis(W, 0, axes[1]))
    got = jax.vmap(lambda x, w: u8s8_dot(x, w, PLAIN), axes)(x, w)
    expected = jax.vmap(lambda x, w: exact(x, w, PLAIN), axes)(x, w)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("axes", [(0, 0), (2, 1), (1, 2)])
def test_vmap_over_both(axes):
    x, w = (jnp.asarray(np.moveaxis(a, 0, d)) for a, d in zip((X, W), axes, strict=True))
    got = jax.vmap(lambda x, w: u8s8_dot(x, w, PLAIN), axes)(x, w)
    np.testing.assert_array_equal(got, exact(X, W, (((2,), (1,)), ((0,), (0,)))))


def test_vmap_of_a_batched_product():
    numbers = (((2,), (1,)), ((0,), (0,)))
    x, w = jnp.stack([X, X[::-1]], 1), jnp.asarray(W)
    got = jax.vmap(lambda x: u8s8_dot(x, w, numbers), 1)(x)
    expected = jnp.stack([exact(X, W, numbers), exact(X[::-1], W, numbers)])
    np.testing.assert_array_equal(got, expected)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="expected uint8 and int8, got int8"):
        jax.jit(lambda x, w: u8s8.u8s8_p.bind(x, w, dimension_numbers=PLAIN))(
            jnp.zeros((2, 2), jnp.int8), jnp.zeros((2, 2), jnp.int8)
        )


def test_it_exports_to_three_platforms_at_once():
    run = jax.jit(lambda x, w: u8s8_dot(x, w, PLAIN))
    x, w = jnp.asarray(X[0]), jnp.asarray(W[0])
    data = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x, w).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(x, w), exact(x, w, PLAIN))
