"""Does what goes wrong in an intercepted model say which parameter, and what to do?"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.interpret import intercept


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = normal(4, 6, seed=3)
Q = qj.quantize({"a": {"kernel": normal(6, 8)}, "b": {"kernel": normal(8, 3)}}, "w4")


def mlp(p, x):
    return x @ p["a"]["kernel"] @ p["b"]["kernel"]


def test_a_tree_that_was_quantized_for_other_shapes():
    wrong = {**Q, "b": qj.quantize({"kernel": normal(7, 3)}, "w4")}
    with pytest.raises(
        TypeError, match=r"(?s)same shape.*quantized for this model\?.*b/kernel: \(7, 3\)"
    ):
        intercept(mlp)(wrong, X)
    model = nn.Dense(8)
    variables = qj.quantize({"params": {"kernel": normal(5, 8), "bias": normal(8)}}, "w4")
    with pytest.raises(
        Exception, match=r"(?s)kernel.*quantized for this model\?.*kernel: \(5, 8\)"
    ):
        intercept(model.apply)(variables, X)
    many = {f"layer{i}": Q["a"]["kernel"] for i in range(12)}
    with pytest.raises(ZeroDivisionError, match=r"(?s)layer0: \(6, 8\).*and 4 more"):
        intercept(lambda p, x: 1 / 0)(many, X)


PARTS = {
    "scale": (
        lambda q: dataclasses.replace(q, scale=q.scale[:, :5]),
        r"a/kernel: expected a scale of shape \(1, 8\), one per block of \(None, 1\) on \(6, 8\)",
    ),
    "codes": (
        lambda q: dataclasses.replace(q, packed=(q.packed[0], 9)),
        r"a/kernel: 9 codes of 4 bits along axis -2 take 5 bytes, its codes have shape \(3, 8\)",
    ),
    "block": (
        lambda q: dataclasses.replace(q, block=(1, 1, 1)),
        r"a/kernel: a block of \(1, 1, 1\) does not fit",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_do_not_belong_together(name):
    change, message = PARTS[name]
    wrong = {**Q, "a": {"kernel": change(Q["a"]["kernel"])}}
    with pytest.raises(ValueError, match=message):
        intercept(mlp)(wrong, X)


def test_a_donated_buffer():
    q = jax.tree.map(jnp.copy, Q)
    jax.tree.leaves(q["b"])[0].delete()
    with pytest.raises(ValueError, match="b/kernel: its buffer was donated or deleted"):
        intercept(mlp)(q, X)
    x = jnp.copy(X)
    x.delete()
    with pytest.raises(ValueError, match="an argument: its buffer was donated or deleted"):
        intercept(mlp)(Q, x)


BRANCHES = {
    "if": lambda p, x, n: mlp(p, x) if x.sum() > 0 else x,
    "a length": lambda p, x, n: mlp(p, x)[: int(n)],
    "numpy": lambda p, x, n: np.asarray(mlp(p, x)),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_a_value(name):
    with pytest.raises(TypeError, match="(?s)intercept: the function is traced.*are static here"):
        intercept(BRANCHES[name])(Q, X, jnp.int32(2))


def test_what_the_note_on_branches_advises_works():
    """A Python value is static, and so is one that is bound under jit."""

    def apply(p, x, n=4, *, flag):
        return mlp(p, x)[:n] if flag else x

    assert intercept(apply)(Q, X, 2, flag=True).shape == (2, 3)
    bound = functools.partial(apply, n=3, flag=True)
    assert jax.jit(intercept(bound))(Q, X).shape == (3, 3)


def test_a_model_that_closes_over_its_parameters():
    with pytest.raises(ValueError, match="uses none of its 2 quantized parameters.*a/kernel"):
        intercept(lambda p, x: x @ normal(6, 8))(Q, X)
    kernel = Q["a"]["kernel"]
    for closed in (lambda p, x: x @ kernel, jax.jit(lambda p, x: jnp.dot(x, kernel))):
        with pytest.raises(TypeError, match="intercept: the function closes over a QTensor"):
            intercept(closed)({}, X)
        with pytest.raises(TypeError, match="intercept: the function closes over a QTensor"):
            jax.jit(intercept(closed))({}, X)


def test_a_parameter_that_two_products_use_in_two_ways():
    """Its sites are refused to a policy; a tree quantized by name runs, each use as it is."""
    apply = lambda p, x: jnp.tanh(x @ p["kernel"]) @ p["kernel"].T  # noqa: E731
    params = {"kernel": normal(6, 8)}
    found = qj.sites(apply, params, X)
    assert [s.contracting for s in found] == [(0,), (1,)]
    with pytest.raises(ValueError, match="kernel: products sum over different axes"):
        qj.quantize(params, "w8a8", sites=found)
    for preset, most in (("w8", 1e-5), ("w4g4", 1e-5), ("w8a8", 0.03)):
        q = qj.quantize(params, preset)
        got, expected = intercept(apply)(q, X), apply(qj.dequantize(q), X)
        assert jnp.linalg.norm(got - expected) <= most * jnp.linalg.norm(expected)
        assert len(intercept(apply).report(q, X).sites) == 2
