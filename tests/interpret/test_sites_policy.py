"""Do scales follow what the products of a model sum over, where its sites are known?"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from tests.daily import daily

X = jnp.asarray(np.random.default_rng(3).normal(size=(5, 16)), jnp.float32)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def scale_shape(apply, params, x, policy="w8", name="kernel"):
    found = qj.sites(apply, params, x)
    q = jax.eval_shape(lambda p: qj.quantize(p, policy, sites=found), params)
    return jax.tree.leaves(q, is_leaf=lambda a: isinstance(a, qj.QTensor))[0].scale.shape


FORMS = {
    # how the model uses it, its shape, scales per channel, scales in groups of 8
    "plain": (lambda p, x: x @ p["kernel"], (16, 6), (1, 6), (2, 6)),
    "transposed": (lambda p, x: x @ p["kernel"].T, (6, 16), (6, 1), (6, 2)),
    "heads": (
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["kernel"]),
        (16, 2, 3),
        (1, 2, 3),
        (2, 2, 3),
    ),
    "from heads": (
        lambda p, x: jnp.einsum("thk,hkd->td", x.reshape(5, 4, 4), p["kernel"]),
        (4, 4, 6),
        (1, 1, 6),
        (2, 1, 6),
    ),
    "experts": (
        lambda p, x: jnp.einsum("td,edf->etf", x, p["kernel"]),
        (3, 16, 6),
        (3, 1, 6),
        (3, 2, 6),
    ),
    "table": (lambda p, x: p["kernel"][jnp.array([1, 2])], (7, 16), (7, 1), (7, 2)),
    "layers": (
        lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["kernel"])[0],
        (3, 16, 16),
        (3, 1, 16),
        (3, 2, 16),
    ),
    "convolution, outputs first": (
        lambda p, x: lax.conv(x[None, None], p["kernel"], (1, 1), "SAME"),
        (4, 1, 3, 3),
        (4, 1, 1, 1),
        (4, 1, 2, 1),
    ),
}


CORE = ("from heads", "layers", "convolution, outputs first")


@pytest.mark.parametrize("name", daily(FORMS, CORE))
def test_one_scale_for_each_output(name):
    apply, shape, channel, groups = FORMS[name]
    params = {"kernel": normal(*shape)}
    assert scale_shape(apply, params, X) == channel
    assert scale_shape(apply, params, X, "w8g8") == groups
    q = qj.quantize(params, "w4", sites=qj.sites(apply, params, X))
    fake = qj.fake_quantize(params, "w4", sites=qj.sites(apply, params, X))
    np.testing.assert_array_equal(qj.dequantize(q)["kernel"], fake["kernel"])
    got, expected = jax.jit(qj.intercept(apply))(q, X), apply(qj.dequantize(q), X)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_every_dot_of_a_transformer_becomes_a_product_of_integers():
    model = nn.MultiHeadDotProductAttention(num_heads=4)
    params = jax.jit(model.init)(jax.random.key(0), X[None], X[None])
    found = qj.sites(model.apply, params, X[None], X[None])
    expected = jax.jit(model.apply)(params, X[None], X[None])
    for sites, most in ((found, 0.035), ((), 0.05)):
        q = qj.quantize(params, "w8a8", sites=sites)
        y = jax.jit(qj.intercept(model.apply))(q, X[None], X[None])
        assert jnp.linalg.norm(y - expected) <= most * jnp.linalg.norm(expected)
    tied = lambda p, x: x @ p["embedding"].T + p["embedding"][0].sum()  # noqa: E731
    params = {"embedding": normal(7, 16)}
    q = qj.quantize(params, "w8a8", sites=qj.sites(tied, params, X))
    report = qj.intercept(tied).report(q, X)
    assert [s.lowering for s in report.sites if s.primitive == "dot_general"] == ["int8 product"]


def test_two_products_over_different_axes_are_refused():
    apply = lambda p, x: x @ p["kernel"] @ p["kernel"].T @ p["kernel"].T  # noqa: E731
    both = lambda p, x: (x @ p["kernel"]) @ p["kernel"].T  # noqa: E731
    params = {"kernel": normal(16, 16)}
    for f in (apply, both):
        with pytest.raises(ValueError, match="kernel: products sum over different axes"):
            qj.quantize(params, "w8", sites=qj.sites(f, params, X))
    shape = qj.QuantSpec(format=qj.IntFormat(8), block=(None, None))
    q = qj.quantize(params, qj.Policy([("kernel", shape)]), sites=qj.sites(both, params, X))
    assert q["kernel"].scale.shape == (1, 1)


def test_layers_that_do_not_agree_and_sites_that_come_late_are_refused():
    apply = FORMS["layers"][0]
    params = {"kernel": normal(3, 16, 16)}
    found = qj.sites(apply, params, X)
    policy = qj.Policy([("kernel", qj.QuantSpec(format=qj.IntFormat(8), stacked=2))])
    with pytest.raises(ValueError, match=r"kernel: scans take \[1\] leading axes off"):
        qj.quantize(params, policy, sites=found)
    with pytest.raises(ValueError, match="resolved already"):
        qj.quantize(params, qj.preset("w8").resolve(params), sites=found)
    with pytest.raises(ValueError, match="like= has its blocks"):
        qj.quantize(params, like=qj.quantize(params, "w8"), sites=found)
