"""Do meshes, layouts and the options of a product survive interception?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax.interpret import intercept
from tests.daily import daily, dealt


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


X = normal(8, 16, seed=3)
PARAMS = {"up": {"kernel": normal(16, 24)}, "down": {"kernel": normal(24, 8, seed=1)}}


def mlp(p, x):
    return jnp.tanh(x @ p["up"]["kernel"] / 4) @ p["down"]["kernel"]


def put(tree, spec, where):
    """Every array of rank 2 laid out by `spec`, an axis of scales that is one long left whole."""

    def one(a):
        own = [None if n == 1 else e for n, e in zip(a.shape, spec, strict=True)]
        return jax.device_put(a, NamedSharding(where, P(*own)))

    return jax.tree.map(one, tree)


SPECS = {
    "outputs": P(None, "model"),
    "inputs": P("model", None),
    "both": P("data", "model"),
    "whole": P(None, None),
}


@pytest.mark.parametrize(
    "name, preset",
    dealt(daily(SPECS, ["inputs", "both"]), daily(["w8", "w4", "w8a8"], ["w4", "w8a8"])),
)
def test_a_mesh_gives_what_one_device_gives(name, preset):
    """Kernels cut along outputs, inputs or both, the batch cut too. Where activations are rounded,
    sums of another order may round one code the other way, which shifts a result by a step."""
    q = qj.quantize(PARAMS, preset)
    run = jax.jit(intercept(mlp))
    expected = run(q, X)
    where = mesh()
    got = run(put(q, SPECS[name], where), put(X, P("data", None), where))
    most = 1e-2 if preset == "w8a8" else 1e-5
    assert jnp.linalg.norm(got - expected) <= most * jnp.linalg.norm(expected)


@pytest.mark.parametrize("name", daily(["outputs", "inputs", "whole"], ["outputs", "inputs"]))
def test_an_explicit_mesh_too(name):
    """Types of arrays carry their sharding there, and the model may ask for that of a product."""
    where = mesh(AxisType.Explicit)

    def apply(p, x):
        y = jnp.einsum("bi,io->bo", x, p["kernel"], out_sharding=P("data", None))
        assert jax.typeof(y).sharding.spec == P("data", None)
        assert jax.typeof(p["kernel"]).sharding.spec == SPECS[name]
        return y

    q = qj.quantize({"kernel": PARAMS["up"]["kernel"]}, "w8")
    expected = X @ qj.dequantize(q)["kernel"]
    with jax.set_mesh(where):
        p, x = put(q, SPECS[name], where), put(X, P("data", None), where)
        y = jax.jit(intercept(apply))(p, x)
    assert y.sharding.spec == P("data", None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


STACK = normal(4, 16, 24)
W4 = qj.QuantSpec(format=qj.IntFormat(4), stacked=1)
LAYOUTS = {
    # how the model sees the stack, the layout it asks for, that of codes and of scales; None: float
    "outputs": (
        lambda w: w,
        P(None, None, "model"),
        P(None, None, "model"),
        P(None, None, "model"),
    ),
    "inputs": (lambda w: w, P(None, "model"), P(None, "model", None), P(None, None, None)),
    "layers": (lambda w: w, P("model"), P("model", None, None), P("model", None, None)),
    "two axes": (
        lambda w: w,
        P(None, ("data", "model")),
        P(None, ("data", "model"), None),
        P(None, None, None),
    ),
    "odd bytes": (lambda w: w[:, :12], P(None, ("data", "model")), None, None),
    "transposed": (
        lambda w: w.transpose(0, 2, 1),
        P(None, "model"),
        P(None, None, "model"),
        P(None, None, "model"),
    ),
    "merged": (
        lambda w: w.reshape(64, 24),
        P("model"),
        P("model", None, None),
        P("model", None, None),
    ),
    "merged unevenly": (lambda w: w.reshape(64, 24), P(("data", "model")), None, None),
    "a new axis": (
        lambda w: w[None],
        P(None, "model"),
        P("model", None, None),
        P("model", None, None),
    ),
    "unconstrained": (
        lambda w: w,
        P(P.UNCONSTRAINED, None, "model"),
        P(P.UNCONSTRAINED, None, "model"),
        P(P.UNCONSTRAINED, None, "model"),
    ),
}


CORE = ("two axes", "odd bytes", "transposed", "merged", "merged unevenly", "unconstrained")


@pytest.mark.parametrize("name", daily(LAYOUTS, CORE))
def test_a_constraint_reaches_codes_and_scales(name):
    see, spec, codes, scales = LAYOUTS[name]
    sharding = NamedSharding(mesh(), spec)

    def apply(p, x):
        return lax.with_sharding_constraint(see(p["kernel"]), sharding).sum() * x

    q = qj.quantize({"kernel": STACK}, qj.Policy([("kernel", W4)]))
    traced = jax.make_jaxpr(intercept(apply))(q, X)
    laid = [e for e in traced.jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    if codes is None:
        (eqn,) = laid  # on the float array
        assert eqn.invars[0].aval.dtype == np.float32 and eqn.params["sharding"].spec == spec
    else:
        found = {e.invars[0].aval.dtype: e.params["sharding"].spec for e in laid}
        assert found == {np.dtype(np.uint8): codes, np.dtype(np.float32): scales}
    (remark,) = intercept(apply).report(q, X).remarks
    assert remark.primitive == ("sharding_constraint" if codes is None else "reduce_sum")
    got, expected = jax.jit(intercept(apply))(q, X), jax.jit(apply)(qj.dequantize(q), X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_constraint_reaches_what_stands_beside_the_codes():
    """The mesh cuts it where it varies along the axis, and lays the rest everywhere."""
    sharding = NamedSharding(mesh(), P(None, "data", "model"))

    def apply(p, x):
        return jnp.einsum("bi,lio->lbo", x, lax.with_sharding_constraint(p["kernel"], sharding))

    q = qj.quantize({"kernel": STACK}, qj.Policy([("kernel", W4)]))["kernel"]
    q = dataclasses.replace(
        q,
        input_scale=1 + normal(4, 16, 1) ** 2,
        left=normal(4, 16, 1, 2),
        right=normal(4, 1, 24, 2),
    )
    traced = jax.make_jaxpr(intercept(apply))({"kernel": q}, X)
    laid = [e for e in traced.jaxpr.eqns if e.primitive.name == "sharding_constraint"]
    found = {e.invars[0].aval.shape: e.params["sharding"].spec for e in laid}
    assert found[4, 16, 1] == P(None, "data", None)
    assert found[4, 16, 1, 2] == P(None, "data", None, None)
    assert found[4, 1, 24, 2] == P(None, None, "model", None)
    got = jax.jit(intercept(apply))({"kernel": q}, X)
    expected = apply(qj.dequantize({"kernel": q}), X)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


NUMBERS = (((1,), (0,)), ((), ()))
LAYOUT = ("NHWC", "HWIO", "NHWC")
PRODUCTS = {
    "precision": lambda p, x: lax.dot_general(
        x, p["kernel"], NUMBERS, precision=lax.Precision.HIGHEST
    ),
    "algorithm": lambda p, x: lax.dot_general(
        x, p["kernel"], NUMBERS, precision=lax.DotAlgorithmPreset.F32_F32_F32
    ),
    "type": lambda p, x: lax.dot_general(
        x, p["kernel"], NUMBERS, preferred_element_type=jnp.bfloat16
    ),
    "convolution": lambda p, x: lax.conv_general_dilated(
        *(x.reshape(1, 8, 16, 1), p["conv"], (1, 2), "SAME"),
        precision=(lax.Precision.HIGH, lax.Precision.DEFAULT),
        preferred_element_type=jnp.float32,
        dimension_numbers=LAYOUT,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_options_of_a_product_stay(name):
    apply, params = PRODUCTS[name], {"kernel": normal(16, 8), "conv": normal(3, 3, 1, 4)}
    q = qj.quantize(params, qj.Policy(otherwise="w8"))

    def options(f, tree):
        (eqn,) = (e for e in jax.make_jaxpr(f)(tree, X).eqns if "precision" in e.params)
        return eqn.primitive, eqn.params

    assert options(intercept(apply), q) == options(apply, params)
    got, expected = intercept(apply)(q, X), apply(qj.dequantize(q), X)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
