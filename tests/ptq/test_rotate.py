"""Rotations leave the function and take the outliers; what can not be turned has a reason."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from experiments import language_model
from quantjax.interpret.turns import find_turns
from quantjax.ptq import rotate
from quantjax.ptq.hadamard import hadamard, random_hadamard, random_keeping_sum
from quantjax.ptq.rotate import rotated
from tests.daily import daily
from tests.interpret.models import CASES

D, HEADS, KV, WIDE, WORDS = 16, 4, 2, 24, 11  # width, heads, those of keys, hidden, vocabulary
TOKENS = jnp.arange(10).reshape(2, 5) % WORDS


def rms(x, gain):
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain


def turned(x):
    """Rotary positions."""
    first, second = jnp.split(x, 2, -1)
    angle = jnp.arange(x.shape[1])[:, None, None] * jnp.array([1.0, 0.3], x.dtype)
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * c - second * s, first * s + second * c], -1)


def block(x, p, positions=turned):
    y = rms(x, p["norm1"])
    q = (y @ p["q"]).reshape(2, 5, HEADS, -1)
    k, v = ((y @ p[name]).reshape(2, 5, KV, -1) for name in "kv")
    k, v = (jnp.repeat(z, HEADS // KV, 2) for z in (positions(k), v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", positions(q), k))
    x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 5, D) @ p["o"]
    y = rms(x, p["norm2"])
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


def decoder(p, tokens):
    x, _ = lax.scan(lambda x, q: (block(x, q), None), p["embedding"][tokens], p["layers"])
    return rms(x, p["norm"]) @ p["head"]


def tied(p, tokens):
    x = p["embedding"][tokens]
    for i in range(2):
        x = block(x, jax.tree.map(lambda a, i=i: a[i], p["layers"]))
    return rms(x, p["norm"]) @ p["embedding"].T


def weights(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)

    def gain(*shape):
        return jnp.asarray(1 + 0.4 * rng.normal(size=shape), jnp.float32)

    narrow = D * KV // HEADS
    layers = {"norm1": gain(2, D), "norm2": gain(2, D), "q": normal(2, D, D)}
    layers |= {"k": normal(2, D, narrow), "v": normal(2, D, narrow), "o": normal(2, D, D)}
    layers |= {"gate": normal(2, D, WIDE), "up": normal(2, D, WIDE), "down": normal(2, WIDE, D)}
    return {"embedding": normal(WORDS, D), "layers": layers, "norm": gain(D), "head": normal(D, 7)}


RUN, TIED, QUANTIZED = jax.jit(decoder), jax.jit(tied), jax.jit(qj.intercept(decoder))


def same(run, a, b, x):
    got, want = run(b, x), run(a, x)
    # Float32 sums of D terms in another basis, over a few layers.
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def changed(a, b):
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(x) for x in (a, b)), strict=True)
    return {jax.tree_util.keystr(p, simple=True, separator="/") for (p, x), (_, y) in pairs
            if not jnp.array_equal(x, y)}  # fmt: skip


def test_a_decoder_is_turned_everywhere_and_stays_the_same_function():
    p = weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = rotated(decoder, p, TOKENS)
    same(RUN, p, new, TOKENS)
    every = {"embedding", "head", "norm", *(f"layers/{name}" for name in p["layers"])}
    assert changed(p, new) == every
    for gain in (new["norm"], new["layers"]["norm1"], new["layers"]["norm2"]):
        np.testing.assert_array_equal(gain, 1.0)


def test_the_bases_are_those_of_the_paper():
    """One of the stream, and one of each layer's values; queries and keys meet rotary positions."""
    p = weights()
    p["norm"] = jnp.ones(D)
    p["layers"] |= {"norm1": jnp.ones((2, D)), "norm2": jnp.ones((2, D))}
    free = find_turns(decoder, p, TOKENS).free
    assert sorted((turn.size, turn.normed) for turn in free) == [(4, False), (4, False), (16, True)]
    (stream,) = (turn for turn in free if turn.normed)
    got = {(at.path.removeprefix("layers/"), at.axis) for at in stream.axes}
    into, out = {(n, 0) for n in ("q", "k", "v", "gate", "up", "head")}, {("o", 1), ("down", 1)}
    assert got == {("embedding", 1)} | into | out and not stream.keeps_sum
    values = [turn for turn in free if turn.axes[0].path == "layers/v"]
    assert [[(at.path, at.layer, at.axis, at.outer) for at in turn.axes] for turn in values] == [
        [("layers/v", (i,), 1, KV), ("layers/o", (i,), 0, HEADS)] for i in (0, 1)
    ]


