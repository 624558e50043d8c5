"""Which calls does the evaluator enter, and what becomes of parameters at those it does not?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax.interpret import intercept
from tests.daily import daily


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = normal(4, 6, seed=3)
PARAMS = {"kernel": normal(6, 8), "bias": normal(8, seed=1)}


@jax.custom_jvp
def dense(x, w, b):
    return jnp.tanh(x @ w + b)


@dense.defjvp
def _dense(primals, tangents):
    """No derivative of anything, so that it is known again: seven times the product's."""
    (x, w, b), (dx, dw, db) = primals, tangents
    return dense(x, w, b), 7 * (dx @ w + x @ dw + db)


def with_rule(p, x):
    return dense(x, p["kernel"], p["bias"])


@pytest.mark.parametrize("preset", daily(["w8", "w4g2", "w8a8"], ["w4g2", "w8a8"]))
def test_a_custom_jvp_is_entered_and_keeps_its_derivative(preset):
    q = qj.quantize(PARAMS, preset)
    run = jax.jit(intercept(with_rule, strict=True))
    (site,) = intercept(with_rule, strict=True).report(q, X).sites
    assert (site.path, site.contracting) == ("kernel", (0,))
    w = qj.dequantize(q)["kernel"]
    near = {"rtol": 1e-5, "atol": 1e-5} if preset != "w8a8" else {"atol": 0.1}
    np.testing.assert_allclose(run(q, X), with_rule(qj.dequantize(q), X), **near)

    def of_both(bias, x):
        y = run({**q, "bias": bias}, x)
        return y.sum(), y

    (_, y), (db, dx) = jax.value_and_grad(of_both, (0, 1), has_aux=True)(q["bias"], X)
    np.testing.assert_array_equal(y, run(q, X))  # the value is that of inference
    np.testing.assert_allclose(dx, 7 * jnp.ones((4, 8)) @ w.T, rtol=1e-5)
    np.testing.assert_allclose(db, 28 * jnp.ones(8), rtol=1e-6)
    each = jax.vmap(run, (None, 0))(q, X[:, None])[:, 0]
    np.testing.assert_allclose(each, run(q, X), rtol=1e-5, atol=1e-6)


def test_a_custom_vjp_is_left_whole():
    @jax.custom_vjp
    def act(x, w):
        return x @ w

    act.defvjp(lambda x, w: (act(x, w), w), lambda w, g: (7 * g @ w.T, None))
    apply = lambda p, x: act(act(x, jnp.eye(6)), p["kernel"])  # noqa: E731
    q = qj.quantize(PARAMS, "w8a8")
    report = intercept(apply).report(q, X)
    inside, edge = report.remarks
    assert (inside.path, inside.reason) == ("", "not entered: products inside stay as they are")
    assert (edge.path, edge.primitive) == ("kernel", "custom_vjp_call")
    assert not report.sites and "kernel: custom_vjp_call: dequantized here" in str(report)
    w = qj.dequantize(q)["kernel"]
    np.testing.assert_array_equal(intercept(apply)(q, X), apply({"kernel": w}, X))
    got = jax.grad(lambda x: intercept(apply)(q, x).sum())(X)
    np.testing.assert_allclose(got, 49 * jnp.ones((4, 8)) @ w.T, rtol=1e-5)
    with pytest.raises(ValueError, match="kernel: custom_vjp_call in the model"):
        intercept(apply, strict=True)(q, X)


def test_a_shard_map_gets_float_arrays():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
    product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, **specs)
    apply = lambda p, x: product(x, p["kernel"])  # noqa: E731
    q = qj.quantize(PARAMS, "w8")
    (remark,) = intercept(apply).report(q, X).remarks
    assert (remark.path, remark.primitive) == ("kernel", "shard_map")
    expected = jax.jit(apply)(qj.dequantize(q), X)
    np.testing.assert_allclose(jax.jit(intercept(apply))(q, X), expected, rtol=1e-6)


def test_branches_of_platforms_stay_those_of_platforms():
    """A branch for another platform, which can not be compiled here, is not compiled."""
    foreign = Primitive("foreign")
    foreign.def_abstract_eval(lambda x: x)

    def apply(p, x):
        return lax.platform_dependent(
            x, tpu=lambda x: foreign.bind(x @ p["kernel"]), default=lambda x: x @ p["kernel"]
        )

    q = qj.quantize(PARAMS, "w8")
    got = jax.jit(intercept(apply, strict=True))(q, X)
    np.testing.assert_allclose(got, X @ qj.dequantize(q)["kernel"], rtol=1e-5, atol=1e-6)


def test_a_nested_jit_with_shardings_keeps_them():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda *names: jax.NamedSharding(mesh, P(*names))  # noqa: E731
    inner = jax.jit(
        lambda w, x: x @ w,
        in_shardings=(place(None, "model"), place("data")),
        out_shardings=place("data", "model"),
    )
    apply = lambda p, x: inner(p["kernel"], x)  # noqa: E731
    q = qj.quantize(PARAMS, "w8")
    run = jax.jit(intercept(apply, strict=True))
    y = run(q, X)
    assert y.sharding.is_equivalent_to(place("data", "model"), 2)
    np.testing.assert_allclose(y, X @ qj.dequantize(q)["kernel"], rtol=1e-5, atol=1e-6)
