"""After the correction the mean of every output is that of the float network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import ptq

POLICY = qj.Policy([("conv", "w2"), ("dense", "w3"), ("head", "w3")])


def features(p: Any, x: jax.Array) -> jax.Array:
    """A convolution, less a mean of each channel as a normalization has it."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=numbers)
    return y - p["mean"].reshape(1, 1, 1, -1)


def hidden(p: Any, x: jax.Array) -> jax.Array:
    """A product that is reshaped before its bias is added, which serves two places."""
    y = jax.nn.relu(features(p, x)).mean((1, 2)) @ p["dense"]
    return y.reshape(-1, 2, 3) + p["bias"]


def network(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(hidden(p, x)).reshape(-1, 6) @ p["head"]


def variables(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 3, 2, 8), "mean": (8,), "dense": (8, 6), "bias": (3,), "head": (6, 4)}
    fans = {name: np.prod(shape[:-1]) for name, shape in shapes.items()}
    return {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(fans[name]), jnp.float32)
        for name, shape in shapes.items()
    }


def images(seed: int = 0) -> list[jax.Array]:
    x = jax.random.normal(jax.random.key(seed), (48, 5, 5, 2)) + 1
    return [x[:32], x[32:]]


def corrected(params: Any, x: list[jax.Array]) -> tuple[Any, Any]:
    """The network rounded to nearest, before and after the correction, as floats."""
    rounded = qj.quantize(params, POLICY, sites=qj.sites(network, params, x[0]))
    run = ptq.Run(network, [(batch,) for batch in x], params, rounded)
    with pytest.warns(UserWarning, match="^head: no bias of its own follows the product"):
        run = ptq.bias_correction()(run)
    return qj.dequantize(rounded), qj.dequantize(run.tree)


def test_the_means_are_those_of_the_float_network() -> None:
    params, x = variables(), images()
    before, after = corrected(params, x)
    whole = jnp.concatenate(x)
    for function, axes in ((features, (0, 1, 2)), (hidden, (0, 1))):
        mean = function(params, whole).mean(axes)
        # Sums of 48 x 25 values of size 1 in float32, in another order.
        np.testing.assert_allclose(function(after, whole).mean(axes), mean, atol=1e-5)
        assert abs(function(before, whole).mean(axes) - mean).max() > 1e-2
    for name in ("conv", "dense", "head"):
        np.testing.assert_array_equal(after[name], before[name])


def test_brings_the_network_nearer_on_five_seeds() -> None:
    ours = plain = 0.0
    for seed in range(5):
        params, x = variables(seed), images(seed)
        unseen = images(10 + seed)[0]
        target = network(params, unseen)
        before, after = corrected(params, x)
        plain += float(jnp.mean((network(before, unseen) - target) ** 2))
        ours += float(jnp.mean((network(after, unseen) - target) ** 2))
    assert ours < plain


def test_static_scales_that_are_not_found_yet_are_those_of_each_batch() -> None:
    """As a chain has them, before `calibrate` finds those that are left open."""
    params, x = variables(), images()
    biases = []
    for static in (True, False):
        act = qj.QuantSpec(format=qj.IntFormat(4), block=qj.Granularity.TENSOR, static=static)
        policy = qj.Policy([(n, qj.QuantSpec(format=qj.IntFormat(3), act=act)) for n in params
                            if params[n].ndim > 1])  # fmt: skip
        rounded = qj.quantize(params, policy, sites=qj.sites(network, params, x[0]))
        with pytest.warns(UserWarning, match="^head: no bias"):
            run = ptq.bias_correction()(ptq.Run(network, [(b,) for b in x], params, rounded))
        biases.append(run.tree["bias"])
    np.testing.assert_array_equal(*biases)
    assert not np.array_equal(biases[0], params["bias"])


def test_a_bias_that_is_used_twice_is_left() -> None:
    def twice(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ p["a"] + p["bias"]) @ p["b"] + p["bias"]

    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for n in "ab"}
    params["bias"] = jnp.ones(4)
    policy = qj.Policy([("a", "w3"), ("b", "w3")])
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    run = ptq.Run(twice, [(x,)], params, qj.quantize(params, policy))
    with pytest.warns(UserWarning, match="^a, b: no bias"):
        run = ptq.bias_correction()(run)
    np.testing.assert_array_equal(run.tree["bias"], params["bias"])


def test_without_a_quantized_parameter_it_says_so() -> None:
    with pytest.raises(ValueError, match="no parameter is quantized"):
        qj.calibrate(network, variables(), images(), ptq.bias_correction())


def test_nan_is_named() -> None:
    params, x = variables(), images()
    batches = [(x[0],), (x[1].at[0].set(jnp.nan),)]
    rounded = qj.quantize(params, POLICY, sites=qj.sites(network, params, x[0]))
    with pytest.raises(ValueError, match="conv: batch 1: its output holds NaN"):
        ptq.bias_correction()(ptq.Run(network, batches, params, rounded))
