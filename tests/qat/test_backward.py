"""Are the two gradient products rounded each by its own spec, and without bias?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import quantjax as qj
from quantjax import formats
from quantjax.interpret import intercept
from quantjax.qat import Backward, finalize, prepare
from quantjax.spec import Granularity, QuantSpec
from tests.daily import daily

INT8 = QuantSpec(format=qj.IntFormat(8))
INT4 = QuantSpec(format=qj.IntFormat(4))
NOISY4 = QuantSpec(format=qj.IntFormat(4), rounding=qj.Rounding.STOCHASTIC)
NOISY8 = QuantSpec(format=qj.IntFormat(8), rounding=qj.Rounding.STOCHASTIC)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rounded(x, levels, summed):
    """D(Q(x)) in float64, one absmax scale for all that lies along the summed axes."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(summed, keepdims=True) / levels
    return np.round(x / np.where(scale == 0, 1, scale)) * scale


def conv(**options):
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def ragged(w, x):
    return lax.ragged_dot(x, w, jnp.array([3, 0, 4], jnp.int32))


# Function, shapes of w and x, then the axes that one scale covers: in dX those of y and w, in dW
# those of y and x.
CASES = {
    "right": (lambda w, x: x @ w, (6, 5), (4, 6), (1,), (1,), (0,), (0,)),
    "left": (lambda w, x: w.T @ x, (6, 5), (6, 4), (0,), (1,), (1,), (1,)),
    "many rows": (lambda w, x: x @ w, (6, 5), (2, 3, 6), (2,), (1,), (0, 1), (0, 1)),
    "batch": (
        lambda w, x: jnp.einsum("hdk,bhd->hbk", w, x), (2, 6, 3), (4, 2, 6), (2,), (2,), (1,), (0,)
    ),
    "two free axes": (
        lambda w, x: jnp.einsum("td,dhk->thk", x, w), (6, 2, 3), (4, 6), (1, 2), (1, 2), (0,), (0,)
    ),
    "convolution": (
        conv(), (3, 3, 2, 4), (2, 5, 5, 2), (1, 2, 3), (0, 1, 3), (0, 1, 2), (0, 1, 2)
    ),
    "strided in groups": (
        conv(window_strides=(2, 1), rhs_dilation=(1, 2), feature_group_count=2),
        (3, 2, 1, 4), (2, 6, 7, 2), (1, 2, 3), (0, 1, 3), (0, 1, 2), (0, 1, 2),
    ),
    "ragged": (ragged, (3, 6, 5), (7, 6), (1,), (2,), (0,), (0,)),
}  # fmt: skip


@pytest.mark.parametrize("name", daily(CASES, ["right", "strided in groups"]))
def test_gradients_are_products_of_rounded_operands(name):
    """By hand: each operand rounded in float64 along the axes that its product sums over, then the
    gradient of the float operation. One alone leaves the other as it is, to the last bit."""
    apply, w_shape, x_shape, *axes = CASES[name]
    w, x = normal(*w_shape, seed=4), normal(*x_shape, seed=1)
    policy = qj.Policy([("k", QuantSpec(format=qj.IntFormat(8), block=(None,) * w.ndim))])
    w_hat = qj.fake_quantize({"k": w}, policy)["k"]
    g = normal(*apply(w, x).shape, seed=2)

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(backward, w, x, g):
        f = lambda p, x: apply(p["k"], x)  # noqa: E731
        y = lambda w, x: intercept(f)(prepare({"k": w}, policy, backward=backward), x)  # noqa: E731
        return jax.vjp(y, w, x)[1](g)

    def gradients(backward):
        return compiled(backward, w, x, g)

    def by_hand(levels, y_axes, w_axes, x_axes):
        g_hat = rounded(g, levels, y_axes).astype(np.float32)
        w_r = rounded(w_hat, levels, w_axes).astype(np.float32) if w_axes else w_hat
        x_r = rounded(x, levels, x_axes).astype(np.float32) if x_axes else x
        return jax.vjp(apply, w_r, x_r)[1](g_hat)

    def close(a, b):  # float32 sums of up to 100 terms, a part of which is rounded otherwise
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    exact = gradients(None)
    close(exact[0], jax.vjp(apply, w_hat, x)[1](g)[0])
    input_y, input_w, weight_y, weight_x = axes
    dw_rounded = by_hand(127, weight_y, None, weight_x)[0]
    dx_rounded = by_hand(7, input_y, input_w, None)[1]

    dw, dx = gradients(Backward(input_gradient=INT4, weight_gradient=INT8))
    close(dw, dw_rounded)
    close(dx, dx_rounded)
    assert np.abs(dw - exact[0]).max() > 1e-3 and np.abs(dx - exact[1]).max() > 1e-2
    dw, dx = gradients(Backward(weight_gradient=INT8))
    np.testing.assert_array_equal(dx, exact[1])
    close(dw, dw_rounded)
    dw, dx = gradients(Backward(input_gradient=INT4))
    np.testing.assert_array_equal(dw, exact[0])
    close(dx, dx_rounded)


