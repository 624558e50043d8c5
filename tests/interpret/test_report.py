"""Does the report say what an intercepted call does, what it saves, and what stays float?"""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpret import Sites, intercept, sites


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = normal(4, 16, seed=3)
PARAMS = {"kernel": normal(16, 16), "bias": normal(16, seed=1)}


def apply(p, x):
    y = lax.scan(lambda y, _: (y @ p["kernel"] + p["bias"], None), x, None, length=3)[0]
    return (y @ p["kernel"].T) @ y.T


def test_what_is_saved():
    """By hand: 3 + 1 products of 4x16x16 with the parameter, one of 4x16x4 without."""
    q = qj.quantize(PARAMS, "w8a8")
    report = intercept(apply).report(q, X)
    one, mixed = 2 * 4 * 16 * 16, 2 * 4 * 16 * 4
    assert report.flops == 4 * one + mixed
    # By channel of the product in the scan; the other one sums over several scales.
    assert report.low_precision_share == pytest.approx(3 * one / report.flops)
    assert report.stored["kernel"] == (16 * 16 + 4 * 16, 4 * 16 * 16)
    assert report.stored["bias"] == (64, 64)
    assert report.bytes_saved == 3 * 256 - 64
    text = str(report)
    assert "total: 384 bytes of parameters, 704 less than in float32" in text
    assert "1 dot_general: a product of two activations, 0.000512 MFLOP in float" in text
    assert "float, both sides rounded: several scales along the sum" in text
    weights = intercept(apply).report(qj.quantize(PARAMS, "w8"), X)
    assert weights.flops == report.flops


def test_the_table_is_aligned_and_names_what_is_used_nowhere():
    params = {**PARAMS, "unused": normal(3)}
    report = intercept(apply).report(qj.quantize(params, "w8"), X)
    title, line, *rest = str(report).splitlines()
    assert set(line) == {"-", " "} and len(title) == len(line)
    starts = [i for i, c in enumerate(line) if c == "-" and line[i - 1 : i] in ("", " ")]
    for row in (title, *rest[: len(report.sites)]):
        assert all(row[i - 1 : i] in ("", " ") for i in starts)
    assert report.others == ("bias", "unused") and "in no product: bias, unused" in str(report)
    assert repr(report) == str(report)


def test_a_parameter_used_twice_is_listed_twice():
    found = sites(apply, PARAMS, X)
    assert [(s.path, s.contracting, s.calls) for s in found] == [
        ("kernel", (0,), 3),
        ("kernel", (1,), 1),
    ]
    called = lambda p, x: jax.jit(jnp.dot)(jax.jit(jnp.dot)(x, p["kernel"]), p["kernel"])  # noqa: E731
    assert len(sites(called, PARAMS, X)) == 2
    gram = lambda p, x: x @ (p["kernel"] @ p["kernel"])  # noqa: E731
    assert [s.contracting for s in sites(gram, PARAMS, X)] == [(1,), (0,)]


def test_sites_say_what_could_not_be_entered():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, None))
    opaque = lambda p, x: product(x, p["kernel"]) + p["bias"] @ PARAMS["kernel"]  # noqa: E731
    found = sites(opaque, PARAMS, X)
    assert isinstance(found, Sites) and [s.path for s in found] == ["bias"]
    (remark,) = found.remarks
    assert (remark.path, remark.primitive) == ("kernel", "custom_vjp_call")
    assert remark.reason == "not entered"
    for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert again == found and again.remarks == found.remarks
