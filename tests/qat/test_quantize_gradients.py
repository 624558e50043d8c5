"""Are rounded gradients right on average, and does error feedback give back what is late?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.qat import quantize_gradients
from tests.counted import Counted

KEY = jax.random.key(2)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


G = {"w": normal(6, 5), "b": normal(3, seed=1), "s": np.float32(0.3)}


@functools.partial(jax.jit, static_argnums=0)
def many(bits, g):
    def one(key):
        rounded = quantize_gradients(bits, key=key, error_feedback=False)
        return rounded.update(g, rounded.init(g))[0]

    return jax.vmap(one)(jax.random.split(KEY, 400))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_mean_is_the_gradient(bits):
    """400 keys, every value within 4.5 standard errors of a choice between its two levels. Values
    are levels: of one bit the two ends, of two three, of four 15."""
    samples = jax.tree.map(np.asarray, many(bits, G))
    for name, g in G.items():
        got, top = samples[name].astype(np.float64), float(np.abs(g).max())
        step = {1: 2 * top, 2: top, 4: top / 7}[bits]
        up = (g.astype(np.float64) + top) / step % 1
        error = step * np.sqrt(up * (1 - up) / 400)
        assert np.all(np.abs(got.mean(0) - g) <= 4.5 * error + 1e-5 * top)
        levels = {1: 2, 2: 3, 4: 15}[bits]
        assert len(np.unique(np.round(got / top * 7, 3))) <= levels


def test_leaves_and_steps_have_noise_of_their_own():
    rounded = quantize_gradients(2, key=KEY, error_feedback=False)
    g = {"a": jnp.full(64, 0.5).at[0].set(1.0), "b": jnp.full(64, 0.5).at[0].set(1.0)}
    one, state = rounded.update(g, rounded.init(g))
    two, _ = rounded.update(g, state)
    assert np.any(one["a"] != one["b"]) and np.any(one["a"] != two["a"])
    again, _ = rounded.update(g, rounded.init(g))
    jax.tree.map(np.testing.assert_array_equal, again, one)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_with_feedback_only_the_last_residual_is_missing(bits):
    """sum of what was passed = sum of the gradients - residual; in NumPy. And it stays small, in
    leaves of a large value too."""
    rounded = quantize_gradients(bits)
    update, state = Counted(rounded.update), rounded.init(G)
    passed, total = np.zeros((6, 5)), np.zeros((6, 5))
    for t in range(30):
        w = normal(6, 5, seed=t)
        w[t % 6, 0] *= 30
        u, state = update({**G, "w": w}, state)
        passed, total = passed + u["w"], total + w
        assert np.abs(state.residual["w"]).max() < 100
    assert update.traces == 1 and int(state.step) == 30
    # 30 float32 sums of values below 128.
    np.testing.assert_allclose(passed + state.residual["w"], total, atol=30 * 128 * 2.0**-23)


def test_feedback_lets_signs_converge():
    """Karimireddy et al., counterexample 2: the signs of the gradient lie across x_1 + x_2, which
    so never falls; with what they left out, it does."""

    def loss(x):
        return jnp.abs(x[0] + x[1]) * 0.25 + jnp.abs(x[0] - x[1])

    def run(transform):
        optimizer = optax.chain(transform, optax.sgd(0.01))

        def step(carry, _):
            x, state = carry
            u, state = optimizer.update(jax.grad(loss)(x), state)
            return (optax.apply_updates(x, u), state), None

        x = jnp.array([1.0, 1.001])
        (x, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), None, 600)
        return float(loss(x))

    signs = qj.QuantSpec(format=qj.formats.binary, observer=qj.mse())
    lost = run(quantize_gradients(signs, error_feedback=False))
    assert lost > 0.4 and run(quantize_gradients(1)) < 0.1


def test_blocks_dtypes_and_what_is_no_float():
    spec = qj.QuantSpec(format=qj.IntFormat(4), block=(2, None))
    rounded = quantize_gradients(spec, error_feedback=False)
    g = {"w": jnp.asarray(normal(4, 5), jnp.bfloat16), "b": jnp.asarray(normal(3)),
         "n": jnp.arange(3), "empty": jnp.zeros((0, 3))}  # fmt: skip
    u, _ = rounded.update(g, rounded.init(g))
    assert jax.tree.map(lambda x: x.dtype, u) == jax.tree.map(lambda x: x.dtype, g)
    w = np.asarray(g["w"], np.float64).reshape(2, 10)
    step = np.abs(w).max(1, keepdims=True) / 7
    off = np.abs(np.asarray(u["w"], np.float64).reshape(2, 10) - w)
    assert np.all(off <= step * 0.5 + 2.0**-9 * np.abs(w) + 2.0**-8 * step)
    assert u["n"] is g["n"] and u["empty"].shape == (0, 3)
    assert np.abs(u["b"] - g["b"]).max() <= np.abs(g["b"]).max() / 14 * 1.001


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    optimizer = optax.apply_if_finite(
        optax.chain(quantize_gradients(4), optax.adam(1e-3)), max_consecutive_errors=3
    )
    _, before = optimizer.update(G, optimizer.init(G))
    updates, after = optimizer.update({**G, "w": G["w"] * np.nan}, before)
    assert not np.any(updates["b"]) and int(after.total_notfinite) == 1
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, before.inner_state)


def test_refusals():
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got 9"):
        quantize_gradients(9, key=KEY)
    with pytest.raises(ValueError, match="stochastic rounding needs a key"):
        quantize_gradients(4, error_feedback=False)
    noisy = qj.QuantSpec(format=qj.IntFormat(4), rounding=qj.Rounding.STOCHASTIC)
    for spec in (noisy, qj.QuantSpec(format=qj.formats.binary)):
        with pytest.raises(ValueError, match="the residual could grow without bound"):
            quantize_gradients(spec, key=KEY)
    with pytest.raises(TypeError, match="expected bits or a QuantSpec, got True"):
        quantize_gradients(True, key=KEY)
    with pytest.raises(ValueError, match="no group, rows, layers or activation"):
        quantize_gradients(qj.QuantSpec(format=qj.IntFormat(4), group=64))
