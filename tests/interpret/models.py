"""Models of every framework that people write for JAX, small, for the questions of test_matrix.

To add one, write a function that returns a `Case` and name it in `CASES`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

KEY = jax.random.key(0)


class Case(NamedTuple):
    """A function of (parameters, input), both, and how many of the parameters its products use.

    skips: the questions that make no sense for it, each with the reason."""

    apply: Callable[[Any, Any], Any]
    params: Any
    x: jax.Array
    used: int
    skips: dict[str, str] = {}


def normal(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weights(**shapes: tuple[int, ...]) -> dict[str, dict[str, jax.Array]]:
    """Kernels of plain functions, scaled so that activations stay near one."""
    return {
        name: {"kernel": normal(*shape, seed=seed) / shape[-2] ** 0.5}
        for seed, (name, shape) in enumerate(shapes.items())
    }


TOKENS = {"nan": "the input is token numbers"}


def filled(shapes: Any) -> Any:
    """Parameters of these shapes: kernels that keep activations near one, positive scales and
    variances. Faster than to compile the initializer of every layer."""
    rng = np.random.default_rng(0)

    def one(path: Any, leaf: Any) -> jax.Array:
        x = rng.normal(size=leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5
        if path[-1].key in ("scale", "var"):
            x = 1 + x**2
        return jnp.asarray(x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def linen(model: nn.Module, x: jax.Array, used: int, **skips: str) -> Case:
    return Case(model.apply, filled(jax.eval_shape(model.init, KEY, x)), x, used, skips)


def of_nnx(model: nnx.Module, x: jax.Array, used: int) -> Case:
    graph, state = nnx.split(model)
    return Case(lambda state, x: nnx.merge(graph, state)(x), state, x, used)


def of_haiku(run: Callable[[Any], Any], x: jax.Array, used: int) -> Case:
    model = hk.without_apply_rng(hk.transform(run))
    return Case(model.apply, filled(jax.eval_shape(model.init, KEY, x)), x, used)


def norm() -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(nn.max_pool(x, (2, 2), (2, 2)))
        x = nn.Conv(4, (3, 3), kernel_dilation=2, feature_group_count=2)(nn.silu(x))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, arXiv:1801.04381: expand, filter each channel alone, project."""

    @nn.compact
    def __call__(self, x):
        y = jax.nn.relu6(norm()(nn.Conv(8, (1, 1), use_bias=False)(x)))
        y = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False)(y)
        return x + norm()(nn.Conv(x.shape[-1], (1, 1), use_bias=False)(jax.nn.relu6(norm()(y))))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class Decoder(nn.Module):
    """Layers scanned and recomputed, the embedding tied to the head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(24, 8, name="embed")
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers(name="layers")(embed(tokens), None)
        return embed.attend(x)


class ViT(nn.Module):
    """Dosovitskiy et al. 2020, arXiv:2010.11929: patches, a class token, positions, a block."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=(4, 4), padding="VALID")(x).reshape(x.shape[0], -1, 8)
        token = self.param("class", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 8)), x], 1)
        x = x + self.param("position", nn.initializers.normal(), (1, x.shape[1], 8))
        return nn.Dense(4)(nn.LayerNorm()(Block()(x)[0][:, 0]))


class NNXConv(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


def equinox_mlp() -> Case:
    params, static = eqx.partition(eqx.nn.MLP(6, 3, 16, 2, key=KEY), eqx.is_array)
    return Case(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, normal(4, 6), 3)


def equinox_cnn() -> Case:
    one, two, three = jax.random.split(KEY, 3)
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv1d(3, 8, 3, key=one),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.ConvTranspose1d(8, 4, 2, stride=2, key=two),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(48, 4, key=three),
        ]
    )
    params, static = eqx.partition(net, eqx.is_array)
    return Case(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, normal(4, 3, 8), 3)


def haiku_lstm() -> Case:
    def run(x):
        core = hk.LSTM(8)
        return hk.Linear(3)(hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0])

    return of_haiku(run, normal(4, 2, 6), 2)


