"""Do the trees of each framework go in and come out as they are, with paths that read alike?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from tests.daily import daily

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
# Half a step of the largest of 8-bit codes is 0.4 %; a network of three layers adds up to a few.
CLOSE = 0.05


def is_q(x) -> bool:
    return isinstance(x, qj.QTensor)


def quantized(tree) -> set[str]:
    return {name for name, r in qj.preset("w8").resolve(tree).items() if r.spec is not None}


def check_round_trip(apply, params) -> None:
    """Quantized, faked, jitted: same structure, nearby outputs, the same numbers."""
    apply = jax.jit(apply)
    q = qj.quantize(params, "w8")
    bare = jax.tree.map(lambda _: 0, q, is_leaf=is_q)
    assert jax.tree.structure(bare) == jax.tree.structure(jax.tree.map(lambda _: 0, params))
    back = qj.dequantize(q)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    y, reference = apply(back), apply(params)
    assert float(jnp.abs(y - reference).max()) <= CLOSE * float(jnp.abs(reference).max())
    assert bool((y != reference).any())
    faked = qj.fake_quantize(params, "w8")
    assert jax.tree.structure(faked) == jax.tree.structure(params)
    np.testing.assert_array_equal(apply(faked), y)
    jax.jit(qj.quantize, static_argnums=1)(jax.tree.map(lambda x: x, params), "w8")
    assert sum(map(is_q, jax.tree.leaves(q, is_leaf=is_q))) == len(quantized(params))


LINEN_NAMES = {"Conv_0/kernel", "Dense_0/kernel", "Dense_1/kernel"}


@pytest.fixture(scope="module")
def linen():
    """A network with a partitioned kernel, batch statistics and a cache of its own."""
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            x = nn.BatchNorm(use_running_average=True)(x)
            boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            x = nn.relu(nn.Dense(16, kernel_init=boxed)(x.mean((1, 2))))
            return nn.Dense(10)(x)

    net = Net()
    return nn, net, jax.jit(net.init)(jax.random.key(0), X)


def test_linen_variables(linen):
    nn, net, variables = linen
    assert quantized(variables) == LINEN_NAMES
    assert quantized(variables["params"]) == LINEN_NAMES  # `params` in the path or not
    check_round_trip(lambda v: net.apply(v, X), variables)


def test_linen_boxes_keep_their_metadata(linen):
    nn, _, variables = linen
    q = qj.quantize(variables, "w4")
    box = q["params"]["Dense_0"]["kernel"]
    assert isinstance(box, nn.Partitioned) and box.names == (None, "model")
    assert is_q(box.value) and box.value.shape == (8, 16)
    back = qj.dequantize(q)["params"]["Dense_0"]["kernel"]
    assert isinstance(back, nn.Partitioned) and back.names == (None, "model")
    assert (
        q["batch_stats"]["BatchNorm_0"]["mean"] is variables["batch_stats"]["BatchNorm_0"]["mean"]
    )
    spared = qj.preset("w8").resolve(variables)["batch_stats/BatchNorm_0/var"]
    assert spared.reason == "collection batch_stats, not params"
    by_rule = qj.Policy([("Dense_0/kernel", "w4"), ("**", None)])  # no `value` in the pattern
    assert is_q(qj.quantize(variables, by_rule)["params"]["Dense_0"]["kernel"].value)


def test_linen_frozen_dicts(linen):
    flax = pytest.importorskip("flax")
    _, net, variables = linen
    frozen = flax.core.freeze(variables)
    assert quantized(frozen) == LINEN_NAMES
    assert isinstance(qj.quantize(frozen, "w8"), flax.core.FrozenDict)
    check_round_trip(lambda v: net.apply(v, X), frozen)


def test_linen_scanned_layers_are_kept_apart_by_stacked():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(8)(x), None

    layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = jax.jit(layers.init)(jax.random.key(0), jnp.ones((2, 8)), None)
    resolution = qj.preset("w8").resolve(variables)["Dense_0/kernel"]
    assert "axes assumed" in resolution.reason  # a rank-3 kernel might be anything
    spec = qj.QuantSpec(format=qj.IntFormat(8), stacked=1)
    q = qj.quantize(variables, qj.Policy([("**/kernel", spec)]))
    assert q["params"]["Dense_0"]["kernel"].scale.shape == (3, 1, 8)
    y, _ = layers.apply(qj.dequantize(q), jnp.ones((2, 8)), None)
    reference, _ = layers.apply(variables, jnp.ones((2, 8)), None)
    assert float(jnp.abs(y - reference).max()) <= CLOSE * float(jnp.abs(reference).max())


def test_nnx_state():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.dense = nnx.Linear(8, 10, rngs=rngs)
            self.drop = nnx.Dropout(0.1, deterministic=True, rngs=rngs)  # keys and counters

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
            return self.drop(self.dense(x))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    assert quantized(state) == {"conv/kernel", "dense/kernel"}  # as Linen's would read
    q = qj.quantize(state, "w8")
    assert isinstance(q, nnx.State)
    named = jax.tree_util.tree_leaves_with_path(q, is_leaf=is_q)
    assert sum(is_q(leaf) for _, leaf in named) == 2
    reasons = {r.reason for _, r in qj.preset("w8").resolve(state).items() if r.spec is None}
    assert any("key<fry>" in reason for reason in reasons)
    model = nnx.merge(graph, qj.dequantize(q))
    reference = nnx.merge(graph, state)(X)
    assert float(jnp.abs(model(X) - reference).max()) <= CLOSE * float(jnp.abs(reference).max())
    faked = nnx.merge(graph, qj.fake_quantize(state, "w8"))
    np.testing.assert_array_equal(faked(X), model(X))
    assert jax.tree.structure(qj.dequantize(q)) == jax.tree.structure(state)
    params = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    assert quantized(params) == {"conv/kernel", "dense/kernel"}


def test_equinox_module():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(12, 5, 16, 2, key=jax.random.key(0))
    assert quantized(net) == {"layers/0/weight", "layers/1/weight", "layers/2/weight"}
    assert qj.preset("w8").resolve(net)["activation"].reason == "not an array"
    q = qj.quantize(net, "w8")
    assert type(q) is type(net) and q.layers[0].weight.scale.shape == (16, 1)  # output first
    assert q.layers[0].bias is net.layers[0].bias and q.activation is net.activation
    x = jnp.linspace(-1, 1, 12)
    y, reference = qj.dequantize(q)(x), net(x)
    assert float(jnp.abs(y - reference).max()) <= CLOSE * float(jnp.abs(reference).max())
    np.testing.assert_array_equal(qj.fake_quantize(net, "w8")(x), y)
    embedding = eqx.nn.Embedding(20, 4, key=jax.random.key(0))
    assert qj.quantize(embedding, "w8").weight.scale.shape == (20, 1)  # one scale per row


def test_haiku_params():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(8, 3)(x)).mean((1, 2))
        return hk.nets.MLP([16, 10])(x)

    net = hk.without_apply_rng(hk.transform(forward))
    params = jax.jit(net.init)(jax.random.key(0), X)
    assert quantized(params) == {"conv2_d/w", "mlp/~/linear_0/w", "mlp/~/linear_1/w"}
    check_round_trip(lambda p: net.apply(p, X), params)
    q = qj.quantize(params, qj.Policy([("mlp/**/w", "w4")]))
    assert {k for k, v in q.items() if is_q(v["w"])} == {"mlp/~/linear_0", "mlp/~/linear_1"}


@pytest.mark.parametrize("make", daily([dict, list, tuple], [dict, list]))
def test_plain_containers(make):
    a, b = X[0, 0], X[0, 1]
    params = {"x": a, "w": b} if make is dict else make([a, b, jnp.ones(3)])
    q = qj.quantize(params, "w8")
    assert type(q) is type(params)
    names = {"x", "w"} if make is dict else {"0", "1"}
    assert quantized(params) == names
    resolved = qj.preset("w8").resolve(params)
    assert all(("axes assumed" in resolved[n].reason) == (n != "w") for n in names)
    jax.tree.map(np.testing.assert_array_equal, qj.dequantize(q), qj.fake_quantize(params, "w8"))
    nested = {"params": [{"w": a}, (b,)], "cache": {"w": a}}
    assert quantized(nested) == {"0/w", "1/0"}


def test_named_tuples_and_registered_dataclasses():
    import dataclasses
    from typing import NamedTuple

    class Layer(NamedTuple):
        w: jax.Array
        b: jax.Array

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Net:
        first: Layer
        value: jax.Array

    net = Net(Layer(X[0, 0], X[0, 0, 0]), X[0, 1])
    assert quantized(net) == {"first/w", "value"}
    assert quantized({"net": net}) == {"net/first/w", "net"}  # a field `value` reads as a box's
    q = qj.quantize(net, "w8")
    assert isinstance(q, Net) and is_q(q.first.w) and q.first.b is net.first.b
    assert isinstance(qj.dequantize(q).first, Layer)
