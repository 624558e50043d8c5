"""Does an unmodified model run on quantized parameters, whatever it was written with?

One table of models, the same questions to each."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import quantjax as qj
from quantjax.interpret import intercept, sites


class Case(NamedTuple):
    """A function of (parameters, input), both, and the parameters that its products use."""

    apply: Any
    params: Any
    x: Any
    used: int


def image() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, strides=2)(x)  # depthwise
        x = nn.ConvTranspose(4, (2, 2))(nn.silu(x))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))), None


class Decoder(nn.Module):
    """Layers scanned and recomputed, the embedding tied to the head."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(30, 16, name="embed")
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = layers(name="layers")(embed(tokens), None)
        return embed.attend(x)


def linen(model: nn.Module, x: jax.Array, used: int) -> Case:
    return Case(model.apply, model.init(jax.random.key(0), x), x, used)


def nnx_cnn() -> Case:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.head = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return Case(lambda s, x: nnx.merge(graph, s)(x), state, image(), 2)


def equinox_mlp() -> Case:
    model = eqx.nn.MLP(6, 3, 16, 2, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 6))
    params, static = eqx.partition(model, eqx.is_array)
    return Case(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x, 3)


def haiku_lstm() -> Case:
    def run(x):
        core = hk.LSTM(8)
        return hk.Linear(3)(hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0])

    model = hk.without_apply_rng(hk.transform(run))
    x = jax.random.normal(jax.random.key(1), (5, 2, 6))
    return Case(model.apply, model.init(jax.random.key(0), x), x, 2)


def experts() -> Case:
    """Plain functions: a batched product over experts, a ragged one, and a transposed use."""

    def apply(p, x):
        h = jnp.einsum("td,edf->etf", x, p["up"]["kernel"]).sum(0)
        h = lax.ragged_dot(jax.nn.relu(h), p["down"]["kernel"], jnp.array([3, 0, 5], jnp.int32))
        return h @ p["mix"]["kernel"].T

    shapes = {"up": (3, 6, 8), "down": (3, 8, 6), "mix": (5, 6)}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return Case(apply, params, jax.random.normal(jax.random.key(1), (8, 6)), 3)


def control_flow() -> Case:
    """cond, while and a custom derivative around products."""

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    def apply(p, x):
        y = lax.cond(x.sum() > 0, lambda x: x @ p["a"]["kernel"], lambda x: -x, x)
        y = lax.fori_loop(0, 2, lambda i, y: jnp.tanh(y @ p["b"]["kernel"]), y)
        y, _ = lax.while_loop(
            lambda s: s[1] < 2, lambda s: (jnp.tanh(s[0] @ p["c"]["kernel"]), s[1] + 1), (y, 0)
        )
        return double(jax.checkpoint(lambda y: y @ p["d"]["kernel"])(y))

    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        n: {"kernel": jax.random.normal(k, (6, 6))} for n, k in zip("abcd", keys, strict=True)
    }
    return Case(apply, params, jax.random.normal(jax.random.key(1), (4, 6)), 4)


CASES = {
    "linen CNN": lambda: linen(CNN(), image(), 4),
    "linen decoder": lambda: linen(Decoder(), jnp.arange(10).reshape(2, 5), 7),
    "linen GRU": lambda: linen(nn.RNN(nn.GRUCell(8)), jnp.ones((2, 5, 6)), 6),
    "nnx CNN": nnx_cnn,
    "equinox MLP": equinox_mlp,
    "haiku LSTM": haiku_lstm,
    "plain experts": experts,
    "plain control flow": control_flow,
}


@pytest.fixture(params=CASES, scope="module")
def case(request) -> Case:
    return CASES[request.param]()


def test_float_parameters_give_what_the_function_gives(case):
    got = jax.jit(intercept(case.apply))(case.params, case.x)
    expected = jax.jit(case.apply)(case.params, case.x)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("preset", ["w8", "w4g4", "w3", "nf4"])
def test_weights_alone_give_what_dequantized_ones_give(case, preset):
    q = qj.quantize(case.params, preset)
    got = jax.jit(intercept(case.apply))(q, case.x)
    expected = jax.jit(case.apply)(qj.dequantize(q), case.x)
    # The same float products on the same values; XLA may sum in another order when it fuses.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)  # noqa: E731
    jax.tree.map(close, got, expected)


def test_activations_of_8_bits_are_close(case):
    if not jnp.issubdtype(case.x.dtype, jnp.floating) and "embed" not in str(case.params):
        pytest.skip("no float input")
    q = qj.quantize(case.params, "w8a8")
    got, expected = intercept(case.apply)(q, case.x), case.apply(case.params, case.x)

    def near(a, b):
        # Weights and activations each round by half of 1/127 of a maximum, some 1 % of a normal
        # row; a few layers add up.
        assert float(jnp.linalg.norm(a - b)) <= 0.05 * float(jnp.linalg.norm(b))

    jax.tree.map(near, got, expected)


def test_nothing_quantized_becomes_float_before_its_product(case):
    q = qj.quantize(case.params, "w8")
    report = intercept(case.apply, strict=True).report(q, case.x)
    assert not [r for r in report.remarks if r.path]


def test_sites_are_found_with_abstract_parameters_too(case):
    found = sites(case.apply, case.params, case.x)
    assert len({s.path for s in found}) == case.used
    shapes = jax.eval_shape(lambda p: p, case.params)
    assert sites(case.apply, shapes, case.x) == found
    for s in found:
        axes = (*s.contracting, *s.batch, *s.output)
        assert sorted(axes) == list(range(len(s.param_shape)))


def test_the_report_names_every_parameter(case):
    report = intercept(case.apply).report(qj.quantize(case.params, "w8"), case.x)
    names = [row.path for row in qj.summary(case.params).rows if row.shape is not None]
    text = str(report).replace("\n  ", " ")
    assert names and all(name in text for name in names)


def test_compiles_once(case):
    calls = 0

    def counted(p, *args):
        nonlocal calls
        calls += 1
        return case.apply(p, *args)

    run = jax.jit(intercept(counted))
    q = qj.quantize(case.params, "w8")
    for _ in range(2):
        run(q, case.x)
    assert calls == 1
