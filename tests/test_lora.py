"""Are adapters over a frozen quantized tree trained by the gradient of what the tree stands for?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import lora
from quantjax.interpret import intercept, sites
from quantjax.paths import named_leaves
from quantjax.qat import guard
from tests.counted import Counted
from tests.daily import daily, dealt
from tests.interpret.models import CASES, normal
from tests.interpret.test_beside import PRODUCTS

INT8 = qj.QuantSpec(format=qj.IntFormat(8))
INT4 = qj.QuantSpec(format=qj.IntFormat(4))
SPECS = {
    "nf4": qj.QuantSpec(format=qj.formats.nf4),
    "int4": INT4,
    "int4, int8 activations": dataclasses.replace(INT4, act=INT8),
}


def started(adapters, seed=0):
    """The same with both factors away from zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), adapters)


def dense(qparams, adapters):
    """What the tree stands for, by the definition: D(q) + scale * sum_r a b, element by element."""
    named, structure = named_leaves(qj.dequantize(qparams))

    def add(name, w):
        if name not in adapters:
            return w
        adapter = adapters[name]
        return w + adapter.scale * (adapter.a * adapter.b).sum(-1)

    return jax.tree.unflatten(structure, [add(name, w) for name, w in named])


def gradients(function, adapters, like):
    """Of the mean of the outputs with fixed weights, which asks the same of rounded products."""
    weights = jax.tree.map(lambda y: normal(*y.shape, seed=9) / y.size, like)

    def loss(adapters):
        products = jax.tree.map(lambda y, c: jnp.sum(y * c), function(adapters), weights)
        return sum(jax.tree.leaves(products))

    return jax.jit(jax.grad(loss))(adapters)


def close(got, expected, tolerance=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "name, form", dealt(daily(PRODUCTS, ["shared", "experts"]), daily(SPECS, [*SPECS][::2]))
)
def test_gradients_through_every_product(name, form):
    """Those of the float product of what the leaf stands for: the term takes the activation as it
    is, so with a loss that is linear in the outputs, also beside rounded products."""
    product, x_shape, w_shape, *_ = PRODUCTS[name]
    apply = lambda p, x: product(x, p["w"])  # noqa: E731
    w, x = normal(*w_shape, seed=3), normal(*x_shape)
    found = sites(apply, {"w": w}, x)
    q = qj.quantize({"w": w}, qj.Policy([("w", SPECS[form])]), sites=found)
    fresh = lora.init(q, "w", 2, jax.random.key(1), alpha=6, sites=found)
    run = intercept(apply, strict=True)
    np.testing.assert_array_equal(run(lora.attach(q, fresh), x), run(q, x))
    (site,) = run.report(lora.attach(q, fresh), x).sites
    assert site.lowering.endswith("plus rank 2 in float") and site.term_flops > 0

    adapters = started(fresh)
    y = apply({"w": w}, x)
    got = gradients(lambda a: run(lora.attach(q, a), x), adapters, y)
    close(got, gradients(lambda a: apply(dense(q, a), x), adapters, y))
    values, expected = run(lora.attach(q, adapters), x), apply(dense(q, adapters), x)
    step = 0.0 if SPECS[form].act is None else 0.05
    assert float(jnp.linalg.norm(values - expected)) <= (step + 1e-5) * float(
        jnp.linalg.norm(expected)
    )


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_beside_products_from_codes(rows):
    """A weight that is large enough for the CPU's own product."""
    w, x = normal(256, 512) / 16, normal(rows, 256)
    q = qj.quantize({"w": w}, qj.Policy([("w", SPECS["nf4"])]))
    adapters = started(lora.init(q, "w", 2, jax.random.key(0)))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    run = intercept(apply)
    (site,) = run.report(lora.attach(q, adapters), x).sites
    assert "from codes" in site.lowering and "rank 2" in site.lowering
    got = gradients(lambda a: run(lora.attach(q, a), x), adapters, x @ w)
    close(got, gradients(lambda a: apply(dense(q, a), x), adapters, x @ w))


MODELS = ("linen CNN", "linen decoder", "linen LSTM", "nnx transformer", "equinox MLP",
          "haiku CNN", "plain experts", "plain stacked layers")  # fmt: skip


