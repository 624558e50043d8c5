"""Folding batch norms changes parameters, not the function; in any framework."""

import warnings

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from experiments.resnet import ResNet
from quantjax.interpret.norms import find_norms
from quantjax.interpret.scaling import solve
from quantjax.paths import named_leaves
from quantjax.ptq import fold_batch_norm
from quantjax.ptq.batch_norm import fold
from tests.daily import daily
from tests.interpret.models import CASES

KEY = jax.random.key(0)


def drawn(shapes, seed=0):
    """Kernels that keep activations near one; positive variances; gains of both signs."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.ones(leaf.shape, leaf.dtype)
        x = rng.normal(size=leaf.shape)
        if "var" in jax.tree_util.keystr(path):
            x = 0.5 + x**2
        elif leaf.ndim > 1 and max(leaf.shape[:-1]) > 1:
            x /= np.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def linen(model, x):
    params = drawn(jax.eval_shape(model.init, KEY, x))
    return model.apply, params, x


class Separable(nn.Module):
    """Norms after a plain, a depthwise and a transposed convolution and a dense layer."""

    @nn.compact
    def __call__(self, x):
        def norm(y):
            return nn.relu(nn.BatchNorm(use_running_average=True)(y))

        x = norm(nn.Conv(6, (3, 3))(x))
        x = norm(nn.Conv(12, (3, 3), feature_group_count=6, use_bias=False)(x))
        x = norm(nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x))
        return nn.Dense(3)(norm(nn.Dense(8)(x.mean((1, 2)))))


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(3, 8, 3, key=key)
        self.norm = eqx.nn.BatchNorm(8, "batch", mode="batch")
        self.head = eqx.nn.Linear(8, 4, key=key)

    def __call__(self, x, state):
        y, state = self.norm(self.conv(x), state)
        return self.head(jax.nn.relu(y).mean((1, 2))), state


def equinox():
    model, state = eqx.nn.make_with_state(Equinox)(KEY)
    arrays, static = eqx.partition((eqx.nn.inference_mode(model), state), eqx.is_array)
    _, params, x = arrays, drawn(arrays), images(2, 3, 8, 8)
    params = jax.tree.map(lambda a: jnp.abs(a) if jnp.ndim(a) == 1 else a, params)  # variances

    def apply(params, x):
        model, state = eqx.combine(params, static)
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return run(x, state)[0]

    return apply, params, x


def haiku():
    def run(x, train):
        y = hk.BatchNorm(True, True, 0.9)(hk.Conv2D(8, 3)(x), train)
        return hk.Linear(4)(jax.nn.relu(y).mean((1, 2)))

    model, x = hk.without_apply_rng(hk.transform_with_state(run)), images(2, 8, 8, 3)
    params = drawn(jax.eval_shape(lambda: model.init(KEY, x, True)))
    return lambda p, x: model.apply(*p, x, False)[0], params, x


def images(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def nnx():
    case = CASES["nnx CNN"]()
    return case.apply, drawn(case.params), case.x


def by_hand(shift):
    """A multiplier and a shift that are computed first."""

    def apply(p, x):
        k = p["gain"] * lax.rsqrt(p["var"] + 1e-5)
        return jax.nn.relu(x @ p["w"] * k + shift(p, k)) @ p["head"]

    shapes = {"w": (5, 6), "gain": (6,), "var": (6,), "mean": (6,), "b": (6,), "head": (6, 2)}
    avals = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return apply, drawn(avals), images(4, 5)


# (apply, parameters, input), and how many products are changed
MODELS = {
    "linen": (lambda: linen(Separable(), images(2, 8, 8, 3)), 4),
    "resnet": (lambda: linen(ResNet(blocks=1), images(2, 16, 16, 3)), 7),
    "nnx": (nnx, 1),
    "equinox": (equinox, 1),
    "haiku": (haiku, 1),
    "by hand": (lambda: by_hand(lambda p, k: p["b"] - p["mean"] * k), 1),
    "by hand, turned": (lambda: by_hand(lambda p, k: p["b"] - k * p["mean"]), 1),
}


@pytest.fixture(scope="module", params=daily(MODELS, ["linen", "equinox"]))
def folded(request):
    make, count = MODELS[request.param]
    apply, params, x = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return apply, params, fold(apply, params, x), x, count


def test_the_function_stays(folded):
    apply, params, new, x, _ = folded
    got, want = jax.jit(apply)(new, x), jax.jit(apply)(params, x)
    # Every layer rounds a few times more; float32, seven layers.
    np.testing.assert_allclose(got, want, atol=3e-6 * float(jnp.abs(want).max()))


def test_weights_take_the_factor_and_norms_only_shift(folded):
    apply, params, new, x, count = folded
    before, after = dict(named_leaves(params)[0]), dict(named_leaves(new)[0])
    changed = [name for name, a in before.items() if not jnp.array_equal(a, after[name])]
    assert sum(np.squeeze(before[name]).ndim > 1 for name in changed) == count
    # Folded once, every multiplier is one: folding again changes nothing but by rounding.
    again = dict(named_leaves(fold(apply, new, x))[0])
    for name, a in after.items():
        np.testing.assert_allclose(again[name], a, rtol=1e-5)


def test_the_factor_is_gain_over_deviation():
    apply, p, x = by_hand(lambda p, k: p["b"] - p["mean"] * k)
    new = fold(apply, p, x)
    a = np.float64(p["gain"]) / np.sqrt(np.float64(p["var"]) + 1e-5)
    np.testing.assert_allclose(new["w"], p["w"] * a, rtol=1e-6)
    np.testing.assert_allclose(new["mean"], p["mean"] * a, rtol=1e-6)
    np.testing.assert_array_equal(new["b"], p["b"])


def plain(norm):
    shapes = {"w": (5, 6), "gain": (6,), "var": (6,), "mean": (6,), "b": (6,), "head": (6, 2)}
    avals = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return lambda p, x: jax.nn.relu(norm(p, x @ p["w"])) @ p["head"], drawn(avals), images(4, 5)


LEFT = {
    "no gain": (lambda p, y: (y - p["mean"]) * lax.rsqrt(p["var"] + 1e-5), "no gain"),
    "used besides": (
        lambda p, y: (y - p["mean"]) * (p["gain"] * lax.rsqrt(p["var"] + 1e-5)) + jnp.tanh(y),
        None,  # its product's output goes two ways: no norm
    ),
    "relu before": (
        lambda p, y: (jax.nn.relu(y) - p["mean"]) * (p["gain"] * lax.rsqrt(p["var"] + 1e-5)),
        None,
    ),
    "gain shifted": (lambda p, y: (y - p["mean"]) * (1 + p["gain"]), "keeps its scale|no gain"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_norm_that_can_not_be_folded_is_left_with_a_reason(name):
    norm, reason = LEFT[name]
    apply, p, x = plain(norm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new = fold(apply, p, x)
    assert all(a is b or jnp.array_equal(a, b) for a, b in zip(p.values(), new.values()))  # noqa: B905
    if reason is not None:
        with pytest.warns(UserWarning, match=f"not folded: .*({reason})"):
            fold(apply, p, x)
    else:
        assert not caught


@pytest.mark.parametrize("number", [1.0, 2.0])
def test_a_number_in_the_model_is_not_taken_for_a_value(number):
    """Values are numbered as well: 1 is the product's."""
    apply, p, x = plain(
        lambda p, y: (number * y - p["mean"]) * p["gain"] * lax.rsqrt(p["var"] + 1e-5)
    )
    _, norms = find_norms(solve(apply, (p, x)))
    assert [norm.name for norm in norms] == ["gain"]


