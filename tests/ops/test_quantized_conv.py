"""Is a convolution in integers that of the rounded values, whatever pads it?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.affine import Scales
from quantjax.interpret import intercept
from quantjax.ops import ConvParams, Lowering, fake_activation, plan_conv, quantized_conv
from quantjax.ops.quantized_conv import _integer_conv
from tests.daily import daily, dealt

INT8, UINT8 = qj.IntFormat(8), qj.IntFormat(8, signed=False)
ACTS = {
    "examples": qj.QuantSpec(format=INT8),
    "tensor": qj.QuantSpec(format=qj.IntFormat(4), block=qj.Granularity.TENSOR),
    "unsigned": qj.QuantSpec(format=UINT8, symmetric=False, observer=qj.minmax()),
    "unsigned tensor": qj.QuantSpec(
        format=UINT8, symmetric=False, observer=qj.minmax(), block=qj.Granularity.TENSOR
    ),
}
LAYERS = {
    "same": ((3, 8, 8, 4), (3, 3, 4, 6), dict(padding="SAME")),
    "strided": ((2, 9, 7, 4), (3, 2, 4, 6), dict(padding="VALID", strides=(2, 3))),
    "dilated": ((2, 9, 9, 4), (3, 3, 4, 6), dict(padding="SAME", rhs_dilation=(2, 2))),
    "transposed": ((2, 5, 5, 4), (3, 3, 4, 6), dict(padding=((1, 2), (2, 1)), lhs_dilation=(2, 2))),
    "depthwise": ((2, 8, 8, 6), (3, 3, 1, 6), dict(padding="SAME", feature_group_count=6)),
    "grouped": ((2, 8, 8, 6), (3, 3, 3, 8), dict(padding="SAME", feature_group_count=2)),
}


# One program for each, where eager calls would be one for each operation.
in_integers = jax.jit(_integer_conv, static_argnames=("act", "params"))
rounded_images = jax.jit(fake_activation, static_argnums=(1, 3))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def convolve(x, w, strides=(1, 1), **options):
    return lax.conv_general_dilated(
        x, w, strides, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def params_of(x, w, options) -> ConvParams:
    (eqn,) = jax.make_jaxpr(lambda x, w: convolve(x, w, **options))(x, w).jaxpr.eqns
    return ConvParams(**{name: eqn.params[name] for name in ConvParams._fields})


def case(name: str):
    image, kernel, options = LAYERS[name]
    x = jnp.abs(normal(*image)) + 0.5 * normal(*image, seed=1)  # a zero point off the middle
    q = qj.quantize({"kernel": normal(*kernel, seed=2)}, "w8")["kernel"]
    return x, q, params_of(x, qj.dequantize(q), options), options


CORE = ("strided", "transposed", "depthwise", "grouped")


@pytest.mark.parametrize("name, act, static", dealt(daily(LAYERS, CORE), ACTS, [True, False]))
def test_equal_to_the_rounded_values(name, act, static):
    """Borders too: the reference pads the rounded image with 0, whose code is the zero point.

    float32 rounds two scales, their product and the result: 4 of 2^-24; the reference rounds the
    values in its sum, 2 more on each term."""
    x, q, params, options = case(name)
    act = ACTS[act]
    given = None
    if static:
        zero = None if act.symmetric else jnp.array(30, act.format.code_dtype)
        given = Scales(jnp.float32(1 / 70), zero)
    assert plan_conv(q, act, params, x.shape).lowering is Lowering.INTEGER
    rounded = np.asarray(rounded_images(x, act, given, tuple(params.summed)), np.float64)
    w = np.asarray(qj.dequantize(q), np.float64)
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(convolve, **options))
        expected, size = (np.asarray(run(f(rounded), f(w))) for f in (np.asarray, np.abs))
    got = in_integers(x, q, given, act=act, params=params)
    assert np.all(np.abs(got - expected) <= 8 * 2.0**-24 * size)
    served = jax.jit(quantized_conv, static_argnums=(3, 4))(x, q, given, act, params)
    np.testing.assert_allclose(served, got, rtol=1e-5, atol=1e-5 * np.abs(got).max())


def test_an_example_with_nan_is_nan_and_the_others_are_not():
    x, q, params, _ = case("same")
    for given in (None, Scales(jnp.float32(1 / 70))):
        bad = x.at[1, 3, 3, 0].set(jnp.nan)
        y = in_integers(bad, q, given, act=ACTS["examples"], params=params)
        np.testing.assert_array_equal(jnp.isnan(y).any((1, 2, 3)), [False, True, False])


def test_gradient_and_export():
    x, q, params, options = case("same")
    act = ACTS["examples"]
    got = jax.jit(jax.grad(lambda x: quantized_conv(x, q, None, act, params).sum()))(x)
    expected = jax.jit(jax.grad(lambda x: convolve(x, qj.dequantize(q), **options).sum()))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    run = jax.jit(lambda x: quantized_conv(x, q, None, act, params))
    data = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(x), run(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_report_says_what_is_computed(transposed):
    x, q, params, options = case("same")
    q = dataclasses.replace(q, act=ACTS["examples"])
    if transposed:  # a kernel stored (O, I, H, W), as Equinox has it
        w = jnp.transpose(qj.dequantize(q), (3, 2, 0, 1))
        spec = qj.QuantSpec(format=INT8, act=ACTS["examples"], block=(1, None, None, None))
        q = qj.quantize({"weight": w}, qj.Policy([("weight", spec)]))["weight"]
    view = (lambda w: jnp.transpose(w, (2, 3, 1, 0))) if transposed else (lambda w: w)
    apply = lambda p, x: convolve(x, view(p["w"]), **options)  # noqa: E731
    (site,) = intercept(apply).report({"w": q}, x).sites
    assert site.lowering == "float, both sides rounded on CPU: faster for this shape"
    rounded = rounded_images(x, ACTS["examples"], None, (1, 2, 3))
    got, expected = jax.jit(intercept(apply))({"w": q}, x), apply({"w": qj.dequantize(q)}, rounded)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


def test_wide_layers_are_integers_on_cpu():
    q = qj.quantize({"kernel": normal(3, 3, 64, 64)}, "w8a8")
    apply = lambda p, x: convolve(x, p["kernel"], padding="SAME")  # noqa: E731
    x = jax.ShapeDtypeStruct((32, 16, 16, 64), jnp.float32)
    report = intercept(apply).report(q, x)
    assert report.sites[0].lowering == "int8 convolution" and report.low_precision_share == 1