@pytest.mark.parametrize("name", daily(MODELS, ["linen decoder"]))
def test_models_of_any_framework(name):
    """Unmodified, with layers in scans, experts, and parameters that two products use."""
    case = CASES[name]()
    found = sites(case.apply, case.params, case.x)
    policy = qj.preset("nf4g16")
    q = jax.jit(functools.partial(qj.quantize, policy=policy, sites=found))(case.params)
    adapters = started(lora.init(q, policy, 2, jax.random.key(0), sites=found))
    assert adapters
    y = jax.eval_shape(case.apply, case.params, case.x)
    got = gradients(lambda a: intercept(case.apply)(lora.attach(q, a), case.x), adapters, y)
    expected = gradients(lambda a: case.apply(dense(q, a), case.x), adapters, y)
    close(got, expected, tolerance=2e-3)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(got))


def test_training_moves_the_adapters_alone_and_costs_their_memory():
    """What rounding to 3 bits lost is taken back in part; one program, and a state of the size of
    the adapters."""
    w, x = normal(24, 16) / 5, normal(64, 24, seed=4)
    q = qj.quantize({"kernel": w, "bias": jnp.zeros(16)}, "w3")
    apply = lambda p, x: x @ p["kernel"] + p["bias"]  # noqa: E731
    y = apply({"kernel": w, "bias": 0.1}, x)
    adapters = lora.init(q, "kernel", 4, jax.random.key(0))
    optimizer = guard(optax.adam(3e-2))
    state = optimizer.init(adapters)
    numbers = 4 * (24 + 16)
    assert sum(a.size for a in jax.tree.leaves(state)) == 2 * numbers + 1

    def loss(adapters):
        return jnp.mean((intercept(apply)(lora.attach(q, adapters), x) - y) ** 2)

    @Counted
    def step(adapters, state):
        value, g = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(g, state, adapters)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(80):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[0] == pytest.approx(float(jnp.mean((apply(qj.dequantize(q), x) - y) ** 2)), 1e-5)
    assert losses[-1] < 0.6 * losses[0] and step.traces == 1


def test_adapters_beside_factors_that_are_there():
    """Ranks add up, whatever the dtypes and whether the factors vary by layer."""
    w = normal(3, 8, 6)
    stacked = dataclasses.replace(INT4, stacked=1)
    q = qj.quantize({"w": w}, qj.Policy([("w", stacked)]))
    had = dataclasses.replace(
        q["w"],
        left=jnp.asarray(normal(1, 8, 1, 2), jnp.bfloat16),
        right=jnp.asarray(normal(1, 1, 6, 2), jnp.bfloat16),
    )
    adapters = started(lora.init({"w": had}, "w", 3, jax.random.key(0), alpha=1.5))
    assert adapters["w"].a.shape == (3, 8, 1, 3) and adapters["w"].b.shape == (3, 1, 6, 3)
    both = lora.attach({"w": had}, adapters)["w"]
    assert both.rank == 5 and adapters["w"].rank == 3
    close(qj.dequantize(both), dense({"w": had}, adapters)["w"])
    x = normal(3, 4, 8)
    apply = lambda p, x: jnp.einsum("lti,lio->lto", x, p["w"])  # noqa: E731
    got, expected = intercept(apply)({"w": both}, x), apply(dense({"w": had}, adapters), x)
    close(got, expected)


def test_merge_and_back():
    params = {"a": {"kernel": normal(16, 8)}, "b": {"kernel": normal(8, 4), "bias": normal(4)}}
    q = qj.quantize(params, "w4")
    adapters = started(lora.init(q, "a/kernel", 2, jax.random.key(0), alpha=4))
    merged = lora.merge(q, adapters)
    whole = qj.dequantize(lora.attach(q, adapters))
    np.testing.assert_array_equal(merged["a"]["kernel"], whole["a"]["kernel"])
    close(merged["a"]["kernel"], dense(q, adapters)["a"]["kernel"])
    assert merged["b"]["kernel"] is q["b"]["kernel"] and merged["b"]["bias"] is q["b"]["bias"]
    back = lora.unmerge(merged, adapters)
    size = float(jnp.abs(merged["a"]["kernel"]).max())
    np.testing.assert_allclose(
        back["a"]["kernel"], qj.dequantize(q["a"]["kernel"]), atol=4 * 2.0**-24 * size
    )
    again = lora.merge(q, adapters, "w4")
    expected = qj.quantize({"kernel": merged["a"]["kernel"]}, "w4")["kernel"]
    jax.tree.map(np.testing.assert_array_equal, again["a"]["kernel"], expected)
    assert again["b"]["kernel"] is q["b"]["kernel"]


