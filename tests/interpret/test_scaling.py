"""A model is the same function after channels were scaled, and what can be scaled is found."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from quantjax.interpret.program import Leaf
from quantjax.interpret.scaling import find_scaling, scaled
from quantjax.interpret.unknowns import Scale, Unknowns
from tests.daily import daily

from .models import CASES, filled, normal

RELU = jax.nn.relu


def scales(groups, seed=0):
    """Random scales within a factor of e or so, of any sign where a group takes that."""
    rng = np.random.default_rng(seed)
    out = []
    for group in groups:
        s = np.exp(rng.normal(size=group.channels))
        s *= 1 if group.positive else rng.choice([-1, 1], group.channels)
        out.append((group, jnp.asarray(s, jnp.float32)))
    return out


def same_function(apply, params, x, groups):
    """In two programs, where eager calls would be one for each operation."""
    drawn, apply = scales(groups), jax.jit(apply)
    new = jax.jit(lambda params: scaled(params, drawn))(params)
    for a, b in zip(jax.tree.leaves(apply(params, x)), jax.tree.leaves(apply(new, x)), strict=True):
        # Float32 sums of terms in other proportions, over some layers: a few dozen roundings.
        np.testing.assert_allclose(b, a, rtol=0, atol=3e-6 * float(jnp.abs(a).max()))


GROUPS = {  # of the models of every framework, what is found; none where it is not listed
    "linen CNN": 2, "linen decoder": 6, "linen ViT": 4, "nnx CNN": 1, "nnx transformer": 2,
    "equinox MLP": 2, "equinox CNN": 2, "haiku CNN": 3, "plain experts": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", daily(CASES, ["nnx transformer", "haiku CNN"]))
def test_scaled_models_of_every_framework_are_the_same_functions(name):
    case = CASES[name]()
    found = find_scaling(case.apply, case.params, case.x)
    assert len(found.groups) == GROUPS.get(name, 0)
    if found.groups:
        same_function(case.apply, case.params, case.x, found.groups)


def layer(n, m, seed=0):
    return {"w": normal(n, m, seed=seed), "b": normal(m, seed=seed + 1)}


def attention(p, x):
    """Rotary, grouped queries, values scaled by a gain."""
    q = (x @ p["q"]).reshape(2, 5, 4, 4)
    k, v = ((x @ p[name]).reshape(2, 5, 2, 4) for name in "kv")
    angle = jnp.arange(5)[:, None, None] * jnp.array([1.0, 0.1])

    def turned(y):
        a, b = jnp.split(y, 2, -1)
        c, s = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * c - b * s, a * s + b * c], -1)

    k, v = (jnp.repeat(y, 2, axis=2) for y in (turned(k), v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", turned(q), k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 5, 16) @ p["o"]


def grouped(p, x):
    y = lax.conv_general_dilated(
        x, p["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = lax.conv_general_dilated(
        RELU(y), p["g"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )  # fmt: skip
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.pad(y, ((0, 0), (0, 0), (0, 0), (1, 1)))[:, ::-1].reshape(2, -1) @ p["o"]


def rms(x, g):
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * g


def swiglu(p, x):
    y = rms(x, p["g"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


# (model, parameters, input, {consumer: (power and name of everything else)}). What is missing has a
# reason that is asked for below.
NETS = {
    "bias and relu": (
        lambda p, x: RELU(x @ p["a"]["w"] + p["a"]["b"]) @ p["c"]["w"],
        {"a": layer(3, 4), "c": layer(4, 2)},
        normal(5, 3),
        {"c/w": "a/w- a/b-"},
    ),
    "squared relu": (
        lambda p, x: RELU(x @ p["a"]) ** 2 @ p["c"],
        {"a": normal(3, 4), "c": normal(4, 2)},
        normal(5, 3),
        {"c": "a-"},
    ),
    "two consumers, a residual between": (
        lambda p, x: (RELU(x @ p["a"]) + RELU(x @ p["b"])) @ p["c"],
        {"a": normal(3, 4), "b": normal(3, 4), "c": normal(4, 2)},
        normal(5, 3),
        {"c": "a- b-"},
    ),
    "attention": (
        attention,
        {"q": normal(8, 16), "k": normal(8, 8), "v": normal(8, 8), "o": normal(16, 3)},
        normal(2, 5, 8),
        {"o": "v-"},
    ),
    "grouped convolution": (
        grouped,
        {"a": normal(3, 3, 2, 6), "g": normal(3, 3, 2, 9), "o": normal(2 * 2 * 11, 3)},
        normal(2, 4, 4, 2),
        {"g": "a-", "o": "g-"},
    ),
    "gated": (
        swiglu,
        {"g": normal(4), "gate": normal(4, 6), "up": normal(4, 6), "down": normal(6, 4)},
        normal(5, 4),
        {"gate": "up+ g-", "up": "gate+ g-", "down": "up-"},
    ),
    "norm with a gain, both sides": (
        lambda p, x: RELU((x @ p["a"] - p["m"]) / jnp.sqrt(p["v"] + 1e-3) * p["g"] + p["b"])
        @ p["c"],
        {"a": normal(3, 4), "m": normal(4), "v": normal(4) ** 2, "g": normal(4), "b": normal(4),
         "c": normal(4, 2)},
        normal(5, 3),
        {"c": "g- b-"},
    ),
    "scan over layers": (
        lambda p, x: lax.scan(
            lambda x, w: (x + RELU(x @ w["u"] + w["b"]) @ w["d"], None), x, p["layers"]
        )[0],
        {"layers": {"u": normal(2, 4, 6), "b": normal(2, 6), "d": normal(2, 6, 4)}},
        normal(5, 4),
        {"layers/d/[0]": "layers/u/[0]- layers/b/[0]-"},
    ),
}  # fmt: skip


# Daily a power, a softmax, a convolution, a product of two, a quotient and layers.
@pytest.mark.parametrize(
    "name", daily(NETS, {*NETS} - {"bias and relu", "two consumers, a residual between"})
)
def test_what_can_be_scaled_is_found(name):
    apply, params, x, want = NETS[name]
    found = find_scaling(apply, params, x)
    for consumer, others in want.items():
        path, *layers = consumer.split("/[")
        group = found.group(path, tuple(int(i[:-1]) for i in layers))
        signs = {1.0: "+", -1.0: "-", -0.5: "-"}
        got = {
            factor.leaf.name + signs[factor.power]
            for factor in (*group.consumers, *group.producers)
            if factor.leaf.name != consumer
        }
        assert got == set(others.split())
    same_function(apply, params, x, found.groups)
    assert all(f.power == 1 for group in found.groups for f in group.consumers)


FIXED = {
    "gelu": lambda p, x: jax.nn.gelu(x @ p["a"], approximate=False) @ p["c"],
    "capped": lambda p, x: jax.nn.relu6(x @ p["a"]) @ p["c"],
    "returned": lambda p, x: (x @ p["a"] @ p["c"], x @ p["a"]),
    "meets the input": lambda p, x: (x @ p["a"] + x) @ p["c"],
    "looped": lambda p, x: lax.fori_loop(0, 2, lambda i, y: y * 2, x @ p["a"]) @ p["c"],
    "used twice": lambda p, x: RELU(RELU(x @ p["a"]) @ p["a"]) @ p["a"] @ p["c"].T @ p["c"],
    "chosen": lambda p, x: jnp.where(x @ p["a"] > 1, x @ p["a"], 0) @ p["c"],
}
REASONS = {
    "gelu": "it goes through 'erf",
    "capped": "a scaled and an unscaled value meet in 'min'",
    "returned": "it is the model's output",
    "meets the input": "it is the model's input",
    "looped": "it comes from",
    "used twice": "",
    "chosen": "meet in 'gt'",
}


@pytest.mark.parametrize("name", FIXED)
def test_what_can_not_be_scaled_has_a_reason(name):
    params = {"a": normal(4, 4), "c": normal(4, 4)}
    found = find_scaling(FIXED[name], params, normal(5, 4))
    assert found.group("c") is None and REASONS[name] in found.reason("c")
    assert found.reason("a").startswith("it is the model's input")
    same_function(FIXED[name], params, normal(5, 4), found.groups)


def test_channels_of_a_flattened_image_share_a_scale():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.avg_pool(nn.Conv(3, (3, 3))(x), (2, 2), (2, 2)).reshape(2, -1))

    x = normal(2, 4, 4, 1)
    params = filled(jax.eval_shape(Net().init, jax.random.key(0), x))
    found = find_scaling(Net().apply, params, x)
    (group,) = found.groups
    index = group.index(Leaf("Dense_0/kernel"))[:, 0]
    assert group.channels == 3 and index.tolist() == [*range(3)] * 4
    with pytest.raises(ValueError, match="Conv_0/kernel: no consumer .* Dense_0/kernel"):
        group.index(Leaf("Conv_0/kernel"))


def test_shapes_are_enough_and_dtypes_stay():
    apply, params, x, _ = NETS["bias and relu"]
    abstract = jax.eval_shape(lambda *a: a, params, x)
    (group,) = find_scaling(apply, *abstract).groups
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert len(find_scaling(apply, low, x.astype(jnp.bfloat16)).groups) == 1
    new = jax.eval_shape(group.scaled, low, jnp.ones(4))
    assert {a.dtype.name for a in jax.tree.leaves(new)} == {"bfloat16"}


@pytest.mark.parametrize("seed", range(5))
def test_unknowns_are_those_of_linear_algebra(seed):
    """Random equations a = p b and products a + b = c of logarithms: as many unknowns stay free
    as the rank leaves; a gain is bound where it can be."""
    rng = np.random.default_rng(seed)
    unknowns, n = Unknowns(), 12
    x = unknowns.fresh((n,))
    rows = []
    for _ in range(8):
        i, j, p = rng.integers(n), rng.integers(n), float(rng.choice([1, -1, 2, 0.5]))
        at = [x.map(lambda a, k=k: a[[k]]) for k in (i, j)]
        unknowns.unify(at[0], at[1].to(p), "test")
        row = np.zeros(n + 1)
        row[i] += 1
        row[j] -= p
        rows.append(row)
    gain = unknowns.fresh((1,), gain=True)
    before = x.map(lambda a: a[:1])
    unknowns.times(before, gain, "test")
    solved = [part for y in (x, gain) for part in unknowns.parts(y)]
    free = {int(node) for part in solved for node in part.node.ravel()} - {0}
    assert len(free) == n + 1 - np.linalg.matrix_rank(np.stack(rows))


def test_a_gain_is_bound_once_and_released():
    unknowns = Unknowns()
    a, b, gain = unknowns.fresh((3,)), unknowns.fresh((3,)), unknowns.fresh((3,), gain=True)
    y = unknowns.times(a, gain, "first")
    upper, lower = unknowns.parts(gain)
    np.testing.assert_array_equal(upper.node, y.node)
    np.testing.assert_array_equal((lower.node, lower.power), (a.node, -a.power))
    np.testing.assert_array_equal(unknowns.times(a, gain, "again").node, y.node)
    unknowns.times(b, gain, "another")  # the gain can not take both to a new scale
    assert not unknowns.solved(gain).node.any()
    np.testing.assert_array_equal(unknowns.solved(y).node, unknowns.solved(a).node)
    assert isinstance(unknowns.solved(b), Scale)
