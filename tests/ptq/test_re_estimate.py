"""Statistics of batch norms, estimated again: they are those that the quantized network has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.interpret.method import Run
from quantjax.ptq import chain, fold_batch_norm, re_estimate_batch_norm
from quantjax.ptq.batch_norm import fold
from tests.daily import daily, dealt

from .test_batch_norm import by_hand, images


def two(p, x):
    """Two norms, the second after the first; by hand."""
    for q in p["layers"]:
        y = x @ q["w"]
        x = jax.nn.relu((y - q["mean"]) / jnp.sqrt(q["var"] + 1e-5) * q["gain"] + q["b"])
    return x @ p["head"]


def network(seed=0, width=12):
    """A network whose statistics are those of its own activations on X."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x = X = normal(256, 6)
    layers = []
    for n in (6, width):
        q = {"w": normal(n, width), "gain": 1 + 0.3 * normal(width), "b": normal(width)}
        y = x @ q["w"]
        q |= {"mean": y.mean(0), "var": y.var(0)}
        layers.append(q)
        x = jax.nn.relu((y - q["mean"]) / jnp.sqrt(q["var"] + 1e-5) * q["gain"] + q["b"])
    return {"layers": layers, "head": normal(width, 3)}, X


def quantized(params, bits=2):
    spec = qj.QuantSpec(format=qj.IntFormat(bits))
    return qj.quantize(params, qj.Policy([("**/w", spec)]))


@dataclasses.dataclass(frozen=True)
class Rounding:
    bits: int = 2

    def __call__(self, run):
        return dataclasses.replace(run, tree=quantized(run.tree, self.bits))


def test_mean_and_variance_are_those_of_the_quantized_network():
    params, x = network()
    method = chain(Rounding(), re_estimate_batch_norm())
    got = qj.calibrate(two, params, [x[:100], x[100:]], method)
    h = np.float64(x)
    for q in qj.dequantize(got)["layers"]:
        y = h @ np.float64(q["w"])
        np.testing.assert_allclose(q["mean"], y.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(q["var"], y.var(0), rtol=1e-4)
        z = (y - np.float64(q["mean"])) / np.sqrt(np.float64(q["var"]) + 1e-5)
        h = np.maximum(z * np.float64(q["gain"]) + np.float64(q["b"]), 0)
    for a, b in zip(got["layers"], params["layers"], strict=True):
        np.testing.assert_array_equal(a["gain"], b["gain"])


def test_a_folded_norm_gives_the_mean_and_deviation_of_the_float_network():
    params, x = network()
    x = x[:100] + 0.5  # other inputs than those of the float network's statistics
    got = qj.calibrate(
        two, params, [x], chain(fold_batch_norm(), Rounding(), re_estimate_batch_norm())
    )
    floats = qj.calibrate(two, params, [x], fold_batch_norm())

    def outputs(tree):
        h, out = np.float64(x), []
        for q in jax.tree.map(np.float64, qj.dequantize(tree))["layers"]:
            out.append((h @ q["w"] - q["mean"]) / np.sqrt(q["var"] + 1e-5) * q["gain"] + q["b"])
            h = np.maximum(out[-1], 0)
        return out

    for a, b in zip(outputs(got), outputs(floats), strict=True):
        np.testing.assert_allclose(a.mean(0), b.mean(0), atol=2e-4)
        np.testing.assert_allclose(a.std(0), b.std(0), rtol=1e-3)


def test_static_scales_that_are_not_found_yet_are_those_of_each_batch():
    params, x = network()
    means = []
    for static in (True, False):
        act = qj.QuantSpec(format=qj.IntFormat(4), block=qj.Granularity.TENSOR, static=static)
        policy = qj.Policy([("**/w", qj.QuantSpec(format=qj.IntFormat(3), act=act))])
        run = Run(two, [(x,)], params, qj.quantize(params, policy))
        means.append(re_estimate_batch_norm()(run).tree["layers"][1]["mean"])
    np.testing.assert_array_equal(*means)
    assert not np.array_equal(means[0], params["layers"][1]["mean"])


def test_unquantized_networks_keep_their_statistics():
    params, x = network()
    got = qj.calibrate(two, params, [x], re_estimate_batch_norm())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, params)
    folded = fold(two, params, x)
    got = qj.calibrate(two, folded, [x], re_estimate_batch_norm())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, folded)


@pytest.mark.parametrize("seed, folded", dealt(daily(range(5), [0, 1]), [False, True]))
def test_the_output_is_nearer_to_that_of_the_float_network(seed, folded):
    params, x = network(seed)
    first = (fold_batch_norm(),) if folded else ()
    want = two(params, x)

    def error(*more):
        got = qj.calibrate(two, params, [x], chain(*first, Rounding(2), *more))
        return float(jnp.mean((two(qj.dequantize(got), x) - want) ** 2))

    assert error(re_estimate_batch_norm()) < error()


def test_norms_without_a_mean_of_their_own_are_named():
    apply, p, x = by_hand(lambda p, k: p["b"] - p["mean"] * k)
    with pytest.warns(UserWarning, match="gain: not estimated again: its mean"):
        run = re_estimate_batch_norm()(Run(apply, [(x,)], p, p))
    assert run.tree is p


def test_nan_is_an_error_that_names_the_norm_and_the_batch():
    params, x = network()
    with pytest.raises(ValueError, match="layers/0/gain: batch 1: its input holds NaN"):
        qj.calibrate(two, params, [x, x.at[0, 0].set(jnp.nan)], re_estimate_batch_norm())


def test_convolutions_of_a_framework():
    from .test_batch_norm import Separable, linen

    apply, params, x = linen(Separable(), images(8, 8, 8, 3))
    got = qj.calibrate(apply, params, [x], re_estimate_batch_norm())
    want = apply(params, x, capture_intermediates=True, mutable=["intermediates"])
    y = want[1]["intermediates"]["Conv_0"]["__call__"][0]
    mean, var = (got["batch_stats"]["BatchNorm_0"][name] for name in ("mean", "var"))
    np.testing.assert_allclose(mean, y.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(var, y.var((0, 1, 2)), rtol=1e-4)