@pytest.mark.full
def test_a_gain_before_a_tied_table_keeps_the_stream():
    p = weights()
    with pytest.warns(UserWarning, match="the stream between norms stays: .* as by a gain"):
        new = rotated(tied, p, TOKENS)
    same(TIED, p, new, TOKENS)
    assert changed(p, new) == {"layers/v", "layers/o"}  # of the heads alone
    p["norm"] = jnp.ones(D)  # without that gain the table is turned once, for both of its uses
    new = rotated(tied, p, TOKENS)
    same(TIED, p, new, TOKENS)
    assert "embedding" in changed(p, new)


@pytest.mark.full
@pytest.mark.parametrize("name", daily(["linen decoder", "linen ViT"], ["linen decoder"]))
def test_layer_norms_keep_the_vector_of_ones(name):
    case = CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = rotated(case.apply, case.params, case.x, seed=1)
    same(jax.jit(case.apply), case.params, new, case.x)
    assert len(changed(case.params, new)) > len(jax.tree.leaves(case.params)) / 2


def test_what_can_not_be_turned_is_left_with_a_reason():
    p = {"a": weights()["head"], "b": jnp.ones((7, 2)).at[0].set(3)}
    with pytest.warns(UserWarning, match="nothing is turned"):
        assert rotated(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], p, jnp.ones((3, D))) is p

    def squeezed(p, x):
        y = x @ p["a"]
        size = lax.rsqrt(jnp.sum(y**2, -1, keepdims=True))
        return (jnp.tanh(y) * size) @ p["b"]

    with pytest.warns(UserWarning, match="stays: its channels go one by one through 'tanh'"):
        assert rotated(squeezed, p, jnp.ones((3, D))) is p


def test_a_sum_over_channels_keeps_the_vector_of_ones():
    def apply(p, x):
        y = x @ p["a"]
        return jnp.tanh(y @ p["b"]) * y.sum(-1, keepdims=True)

    p, x = {"a": weights()["head"], "b": weights(1)["head"].T}, weights(2)["embedding"]
    (turn,) = find_turns(apply, p, x).free
    assert turn.keeps_sum
    same(apply, p, rotated(apply, p, x), x)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, np.zeros(7, np.float32)], ids=str)
def test_a_number_in_the_model_fixes_no_basis(factor):
    """Nor one that is a value's own, as values are numbered, nor what is made of zeros alone."""

    def apply(p, x):
        made = factor if isinstance(factor, float) else jnp.exp(factor)
        return jnp.tanh((x @ p["a"] * made) @ p["b"])

    p = {"a": weights()["head"], "b": weights(1)["head"].T}
    assert len(find_turns(apply, p, weights(2)["embedding"]).free) == 1


def test_a_gain_of_zero_is_a_weight_of_zero():
    p = weights()
    p["norm"] = p["norm"].at[3].set(0)
    new = rotated(decoder, p, TOKENS)
    same(RUN, p, new, TOKENS)
    np.testing.assert_array_equal(new["norm"], 1.0)


