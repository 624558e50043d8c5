"""Does the evaluator keep what JAX promises: derivatives, vmap, errors, one layer at a time?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives

import quantjax as qj
from quantjax.interpret import intercept, register_rule, registry, sites
from tests.daily import daily, dealt


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(p, x):
    return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"]


PARAMS = {
    "a": {"kernel": normal(6, 8), "bias": normal(8, seed=1)},
    "b": {"kernel": normal(8, 3, seed=2)},
}
X = normal(4, 6, seed=3)


def test_derivatives_of_the_input_and_of_float_leaves():
    q = qj.quantize(PARAMS, "w4")
    loss = lambda f: lambda bias, x: jnp.sum(f(bias, x) ** 2)  # noqa: E731

    def run(function, tree):
        return lambda bias, x: function(tree | {"a": tree["a"] | {"bias": bias}}, x)

    def gradients(function, tree):
        return jax.jit(jax.grad(loss(run(function, tree)), (0, 1)))(PARAMS["a"]["bias"], X)

    got, expected = gradients(intercept(mlp), q), gradients(mlp, qj.dequantize(q))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_vmap_over_inputs_and_over_trees():
    f = jax.jit(intercept(mlp))
    q = qj.quantize(PARAMS, "w4")
    one = jnp.stack([f(q, x[None])[0] for x in X])
    np.testing.assert_allclose(
        jax.vmap(f, (None, 0))(q, X[:, None])[:, 0], one, rtol=1e-5, atol=1e-6
    )
    trees = [qj.quantize(jax.tree.map(lambda w, s=s: s * w, PARAMS), "w4") for s in (1.0, 2.0)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *trees)
    each = jnp.stack([f(t, X) for t in trees])
    np.testing.assert_allclose(jax.vmap(f, (0, None))(stacked, X), each, rtol=1e-5, atol=1e-6)


def test_nan_and_infinity_pass_through():
    q = qj.quantize(PARAMS, "w8")
    bad = X.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
    np.testing.assert_array_equal(
        jax.jit(intercept(mlp))(q, bad), jax.jit(mlp)(qj.dequantize(q), bad)
    )


def test_bfloat16_stays():
    p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    q = qj.quantize(p, "w4")
    assert jax.eval_shape(intercept(mlp), q, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    cast = lambda p, x: x @ p["kernel"].astype(jnp.bfloat16)  # noqa: E731
    q = qj.quantize({"kernel": normal(6, 3)}, "w4")
    x = X.astype(jnp.bfloat16)
    np.testing.assert_array_equal(intercept(cast, strict=True)(q, x), cast(qj.dequantize(q), x))


def test_a_stacked_model_holds_one_layer_of_floats():
    layers, n = 12, 256
    p = {"kernel": normal(layers, n, n)}
    apply = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["kernel"])[0]  # noqa: E731
    spec = qj.QuantSpec(format=qj.IntFormat(8), stacked=1)
    q = qj.quantize(p, qj.Policy([("kernel", spec)]))
    memory = jax.jit(intercept(apply)).lower(q, normal(1, n)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * n * n  # of 12 layers; one, and room for XLA
    whole = jax.jit(lambda q, x: apply(qj.dequantize(q), x)).lower(q, normal(1, n)).compile()
    assert whole.memory_analysis().temp_size_in_bytes > 10 * 4 * n * n


@pytest.mark.parametrize(
    "block",
    daily([(None, None, 1), (2, None, 1), (1, 4, 1), (4, 2, 3)], [(None, None, 1), (4, 2, 3)]),
)
def test_blocks_that_span_layers_are_cut(block):
    p = {"kernel": normal(4, 6, 6)}
    apply = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["kernel"])[0]  # noqa: E731
    spec = qj.QuantSpec(format=qj.IntFormat(4), block=block)
    q = qj.quantize(p, qj.Policy([("kernel", spec)]))
    got, expected = jax.jit(intercept(apply))(q, X), apply(qj.dequantize(q), X)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


VIEWS = {
    "transposed": lambda w: w.T,
    "split": lambda w: w.reshape(6, 2, 4).transpose(1, 0, 2)[0],
    "merged back": lambda w: w[None, :, :].reshape(6, 8),
    "squeezed": lambda w: jnp.squeeze(w[:, None, :], 1).T.T,
    "cast twice": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "swapped and cast": lambda w: jnp.swapaxes(w, 0, 1).astype(jnp.float16).T,
}


@pytest.mark.parametrize("name, preset", dealt(VIEWS, ["w4g2", "w8", "nf4"]))
def test_views_mean_what_they_mean_to_jax(name, preset):
    apply = lambda p, x: x @ VIEWS[name](p["kernel"]).reshape(6, -1)  # noqa: E731
    q = qj.quantize({"kernel": normal(6, 8)}, preset)
    got, expected = jax.jit(intercept(apply))(q, X), jax.jit(apply)(qj.dequantize(q), X)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("preset", daily(["w8", "w4", "w3", "nf4g4"], ["w3", "nf4g4"]))
def test_rows_of_a_table_are_gathered_as_codes(preset):
    p = {"embedding": normal(50, 8)}
    apply = lambda p, i: jnp.take(p["embedding"], i, axis=0)  # noqa: E731
    index = jnp.array([[3, 49], [0, 77]])  # the last one is out of bounds: NaN
    q = qj.quantize(p, qj.Policy(otherwise=preset))
    got, expected = jax.jit(intercept(apply))(q, index), apply(qj.dequantize(q), index)
    np.testing.assert_array_equal(got, expected)
    (site,) = intercept(apply).report(q, index).sites
    assert site.lowering == "rows dequantized" and site.batch == (0,)


def test_what_becomes_float_is_reported_and_refused():
    apply = lambda p, x: x @ jnp.abs(p["kernel"])  # noqa: E731
    q = qj.quantize({"kernel": normal(6, 8)}, "w8")
    (remark,) = [r for r in intercept(apply).report(q, X).remarks if r.path]
    assert (remark.path, remark.primitive) == ("kernel", "abs")
    got, expected = jax.jit(intercept(apply))(q, X), apply(qj.dequantize(q), X)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="kernel: abs in the model: dequantized here"):
        intercept(apply, strict=True)(q, X)


def test_sites_count_axes_and_flops():
    apply = lambda p, x: lax.scan(  # noqa: E731
        lambda x, w: (jnp.einsum("td,hdk,hkd->td", x, w["a"], w["b"]), None), x, p
    )[0]
    p = {"a": normal(3, 2, 6, 4), "b": normal(3, 2, 4, 6)}
    found = sites(apply, p, X)
    assert {s.path for s in found} == {"a", "b"}
    assert all((s.calls, s.layers) == (3, 1) for s in found)
    conv = lambda p, x: lax.conv(x, p["kernel"], (1, 1), "VALID")  # noqa: E731
    (site,) = sites(conv, {"kernel": normal(5, 3, 2, 2)}, normal(1, 3, 8, 8))
    assert (site.contracting, site.output) == ((1, 2, 3), (0,))
    assert site.flops == 2 * (5 * 7 * 7) * (3 * 2 * 2)


def test_a_rule_of_the_user_is_used(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", {})
    seen = []

    @register_rule(primitives.dot_general_p, jax.Array, qj.QTensor)
    def product(lhs, rhs, *, dimension_numbers, **params):
        seen.append(rhs.shape)
        return lax.dot_general(lhs, qj.dequantize(rhs), dimension_numbers)

    apply = lambda p, x: x @ p["kernel"].T  # noqa: E731
    for preset in ("w4g2", "w3", "mxfp4", "w8"):
        q = qj.quantize({"kernel": normal(8, 6)}, preset)
        got, expected = jax.jit(intercept(apply))(q, X), apply(qj.dequantize(q), X)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert seen == [(6, 8)] * 4
    with pytest.raises(ValueError, match="one of them QTensor"):
        register_rule(primitives.neg_p, jax.Array)


def test_static_arguments_and_words():
    def apply(p, x, *, scale, flag):
        return (x @ p["kernel"] if flag else x) * scale

    q = qj.quantize({"kernel": normal(6, 8)}, "w8")
    assert intercept(apply)(q, X, scale=2.0, flag=True).shape == (4, 8)
    assert intercept(apply)(q, X, scale=jnp.ones(6), flag=False).shape == (4, 6)
    with pytest.raises(TypeError, match="params"):
        intercept(apply)()
    with pytest.raises(ValueError, match="outside the first argument"):
        intercept(lambda p, x: x @ p["kernel"])(q, q["kernel"])


def test_products_of_equal_shapes_are_traced_once():
    """So that a model of many layers does not take as many times as long to trace."""
    p = [{"kernel": normal(6, 6, seed=i)} for i in range(4)]

    def apply(p, x):
        for layer in p:
            x = jnp.tanh(x @ layer["kernel"])
        return x

    traced = jax.make_jaxpr(intercept(apply))(qj.quantize(p, "w8a8"), X)
    bodies = [
        e.params["jaxpr"] for e in traced.jaxpr.eqns if e.params.get("name") == "quantized_dot"
    ]
    assert len(bodies) == 4 and len(set(map(id, bodies))) == 1
