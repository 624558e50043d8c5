"""Cross-layer equalization: equal ranges on both sides, the same function, better low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.ptq import chain, equalize, fold_batch_norm
from quantjax.ptq.equalize import equalized
from tests.daily import daily

from .test_batch_norm import MODELS, images, linen
from .test_batch_norm import Separable as Net


def mlp(p, x):
    h = jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"])
    return jax.nn.relu(h @ p["b"]["w"]) @ p["c"]["w"]


def weights(seed=0, spread=2.0):
    """Layers whose channels have ranges that differ by a few orders of magnitude."""
    rng = np.random.default_rng(seed)
    p = {"a": {"w": rng.normal(size=(8, 16)), "b": rng.normal(size=16)}}
    p |= {"b": {"w": rng.normal(size=(16, 16))}, "c": {"w": rng.normal(size=(16, 4))}}
    s = np.exp(rng.normal(size=16) * spread)
    p["a"] = {"w": p["a"]["w"] * s, "b": p["a"]["b"] * s}
    p["b"]["w"] /= s[:, None]
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)


def test_ranges_are_equal_and_the_function_stays():
    p, x = weights(), images(32, 8)
    new = equalized(mlp, p, x)
    out, into = jnp.abs(new["a"]["w"]).max(0), jnp.abs(new["b"]["w"]).max(1)
    np.testing.assert_allclose(out, into, rtol=3e-3)  # it stops when scales move by a thousandth
    np.testing.assert_allclose(
        jnp.abs(new["b"]["w"]).max(0), jnp.abs(new["c"]["w"]).max(1), rtol=3e-3
    )
    want = mlp(p, x)
    np.testing.assert_allclose(mlp(new, x), want, atol=1e-5 * float(jnp.abs(want).max()))


def test_one_pair_is_the_closed_form():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 5)), rng.normal(size=(5, 2))
    r1, r2 = np.abs(a).max(0), np.abs(b).max(1)
    s = np.sqrt(r1 / r2)  # eq. 11
    p = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    new = equalized(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], p, images(4, 3))
    np.testing.assert_allclose(new["a"], a / s, rtol=2e-6)
    np.testing.assert_allclose(new["b"], b * s[:, None], rtol=2e-6)


@pytest.mark.parametrize("seed", daily(range(5), [0, 1]))
def test_one_scale_a_matrix_rounds_better_after(seed):
    """The paper's purpose: scales per tensor on channels of unequal ranges."""
    p, x = weights(seed), images(64, 8, seed=seed + 10)
    policy = qj.Policy(
        [("**/w", qj.QuantSpec(format=qj.IntFormat(6), block=qj.Granularity.TENSOR))]
    )
    want = mlp(p, x)

    def error(tree):
        return float(jnp.mean((mlp(qj.fake_quantize(tree, policy), x) - want) ** 2))

    assert error(equalized(mlp, p, x)) < error(p) / 2


@pytest.mark.parametrize("name", ["linen"])
def test_folded_networks_stay_the_same_functions(name):
    apply, params, x = MODELS[name][0]()
    new = qj.calibrate(apply, params, [x], chain(fold_batch_norm(), equalize()))
    got, want = jax.jit(apply)(new, x), jax.jit(apply)(params, x)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
    moved = [not bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (params, new)))]  # noqa: B905
    assert any(moved)


def test_a_dead_channel_stays_and_no_pair_warns():
    p, x = weights(), images(4, 8)
    p["b"]["w"] = p["b"]["w"].at[3].set(0)
    new = equalized(mlp, p, x)
    assert bool(jnp.isfinite(mlp(new, x)).all())
    np.testing.assert_array_equal(new["a"]["w"][:, 3], p["a"]["w"][:, 3])
    with pytest.warns(UserWarning, match="no two layers share channels .* model's input"):
        equalized(lambda p, x: x @ p["a"], {"a": jnp.ones((8, 2))}, x)


def test_quantized_leaves_are_refused():
    apply, params, x = linen(Net(), images(2, 8, 8, 3))
    with pytest.raises(ValueError, match="equalize: .*kernel is quantized already"):
        qj.calibrate(apply, qj.quantize(params, "w8"), [x], equalize())