def test_one_scale_for_a_whole_operand_and_floats_of_8_bits():
    w, x, g = normal(6, 5), normal(4, 6, seed=1), normal(4, 5, seed=2)
    w_hat = qj.fake_quantize({"k": w}, "w8")["k"]
    tensor = QuantSpec(format=qj.IntFormat(4), block=Granularity.TENSOR)
    floats = QuantSpec(format=formats.e5m2, rounding=qj.Rounding.NEAREST)
    backward = Backward(input_gradient=tensor, weight_gradient=floats)
    y = lambda w, x: intercept(lambda p, x: x @ p["k"])(  # noqa: E731
        prepare({"k": w}, "w8", backward=backward), x
    )
    dw, dx = jax.jit(lambda w, x, g: jax.vjp(y, w, x)[1](g))(w, x, g)
    expected = rounded(g, 7, (0, 1)) @ rounded(w_hat, 7, (0, 1)).T
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5)
    # e5m2 keeps 2 bits behind the point: 1/8 of a value, on either operand.
    bound = (2 / 8 + 1 / 64) * np.abs(x).T @ np.abs(g)
    assert np.all(np.abs(dw - x.T @ g) <= bound) and np.any(dw != x.T @ g)


def mean_and_error(samples):
    """The mean over keys and its standard error, at least what float32 sums lose."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    return samples.mean(0), error + 1e-6


@pytest.mark.parametrize("kind", daily(["dot", "convolution"], ["dot"]))
def test_stochastic_rounding_keeps_the_mean(kind):
    """400 keys on three levels, every entry of both gradients within 4 standard errors (one in
    16,000 entries falls outside, of 72 and 172); nearest rounding is far off."""
    apply, w_shape, x_shape = {
        "dot": (lambda p, x: x @ p["k"], (6, 6), (6, 6)),
        "convolution": (lambda p, x: conv()(p["k"], x), (3, 3, 2, 4), (2, 5, 5, 2)),
    }[kind]
    params, x = {"k": normal(*w_shape)}, normal(*x_shape, seed=1)
    g = normal(*apply(params, x).shape, seed=2) ** 3

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(key, backward):
        run = lambda p, x: intercept(apply)(prepare(p, "w8", backward=backward, key=key), x)  # noqa: E731
        return jax.vjp(run, params, x)[1](g)

    ternary = QuantSpec(format=formats.ternary)
    drawn = dataclasses.replace(ternary, rounding=qj.Rounding.STOCHASTIC)
    noisy = Backward(input_gradient=drawn, weight_gradient=drawn)
    keys = jax.random.split(jax.random.key(0), 400)
    samples = jax.jit(jax.vmap(lambda k: gradients(k, noisy)))(keys)
    exact = gradients(None, None)
    nearest = gradients(None, Backward(input_gradient=ternary, weight_gradient=ternary))
    for many, one, biased in zip(*map(jax.tree.leaves, (samples, exact, nearest)), strict=True):
        mean, error = mean_and_error(many)
        assert np.all(np.abs(mean - one) < 4 * error)
        assert np.abs((biased - one) / error).max() > 10


def test_the_noise_of_the_two_products_and_of_all_leaves_is_its_own():
    params = {"a": normal(6, 6), "b": normal(6, 6)}
    x = normal(4, 6, seed=1)

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(key, backward):
        run = lambda p, x: intercept(lambda p, x: x @ p["a"] + x @ p["b"])(  # noqa: E731
            prepare(p, qj.Policy([("*", "w8")]), backward=backward, key=key), x
        )
        return jax.vjp(run, params, x)[1](normal(4, 6, seed=2))[0]

    key = jax.random.key(0)
    noisy = Backward(weight_gradient=NOISY4)
    one = gradients(key, noisy)
    assert np.any(one["a"] != one["b"])  # equal x and g, so equal gradients but for the noise
    jax.tree.map(np.testing.assert_array_equal, one, gradients(key, noisy))
    jax.tree.map(np.testing.assert_array_equal, one, gradients(jax.random.PRNGKey(0), noisy))
    other = gradients(jax.random.fold_in(key, 1), noisy)
    assert np.any(one["a"] != other["a"])


def test_the_steps_of_a_recurrence_do_not_share_their_noise():
    """Independent errors add up in their squares: the variance of a sum is the sum of variances.
    With the same noise in each of 16 steps it is several times that."""
    params, xs = {"k": normal(4, 3)}, jnp.abs(normal(16, 2, 4, seed=1))
    gs = 1 + jnp.abs(normal(16, 2, 3, seed=2))
    noisy = Backward(weight_gradient=NOISY4)

    def summed(p, weights):
        def step(total, inputs):
            x, g, weight = inputs
            return total + weight * jnp.sum(g * (x @ p["k"])), None

        return lax.scan(step, 0.0, (xs, gs, weights))[0]

    @jax.jit
    def gradient(key, weights):
        run = lambda p: intercept(summed)(  # noqa: E731
            prepare(p, "w8", backward=noisy, key=key), weights
        )
        return jax.grad(run)(params)["k"]

    keys = jax.random.split(jax.random.key(0), 200)
    over_keys = jax.vmap(gradient, (0, None))
    whole = np.asarray(over_keys(keys, jnp.ones(16))).var(0)
    single = jax.vmap(over_keys, (None, 0))(keys, jnp.eye(16))
    parts = np.asarray(single).var(1).sum(0)
    assert np.mean(whole) < 1.5 * np.mean(parts)


def test_layers_recomputed_and_scanned():
    """Through three layers the mean is still that of float gradients, as each layer has a key."""
    params = {"kernel": 0.5 * normal(3, 6, 6)}
    x = normal(4, 6, seed=1)
    step = jax.checkpoint(lambda x, w: (x @ w, None))
    apply = lambda p, x: lax.scan(step, x, p["kernel"])[0]  # noqa: E731
    spec = QuantSpec(format=qj.IntFormat(8), stacked=1)
    policy = qj.Policy([("kernel", spec)])

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(key, backward):
        def loss(p):
            return jnp.sum(
                normal(4, 6, seed=2)
                * intercept(apply)(prepare(p, policy, backward=backward, key=key), x)
            )

        return jax.grad(loss)(params)["kernel"]

    noisy = Backward(input_gradient=NOISY4, weight_gradient=NOISY4)
    keys = jax.random.split(jax.random.key(0), 400)
    mean, error = mean_and_error(jax.jit(jax.vmap(lambda k: gradient(k, noisy)))(keys))
    assert np.all(np.abs(mean - gradient(None, None)) < 4 * error)
    tree = prepare(params, policy, backward=noisy, key=keys[0])
    assert tree["kernel"].key.shape == (3,)
    (site,) = intercept(apply).report(tree, x).sites
    assert site.lowering == "float, fake-quantized; gradients: dX int4, dW int4"


def test_the_highest_precision_keeps_gradients_in_float():
    apply = lambda p, x: jnp.dot(x, p["k"], precision=lax.Precision.HIGHEST)  # noqa: E731
    x = normal(4, 6)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(backward):
        run = lambda p: jnp.sum(intercept(apply)(prepare(p, "w8", backward=backward), x) ** 2)  # noqa: E731
        return jax.grad(run)({"k": normal(6, 5)})["k"]

    rounding = Backward(input_gradient=INT4, weight_gradient=INT4)
    np.testing.assert_array_equal(gradient(rounding), gradient(None))


def test_bfloat16_stays():
    params = {"k": normal(6, 5).astype(jnp.bfloat16)}
    backward = Backward(input_gradient=NOISY8, weight_gradient=NOISY8)

    def run(p, x):
        return intercept(lambda p, x: x @ p["k"])(
            prepare(p, "w8a8", backward=backward, key=jax.random.key(0)), x
        )

    def both(params, x):
        y, pull = jax.vjp(run, params, x)
        return y, pull(jnp.ones_like(y))

    found = jax.eval_shape(both, params, normal(4, 6, seed=1).astype(jnp.bfloat16))
    assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.full
def test_a_network_trains_with_products_of_8_bits_throughout():
    """4-bit weights, 8-bit activations and gradients: the error is that of float gradients."""
    x = normal(128, 6, seed=5)
    y = jnp.tanh(x @ normal(6, 8)) @ normal(8, 3, seed=1)
    apply = intercept(lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"])
    act = QuantSpec(format=qj.IntFormat(8), block=Granularity.ROW)
    policy = qj.Policy([("*/kernel", QuantSpec(format=qj.IntFormat(4), act=act))])
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 300))

    def train(backward):
        params = {
            "a": {"kernel": 0.5 * normal(6, 16, seed=3)},
            "b": {"kernel": 0.5 * normal(16, 3, seed=4)},
        }

        def loss(p, key):
            tree = prepare(p, policy, backward=backward, key=key)
            return jnp.mean((apply(tree, x) - y) ** 2)

        @jax.jit
        def step(params, state, i):
            gradients = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(0), i))
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for i in range(300):
            params, state = step(params, state, i)
        return float(jnp.mean((apply(finalize(prepare(params, policy)), x) - y) ** 2))

    exact, noisy = train(None), train(Backward(input_gradient=NOISY8, weight_gradient=NOISY8))
    assert noisy < 1.3 * exact < 0.1 * float(jnp.var(y))


def test_bad_input():
    params = {"block": {"kernel": normal(6, 5)}}
    with pytest.raises(ValueError, match="block/kernel: stochastic rounding in the backward pass"):
        prepare(params, "w8", backward=Backward(weight_gradient=NOISY8))
    with pytest.raises(TypeError, match="backward"):
        prepare(params, "w8", backward="int8")
    with pytest.raises(ValueError, match="input_gradient must be a QuantSpec or None: 'w8'"):
        Backward(input_gradient="w8")
    for more in (dict(group=4), dict(block=(None, 1)), dict(act=INT8), dict(stacked=1)):
        with pytest.raises(ValueError, match="weight_gradient: operands of a gradient product"):
            Backward(weight_gradient=QuantSpec(format=qj.IntFormat(8), **more))