@pytest.mark.full
@pytest.mark.parametrize("seed", daily(range(5), [0]))
def test_channels_with_outliers_round_better_after(seed):
    """Weights with one large input channel, and a stream with one, in 4 bits."""
    p = weights(seed)
    p["embedding"] = p["embedding"].at[:, 2].multiply(20)
    for name in ("q", "k", "v", "gate", "up", "o", "down"):
        axis = 2 if name in ("o", "down") else 1
        at = (slice(None), 3) if axis == 1 else (slice(None), slice(None), 3)
        p["layers"][name] = p["layers"][name].at[at].multiply(15)
    policy = qj.Policy(
        [("layers/norm*", None), ("norm", None)],
        otherwise=qj.QuantSpec(format=qj.IntFormat(4), act=qj.QuantSpec(format=qj.IntFormat(8))),
    )
    want = RUN(p, TOKENS)

    def error(tree):
        sites = qj.sites(decoder, tree, TOKENS)
        got = QUANTIZED(qj.quantize(tree, policy, sites=sites), TOKENS)
        return float(jnp.mean((got - want) ** 2))

    assert error(rotated(decoder, p, TOKENS, seed=seed)) < error(p)


@pytest.mark.full
def test_the_language_model_of_the_experiments():
    config = language_model.DecoderConfig(vocabulary=32, layers=1, width=16, heads=2,
                                          key_value_heads=1, hidden=24)  # fmt: skip
    params = language_model.initialize(config, seed=0)
    tokens = jnp.arange(8).reshape(2, 4)

    def apply(params, tokens):
        return language_model.forward(config, params, tokens)

    # Gains of one, as they start, fix nothing: the tied table is turned with all else.
    new = rotated(apply, params, tokens)
    same(jax.jit(apply), params, new, tokens)
    assert len(changed(params, new)) == 8
    params["norm"]["scale"] = params["norm"]["scale"].at[1].set(2.0)
    with pytest.warns(UserWarning, match="as by a gain"):
        new = rotated(apply, params, tokens)
    same(jax.jit(apply), params, new, tokens)
    assert len(changed(params, new)) == 2


def test_the_method_turns_both_trees_by_its_seed():
    p = weights()
    got = qj.calibrate(decoder, p, [TOKENS], rotate(3))
    jax.tree.map(np.testing.assert_array_equal, got, rotated(decoder, p, TOKENS, seed=3))
    assert not jnp.array_equal(got["head"], rotated(decoder, p, TOKENS, seed=4)["head"])
    with pytest.raises(ValueError, match="rotate: .* is quantized already"):
        qj.calibrate(decoder, p | {"head": qj.quantize(p, "w8")["head"]}, [TOKENS], rotate())


@pytest.mark.full
def test_dtypes_stay():
    p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights())
    new = rotated(decoder, p, TOKENS)
    assert {a.dtype.name for a in jax.tree.leaves(new)} == {"bfloat16"}


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 76, 96, 108])
def test_hadamard_matrices_are_what_they_claim(n):
    h = hadamard(n)
    np.testing.assert_array_equal(np.abs(h), 1)
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


@pytest.mark.parametrize("n", [2, 7, 12, 52])
def test_random_matrices_are_orthogonal(n):
    rng = np.random.default_rng(0)
    matrix, remark = random_hadamard(n, rng)
    assert bool(remark) == (n in (7, 52))
    keeping = random_keeping_sum(n, rng)
    for r in (matrix, keeping):
        np.testing.assert_allclose(r @ r.T, np.eye(n), atol=1e-13)
    np.testing.assert_allclose(np.ones(n) @ keeping, 1.0, atol=1e-13)


def test_a_size_without_a_hadamard_matrix_is_told():
    p = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), jnp.float32)}
    p["b"] = p["a"].T

    def apply(p, x):
        return jnp.tanh((x @ p["a"]) @ p["b"])

    x = jnp.ones((2, 3))
    with pytest.warns(UserWarning, match="a, b: no Hadamard matrix of order 7"):
        new = rotated(apply, p, x)
    same(apply, p, new, x)