def test_an_attached_tree_is_stored_as_it_is(tmp_path):
    q = qj.quantize({"kernel": normal(16, 8)}, "nf4g16")
    tree = lora.attach(q, started(lora.init(q, "kernel", 2, jax.random.key(0))))
    qj.save(tmp_path / "adapted.safetensors", tree)
    loaded = qj.load(tmp_path / "adapted.safetensors")
    np.testing.assert_array_equal(qj.dequantize(loaded)["kernel"], qj.dequantize(tree)["kernel"])


def test_how_adapters_start():
    """Normal with variance 1 / inputs, each leaf its own; names or sites tell the axes."""
    q = qj.quantize({"x": {"kernel": normal(400, 8)}, "y": {"weight": normal(8, 400)}}, "w8")
    adapters = lora.init(q, ["x/*", "y/*"], 50, jax.random.key(0))
    x, y = adapters["x/kernel"], adapters["y/weight"]
    assert x.a.shape == (400, 1, 50) and y.a.shape == (1, 400, 50) and y.b.shape == (8, 1, 50)
    for a in (x.a, y.a):  # 20,000 numbers: the variance is known to 1 %
        assert float(jnp.var(a) * 400) == pytest.approx(1, abs=0.04)
    assert float(jnp.abs(x.a.reshape(400, 50) - y.a.reshape(400, 50)).mean()) > 0.03
    assert x.scale == 1.0 and not x.b.any()
    # A table that is only looked up has no inputs that sites know of: its name tells.
    table = qj.quantize({"embedding": normal(10, 6)}, qj.Policy(otherwise="w8"))
    assert lora.init(table, "*", 2, jax.random.key(0))["embedding"].a.shape == (1, 6, 2)


def test_refusals(key):
    params = {"dense": {"kernel": normal(8, 6), "bias": normal(6)}}
    q = qj.quantize(params, "w4")
    adapters = lora.init(q, "dense/kernel", 2, key)
    with pytest.raises(ValueError, match="'dense/bias' matches no quantized.*'dense/kernel'"):
        lora.init(q, "dense/bias", 2, key)
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        lora.init(q, "**", 0, key)
    with pytest.raises(ValueError, match="alpha must be positive"):
        lora.init(q, "**", 2, key, alpha=0.0)
    row = qj.quantize({"bias": normal(6)}, qj.Policy([("bias", "w8")]))
    with pytest.raises(ValueError, match="bias: an adapter needs axes of inputs and of outputs"):
        lora.init(row, "bias", 2, key)
    square = {"w": normal(6, 6)}
    tied = sites(lambda p, x: (x @ p["w"]) @ p["w"].T, square, normal(2, 6))
    with pytest.raises(ValueError, match="w: its products sum over different axes"):
        lora.init(qj.quantize(square, qj.Policy([("w", "w8")])), "w", 2, key, sites=tied)
    with pytest.raises(ValueError, match="dense/kernel: lora.attach expects a QTensor"):
        lora.attach(params, adapters)
    other = {"dense": {"kernel": normal(8, 7), "bias": normal(6)}}
    with pytest.raises(ValueError, match=r"dense/kernel: an adapter of .* does not fit .*\(8, 7\)"):
        lora.attach(qj.quantize(other, "w4"), adapters)
    with pytest.raises(ValueError, match="dense/kernel: lora.merge: no such.*'kernel'"):
        lora.merge({"kernel": q["dense"]["kernel"]}, adapters)
    with pytest.raises(ValueError, match="dense/kernel: lora.unmerge expects a float array"):
        lora.unmerge(q, adapters)
