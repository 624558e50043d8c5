"""Does a smaller network compute what the masked one does, and are all ties of channels found?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.resnet import ResNet
from quantjax import prune, quantize
from tests.daily import daily

RELU = jax.nn.relu


def normal(*shape: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed + sum(shape))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def conv(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def norm(p, x):
    return (x - p["mean"]) * lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def cnn(p, x):
    """Two residual sums with batch norm, one of a depthwise convolution, then flattened pixels."""
    x = RELU(norm(p["n0"], conv(x, p["c0"])))
    x = x + norm(p["n2"], conv(jax.nn.gelu(norm(p["n1"], conv(x, p["c1"]))), p["c2"]))
    y = jax.nn.sigmoid(conv(x, p["d"], groups=p["d"].shape[-1]))
    x = RELU(x + y)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.reshape(x.shape[0], -1) @ p["head"]


def stats(n):
    return {"mean": normal(n), "var": normal(n) ** 2, "scale": normal(n), "bias": normal(n, seed=1)}


CNN = {
    "c0": normal(3, 3, 2, 6), "n0": stats(6), "c1": normal(3, 3, 6, 5), "n1": stats(5),
    "c2": normal(3, 3, 5, 6), "n2": stats(6), "d": normal(3, 3, 1, 6), "head": normal(24, 3),
}  # fmt: skip


def block(p, x):
    """Grouped queries (4 heads, 2 of keys), rotary angles, a causal mask, layer norms, a gate."""
    width = 4

    def ln(x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["g"]

    y = ln(x)
    q, k, v = ((y @ p[n]).reshape(*y.shape[:2], -1, width) for n in "qkv")
    angle = jnp.arange(y.shape[1])[:, None, None] * jnp.array([1.0, 0.1])

    def turned(y):
        a, b = jnp.split(y, 2, -1)
        c, s = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * c - b * s, a * s + b * c], -1)

    k, v = (jnp.repeat(z, q.shape[2] // k.shape[2], axis=2) for z in (turned(k), v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", turned(q), k) / 2
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    x = x + out.reshape(*out.shape[:2], -1) @ p["o"]
    y = ln(x)
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


BLOCK = {
    "g": normal(6), "q": normal(6, 16), "k": normal(6, 8), "v": normal(6, 8, seed=1),
    "o": normal(16, 6), "gate": normal(6, 5), "up": normal(6, 5, seed=1), "down": normal(5, 6),
}  # fmt: skip
X = normal(2, 3, 6)


def layers(p, x):
    """Stacked layers under a scan, with a bias."""

    def one(x, w):
        return x + jnp.tanh(x @ w["u"] + w["b"]) @ w["d"], None

    return lax.scan(one, x, p)[0]


LAYERS = {"u": normal(2, 3, 4), "b": normal(2, 4), "d": normal(2, 4, 3)}


def grouped(p, x):
    """A group norm: three groups of two channels, each gone as a whole."""
    y = (x @ p["a"]).reshape(5, -1, 2)
    y = (y - y.mean(-1, keepdims=True)) / (jnp.abs(y).max(-1, keepdims=True) + 1)
    return RELU(y.reshape(5, -1) * p["s"]) @ p["c"]


GROUPED = {"a": normal(3, 6), "s": normal(6), "c": normal(6, 2)}

# (function, which, model, parameters, input, arguments, the shapes that change)
CASES = {
    "stream and inner": (prune.channels, cnn, CNN, normal(2, 4, 4, 2), {"sparsity": 0.5},
        {"c0": (3, 3, 2, 3), "c1": (3, 3, 3, 3), "c2": (3, 3, 3, 3), "d": (3, 3, 1, 3),
         "head": (12, 3)} | {f"n{i}/{n}": (3,) for i in range(3) for n in stats(1)}),
    "by number": (prune.channels, cnn, CNN, normal(2, 4, 4, 2), {"keep": {"c1": 2}, "score": "l2"},
        {"c1": (3, 3, 6, 2), "c2": (3, 3, 2, 6)} | {f"n1/{n}": (2,) for n in stats(1)}),
    "gate": (prune.channels, block, BLOCK, X, {"sparsity": 0.7},
        {"gate": (6, 2), "up": (6, 2), "down": (2, 6)}),
    "heads": (prune.heads, block, BLOCK, X, {"sparsity": 0.5},
        {"q": (6, 8), "k": (6, 4), "v": (6, 4), "o": (8, 6)}),
    "layers": (prune.channels, layers, LAYERS, normal(5, 3), {"keep": {"u": 3}},
        {"u": (2, 3, 3), "b": (2, 3), "d": (2, 3, 3)}),
    "groups": (prune.channels, grouped, GROUPED, normal(5, 3), {"sparsity": 0.4},
        {"a": (3, 4), "s": (4,), "c": (4, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", daily(CASES, ["stream and inner", "heads", "layers"]))
def test_the_smaller_network_is_the_masked_one(name):
    cut_out, apply, params, x, how, widths = CASES[name]
    cut = cut_out(apply, params, x, **how)
    assert cut.widths == widths
    want = jax.jit(apply)(prune.apply(params, cut.masks), x)
    got = jax.jit(apply)(cut.params, x)
    # The same sums without their zeros, perhaps in another order: some roundings of float32.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6 * float(jnp.abs(want).max()))
    assert float(jnp.abs(want - apply(params, x)).max()) > 1e-2  # it did cut something


def test_what_goes_is_least():
    """By hand: the hidden channels of least |w|; a tree of scores says otherwise."""
    p = {"a": normal(3, 6), "c": normal(6, 2)}
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["c"]  # noqa: E731
    least = np.argsort(np.abs(np.asarray(p["a"], np.float64)).sum(0))
    cut = prune.channels(apply, p, normal(4, 3), sparsity=0.5)
    np.testing.assert_array_equal(cut.params["c"], p["c"][np.sort(least[3:])])
    score = {"a": jnp.zeros((3, 6)).at[0].set(jnp.arange(6.0)), "c": p["c"]}
    cut = prune.channels(apply, p, normal(4, 3), sparsity=0.5, score=score)
    np.testing.assert_array_equal(cut.params["a"], p["a"][:, 3:])


def test_a_published_resnet_loses_what_its_blocks_hide():
    """Streams that grow by padding are fixed, as the model says how many are added."""
    model, x = ResNet(blocks=1, classes=3), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda s: normal(*s.shape), shapes)
    cut = prune.channels(model.apply, params, x, sparsity=0.5)
    assert cut.widths["layer2_0/conv1/kernel"] == (3, 3, 16, 16)
    assert cut.widths["layer2_0/conv2/kernel"] == (3, 3, 16, 32)
    assert not any(name.startswith(("conv1", "linear")) or "bn2" in name for name in cut.widths)
    with pytest.raises(ValueError, match="conv1/kernel: .*a fixed number of channels is padded"):
        prune.channels(model.apply, params, x, keep={"conv1/kernel": 8})


TWO = {"a": normal(3, 4), "c": normal(4, 2)}


def two(p, x):
    return RELU(x @ p["a"]) @ p["c"]


def layer_norm(p, x):
    y = x @ p["a"]
    return (y - y.mean(-1, keepdims=True)) @ p["c"]


BAD = {
    "sparsity": (two, {"sparsity": 1.0}, r"\[0, 1\), got 1.0"),
    "both": (two, {"sparsity": 0.5, "keep": {"a": 1}}, "either"),
    "none": (two, {}, "either"),
    "too many": (two, {"keep": {"a": 5}}, "a: has 4 channels, can not keep 5"),
    "unknown": (two, {"keep": {"b": 1}}, "'b' matches no parameter"),
    "output": (two, {"keep": {"c": 1}}, "c: its channels can not be cut: c: it is the model's out"),
    "score": (two, {"sparsity": 0.5, "score": "max"}, "score must be"),
    "shape of a score": (two, {"sparsity": 0.5, "score": {"a": jnp.ones(2)}}, "a: expected scores"),
    "layer norm": (layer_norm, {"sparsity": 0.5}, "a: 'reduce_sum' goes over the channels"),
    "used with the input": (lambda p, x: (x @ p["a"] + x.sum()) @ p["c"] * p["c"].sum(),
                            {"sparsity": 0.5}, "nothing can be cut"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name):
    apply, how, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        prune.channels(apply, TWO, normal(5, 3), **how)


def test_quantized_leaves_and_models_without_heads_raise():
    with pytest.raises(ValueError, match=r"a: is quantized \(int4\)"):
        prune.channels(two, quantize(TWO, "w4"), normal(5, 3), sparsity=0.5)
    with pytest.raises(ValueError, match="heads: nothing can be cut"):
        prune.heads(two, TWO, normal(5, 3), sparsity=0.5)