def haiku_cnn() -> Case:
    def run(x):
        x = jax.nn.relu(hk.DepthwiseConv2D(2, 3)(hk.Conv2D(8, 3, stride=2)(x)))
        return hk.nets.MLP([16, 4])(x.mean((1, 2)))

    return of_haiku(run, normal(2, 8, 8, 3), 4)


def experts() -> Case:
    """A batched product over experts, a ragged one, and a transposed use."""

    def apply(p, x):
        h = jnp.einsum("td,edf->etf", x, p["up"]["kernel"]).sum(0)
        h = lax.ragged_dot(jax.nn.relu(h), p["down"]["kernel"], jnp.array([3, 0, 5], jnp.int32))
        return h @ p["mix"]["kernel"].T

    params = weights(up=(3, 6, 8), down=(3, 8, 6), mix=(5, 6))
    skips = {"vmap": "JAX maps a ragged product over its first axis alone"}
    return Case(apply, params, normal(8, 6), 3, skips)


def control_flow() -> Case:
    """cond, while and a custom derivative around products."""

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    def apply(p, x):
        y = lax.cond(x[0, 0] > 9, lambda x: -x, lambda x: x @ p["a"]["kernel"], x)
        y = lax.fori_loop(0, 2, lambda i, y: jnp.tanh(y @ p["b"]["kernel"]), y)
        y = double(jax.checkpoint(lambda y: y @ p["d"]["kernel"])(y))
        return lax.while_loop(
            lambda s: s[1] < 2, lambda s: (jnp.tanh(s[0] @ p["c"]["kernel"]), s[1] + 1), (y, 0)
        )[0]

    kernels = dict.fromkeys("abcd", (6, 6))
    skips = {
        "grad": "JAX has no reverse derivative of a while loop",
        "nan": "a branch is chosen by a comparison, which NaN fails; tanh hides infinity",
    }
    return Case(apply, weights(**kernels), normal(4, 6), 4, skips)


def stacked_layers() -> Case:
    """Layers kept in one array and indexed in a Python loop, an activation with its own JVP."""

    @jax.custom_jvp
    def squared(x, w):
        return jax.nn.relu(x @ w) ** 2

    @squared.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return squared(x, w), 2 * jax.nn.relu(x @ w) * (dx @ w + x @ dw)

    def apply(p, x):
        for i in range(3):
            x = x + squared(x, p["up"]["kernel"][i]) @ p["down"]["kernel"][i] / 8
        return x @ lax.dynamic_index_in_dim(p["up"]["kernel"], 0, keepdims=False)

    return Case(apply, weights(up=(3, 6, 8), down=(3, 8, 6)), normal(4, 6), 2)


IMAGES, SEQUENCES = (2, 8, 8, 3), (2, 4, 6)
CASES: dict[str, Callable[[], Case]] = {
    "linen CNN": lambda: linen(CNN(), normal(*IMAGES), 4),
    "linen depthwise block": lambda: linen(InvertedResidual(), normal(2, 6, 6, 4), 3),
    "linen LSTM": lambda: linen(nn.RNN(nn.LSTMCell(8)), normal(*SEQUENCES), 8),
    "linen GRU": lambda: linen(nn.RNN(nn.GRUCell(8)), normal(*SEQUENCES), 6),
    "linen decoder": lambda: linen(Decoder(), jnp.arange(8).reshape(2, 4), 7, **TOKENS),
    "linen ViT": lambda: linen(
        ViT(), normal(*IMAGES), 8, strictly="the class token and the positions meet no product"
    ),
    "nnx CNN": lambda: of_nnx(NNXConv(nnx.Rngs(0)), normal(*IMAGES), 2),
    "nnx transformer": lambda: of_nnx(NNXBlock(nnx.Rngs(0)), normal(2, 4, 8), 6),
    "equinox MLP": equinox_mlp,
    "equinox CNN": equinox_cnn,
    "haiku LSTM": haiku_lstm,
    "haiku CNN": haiku_cnn,
    "plain experts": experts,
    "plain control flow": control_flow,
    "plain stacked layers": stacked_layers,
}
