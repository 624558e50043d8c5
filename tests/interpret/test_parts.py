"""Does a part of a quantized parameter stay quantized, and mean what it means to JAX?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.formats import ExponentFormat
from quantjax.interpret import intercept, sites
from quantjax.interpret.param import param
from quantjax.interpret.parts import backwards, cut, dynamic, neighbours, strided
from tests.daily import daily


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def spec(bits: int, **more) -> qj.QuantSpec:
    return qj.QuantSpec(**{"format": qj.IntFormat(bits), "stacked": 0, **more})


X = normal(3, 8, seed=1)
STACK = {"kernel": normal(4, 8, 12)}
CUTS = {
    # an axis, and what is taken of it
    "a layer": (0, neighbours(2, 1)),
    "a layer, known late": (0, dynamic(jnp.int32(3), 1)),
    "the layers backwards": (0, backwards(4)),
    "every other layer": (0, strided(1, 4, 2)),
    "inputs of a group": (1, neighbours(4, 4)),
    "odd inputs": (1, neighbours(3, 3)),
    "outputs": (2, neighbours(2, 5)),
    "outputs from a group": (2, neighbours(6, 5)),
    "every third output": (2, strided(1, 12, 3)),
    "outputs, known late": (2, dynamic(jnp.int32(20), 5)),
}
ODD = {"odd inputs"}
SPECS = {
    # how the stack is quantized, and which cuts would cut a block or a byte of it
    "channel": (spec(8, stacked=1), set()),
    "packed": (spec(4, stacked=1), ODD),  # along the inputs, two codes a byte
    "groups": (spec(3, group=4, stacked=1), ODD | {"inputs of a group"}),  # 4 * 3 bits, no bytes
    "groups of all axes": (
        spec(4, block=(2, 4, 3)),
        ODD | {"outputs", "every third output", "outputs, known late"},
    ),
    "one scale": (spec(8, block=(None, None, None)), set()),
    "asymmetric": (spec(4, stacked=1, symmetric=False, observer=qj.minmax()), ODD),
    "learned": (spec(4, stacked=1, format=qj.Codebook.learned(2)), ODD),
    "powers of two": (spec(4, block=(1, 4, 1), scale_format=ExponentFormat()), ODD),
    "double": (spec(4, block=(1, 4, 1), scale_format=spec(8, block=(1, 2, None))), ODD),
}


CORE = ("groups of all axes", "learned", "double")


@pytest.mark.parametrize("name", daily(SPECS, CORE))
def test_a_cut_of_the_codes_is_a_cut_of_the_values(name):
    how, refused = SPECS[name]
    q = qj.quantize(STACK, qj.Policy([("kernel", how)]))

    def both(q):
        values, found = qj.dequantize(q)["kernel"], {}
        for label, (axis, what) in CUTS.items():
            view = cut(param(q["kernel"], "kernel"), axis, what)
            if view is not None:
                assert view.quantized and view.shape[axis] == what.length
                found[label] = view.array(), what.take(values, axis)
        return found

    found = jax.jit(both)(q)
    assert set(CUTS) - set(found) == refused
    for label, (got, expected) in found.items():
        np.testing.assert_array_equal(got, expected, err_msg=label)
    assert cut(param(q["kernel"], "kernel"), 1, neighbours(4, 0)) is None


LAYERS = {
    "an index": lambda w, i: w[2],
    "from the end": lambda w, i: w[-1],
    "in a dimension": lambda w, i: lax.index_in_dim(w, 1, keepdims=False),
    "a traced index": lambda w, i: w[i],
    "dynamic": lambda w, i: lax.dynamic_index_in_dim(w, i, keepdims=False),
    "taken": lambda w, i: jnp.take(w, i, axis=0),
    "out of bounds": lambda w, i: jnp.take(w, i + 9, axis=0),
    "reversed": lambda w, i: w[::-1][0],
    "every other": lambda w, i: w[::2][1],
    "unstacked": lambda w, i: jnp.unstack(w)[3],
    "split": lambda w, i: jnp.split(w, 4)[1][0],
    "transposed": lambda w, i: w.transpose(2, 1, 0)[..., 2].T,
    "beyond a barrier": lambda w, i: lax.optimization_barrier((w[1].T, i))[0].T,
}


@pytest.mark.parametrize("bits", daily([8, 4], [4]))
def test_a_layer_of_a_stack_is_that_layer(bits):
    """Whichever way it is taken it stays quantized, and its product is that of a scanned layer."""

    def apply(p, x, i):
        return {name: x @ f(p["kernel"], i) for name, f in LAYERS.items()}

    found = sites(apply, STACK, X, 1)
    assert {(s.layers, s.contracting, s.param_shape) for s in found} == {(1, (0,), (8, 12))}
    assert len(found) == len(LAYERS)
    q = qj.quantize(STACK, f"w{bits}", sites=found)
    assert q["kernel"].scale.shape == (4, 1, 12)
    strict = intercept(apply, strict=True)
    got, expected = jax.jit(strict)(q, X, 1), jax.jit(apply)(qj.dequantize(q), X, 1)
    for name in LAYERS:
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-5, err_msg=name)
    assert np.isnan(got["out of bounds"]).all()


def test_heads_cut_from_one_matrix():
    """Queries, keys and values of one fused kernel, by splitting and by slices, at 8 bits."""

    def apply(p, x):
        q, k, v = jnp.split(p["kernel"], 3, axis=1)
        return (x @ q) * (x @ k) + x @ v + x @ p["kernel"][:, 4:8]

    q = qj.quantize({"kernel": normal(8, 12)}, "w8a8")
    report = intercept(apply, strict=True).report(q, X)
    assert [s.contracting for s in report.sites] == [(0,)] * 4
    expected = apply(qj.dequantize(q), X)
    got = jax.jit(intercept(apply))(q, X)
    assert jnp.linalg.norm(got - expected) <= 0.03 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("name", ["pad", "concatenate"])
def test_what_can_not_be_cut_becomes_float_and_is_reported(name):
    makes = {
        "pad": lambda w: jnp.pad(w, ((0, 0), (0, 1))),
        "concatenate": lambda w: jnp.concatenate([w, w], 1),
    }
    apply = lambda p, x: x @ makes[name](p["kernel"])  # noqa: E731
    q = qj.quantize({"kernel": normal(8, 12)}, "w8")
    (remark,) = [r for r in intercept(apply).report(q, X).remarks if r.path]
    assert (remark.path, remark.primitive) == ("kernel", name)
    got, expected = jax.jit(intercept(apply))(q, X), apply(qj.dequantize(q), X)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