def test_weights_that_another_product_reads_are_not_folded():
    _, p, x = by_hand(lambda p, k: p["b"] - p["mean"] * k)

    def apply(p, x):
        y = (x @ p["w"] - p["mean"]) * (p["gain"] * lax.rsqrt(p["var"] + 1e-5))
        return jax.nn.relu(y) @ p["head"] + (x @ p["w"]) @ p["other"]

    p["other"] = p["head"] + 1
    with pytest.warns(UserWarning, match="gain: not folded: .* other products as well: other"):
        new = fold(apply, p, x)
    np.testing.assert_array_equal(new["w"], p["w"])


def test_a_channel_without_gain_stays():
    apply, p, x = plain(
        lambda p, y: (y - p["mean"]) * (p["gain"] * lax.rsqrt(p["var"] + 1e-5)) + p["b"]
    )
    p["gain"] = p["gain"].at[2].set(0)
    with pytest.warns(UserWarning, match=r"gain: channels \[2\] are not folded"):
        new = fold(apply, p, x)
    np.testing.assert_array_equal(new["w"][:, 2], p["w"][:, 2])
    np.testing.assert_allclose(apply(new, x), apply(p, x), rtol=1e-5, atol=1e-5)


def test_the_method_folds_both_trees():
    apply, params, x = linen(Separable(), images(2, 8, 8, 3))
    got = qj.calibrate(apply, params, [x], fold_batch_norm())
    jax.tree.map(np.testing.assert_array_equal, got, fold(apply, params, x))
    with pytest.raises(ValueError, match="fold_batch_norm: .*kernel is quantized already"):
        qj.calibrate(apply, qj.quantize(params, "w8"), [x], fold_batch_norm())
