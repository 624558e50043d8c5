"""Is a product in low precision the product of the rounded values?"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.affine import Scales
from quantjax.formats import e4m3, e5m2
from quantjax.interpret import intercept
from quantjax.ops import Lowering, fake_activation, plan_dot, quantized_dot
from tests.daily import daily, dealt

from .reference import dot_general

INT8 = qj.IntFormat(8)
UINT8 = qj.IntFormat(8, signed=False)
ACT = qj.QuantSpec(format=INT8)
PLAIN = (((1,), (0,)), ((), ()))

WEIGHTS = {
    name: qj.preset(name).otherwise for name in ("w8", "w4", "w3", "w2", "w1", "ternary")
} | {
    "asymmetric": qj.QuantSpec(format=INT8, symmetric=False, observer=qj.minmax()),
    "unsigned": qj.QuantSpec(format=UINT8, symmetric=False, observer=qj.minmax()),
    "unsigned, 3 bits": qj.QuantSpec(
        format=qj.IntFormat(3, signed=False), symmetric=False, observer=qj.minmax()
    ),
    "one scale": qj.QuantSpec(format=INT8, block=qj.Granularity.TENSOR),
    "blocks of outputs": qj.QuantSpec(format=INT8, block=(None, 5)),
}
ACTS = {
    "rows": ACT,
    "4 bits": qj.QuantSpec(format=qj.IntFormat(4)),
    "tensor": qj.QuantSpec(format=INT8, block=qj.Granularity.TENSOR),
    "asymmetric": qj.QuantSpec(format=INT8, symmetric=False, observer=qj.minmax()),
    "unsigned": qj.QuantSpec(format=UINT8, symmetric=False, observer=qj.minmax()),
    "positive": qj.QuantSpec(format=UINT8),
}


# One program for each product, where eager calls would be one for each operation.
dot = jax.jit(quantized_dot, static_argnums=(3, 4))
rounded = jax.jit(fake_activation, static_argnums=(1, 3))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def quantized(spec: qj.QuantSpec, *shape: int) -> qj.QTensor:
    return qj.quantize({"kernel": normal(*shape, seed=1)}, qj.Policy([("kernel", spec)]))["kernel"]


def kernel(preset: str, *shape: int) -> qj.QTensor:
    return qj.quantize({"kernel": normal(*shape, seed=1)}, preset)["kernel"]


def close(got, x, q, act, summed, numbers, given=None) -> None:
    """Equal to the product of the rounded values in float64, but for float32's roundings: of two
    scales, their product and the result, 4 of 2^-24; and of the values in the reference, 2 more
    on each term of the sum."""
    x, w = rounded(x, act, given, summed), np.asarray(qj.dequantize(q))
    expected, size = (dot_general(f(x), f(w), numbers) for f in (np.asarray, np.abs))
    assert np.all(np.abs(got - expected) <= 8 * 2.0**-24 * size)


# Daily packed codes of either sign, half levels, zero points, and scales of other blocks.
CORE = ("w3", "w1", "asymmetric", "unsigned, 3 bits", "one scale", "blocks of outputs")


@pytest.mark.parametrize("weight, act", dealt(daily(WEIGHTS, CORE), ACTS))
def test_formats(weight, act):
    act = ACTS[act]
    x, q = normal(3, 32), quantized(WEIGHTS[weight], 32, 10)
    assert plan_dot(q, act, PLAIN, 3).lowering is Lowering.INTEGER
    close(dot(x, q, None, act, PLAIN), x, q, act, (1,), PLAIN)


@pytest.mark.parametrize("rows", daily([1, 2, 33], [2]))
def test_rows_eager_and_jitted(rows):
    x, q = normal(rows, 64), kernel("w8", 64, 24)
    close(quantized_dot(x, q, None, ACT, PLAIN), x, q, ACT, (1,), PLAIN)
    jitted = jax.jit(lambda x, q: quantized_dot(x, q, None, ACT, PLAIN))(x, q)
    np.testing.assert_allclose(jitted, quantized_dot(x, q, None, ACT, PLAIN), rtol=4 * 2.0**-24)


@pytest.mark.parametrize("act", daily(ACTS, ["rows", "unsigned"]))
def test_batches_several_axes_and_transposed_weights(act):
    act = ACTS[act]
    spec = qj.QuantSpec(format=INT8, block=(1, None, 1), symmetric=False, observer=qj.minmax())
    x, numbers = normal(3, 5, 16), (((2,), (1,)), ((0,), (0,)))
    q = quantized(spec, 3, 16, 7)
    close(dot(x, q, None, act, numbers), x, q, act, (2,), numbers)
    spec = qj.QuantSpec(format=INT8, block=(1, None, None))
    q = quantized(spec, 7, 3, 16)
    x, numbers = normal(2, 3, 5, 16), (((1, 3), (1, 2)), ((), ()))
    close(dot(x, q, None, act, numbers), x, q, act, (1, 3), numbers)


@pytest.mark.parametrize("weight", daily(["w4g64", "w2g64", "w8g64"], ["w4g64"]))
def test_groups_along_the_sum(weight):
    x, q = normal(3, 128), kernel(weight, 128, 10)
    assert plan_dot(q, ACT, PLAIN, 3).lowering is Lowering.GROUPS
    close(dot(x, q, None, ACT, PLAIN), x, q, ACT, (1,), PLAIN)
    spec = qj.QuantSpec(format=qj.IntFormat(4), block=(2, 64, 1, 5))  # scales over heads, too
    q, x, numbers = quantized(spec, 4, 128, 2, 5), normal(4, 3, 128), (((2,), (1,)), ((0,), (0,)))
    close(dot(x, q, None, ACT, numbers), x, q, ACT, (2,), numbers)
    asymmetric = ACTS["asymmetric"]
    assert plan_dot(q, asymmetric, numbers, 3).lowering is Lowering.FLOAT


@pytest.mark.parametrize("act", daily(ACTS, ["tensor", "asymmetric", "positive"]))
def test_given_scales(act):
    """Static scales clip what lies beyond them, and are those of every row."""
    act, x, q = ACTS[act], normal(6, 32), kernel("w8", 32, 10)
    zero = None if act.symmetric else jnp.array(3, act.format.code_dtype)
    given = Scales(jnp.float32(1 / 100), zero)
    got = dot(x, q, given, act, PLAIN)
    close(got, x, q, act, (1,), PLAIN, given)
    np.testing.assert_array_equal(got[2:3], dot(x[2:3], q, given, act, PLAIN))


@pytest.mark.parametrize(
    "given, formats", dealt([None, Scales(jnp.float32(1 / 30))], [("w8", INT8), ("fp8", e4m3)])
)
def test_a_row_with_nan_is_nan_and_the_others_are_not(given, formats):
    x = normal(6, 64).at[1, 3].set(jnp.nan).at[4, 0].set(jnp.inf)
    act = qj.QuantSpec(format=formats[1])
    y = dot(x, kernel(formats[0], 64, 24), given, act, PLAIN)
    np.testing.assert_array_equal(jnp.isnan(y).all(1), [False, True, False, False, True, False])
    assert bool(jnp.isfinite(y[jnp.array([0, 2, 3, 5])]).all())


@pytest.mark.parametrize("act", daily(ACTS, ["rows", "asymmetric"]))
def test_a_row_of_zeros_is_zero(act):
    y = dot(jnp.zeros((2, 64)), kernel("w8", 64, 24), None, ACTS[act], PLAIN)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("given", [None, Scales(jnp.float32(1 / 127))])
def test_the_gradient_passes_straight_through(given):
    x, q = normal(3, 64), kernel("w8", 64, 24)
    got = jax.jit(jax.grad(lambda x: dot(x, q, given, ACT, PLAIN).sum()))(x)
    inside = 1.0 if given is None else jnp.abs(x) < 127.5 / 127  # beyond, it is clipped
    expected = inside * (jnp.ones((3, 24)) @ qj.dequantize(q).T)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight, act", dealt([e4m3, e5m2], [e5m2, e4m3]))
def test_floats_of_8_bits(weight, act):
    """Products of such floats are exact in float32; 64 of them are summed, each sum rounding by
    2^-24 of the whole; and scales as in `close`."""
    x, q, act = (
        normal(5, 64),
        quantized(qj.QuantSpec(format=weight), 64, 24),
        qj.QuantSpec(format=act),
    )
    assert plan_dot(q, act, PLAIN, 5).lowering is Lowering.FP8
    got = dot(x, q, None, act, PLAIN)
    expected = np.asarray(rounded(x, act, None, (1,)), np.float64)
    expected = expected @ np.asarray(qj.dequantize(q), np.float64)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(qj.dequantize(q)))
    assert np.all(np.abs(got - expected) <= 80 * 2.0**-24 * size)


@pytest.mark.parametrize("preset", ["w4g16", "nf4", "fp8", "mxfp8", "mxfp4"])
def test_what_has_no_integers_says_why(preset):
    plan = plan_dot(kernel(preset, 64, 24), ACT, PLAIN, 5)
    assert plan.lowering is Lowering.FLOAT and plan.reason


APPLIES = {
    "plain": (lambda p, x: x @ p["kernel"], (64, 24)),
    "transposed": (lambda p, x: x @ p["kernel"].T, (24, 64)),
    "weight first": (lambda p, x: (p["kernel"].T @ x.T).T, (64, 24)),
    "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["kernel"]), (64, 3, 8)),
    "heads, swapped": (lambda p, x: jnp.einsum("td,dhk->tkh", x, p["kernel"]), (64, 3, 8)),
    "two sums": (
        lambda p, x: jnp.einsum("tab,abo->to", x.reshape(-1, 4, 16), p["kernel"]),
        (4, 16, 5),
    ),
    "merged": (lambda p, x: x @ p["kernel"].reshape(64, 24), (64, 3, 8)),
}


DAILY = ("weight first", "heads, swapped", "two sums", "merged")


@pytest.mark.parametrize(
    "name, preset", dealt(daily(APPLIES, DAILY), ["w8a8", "w4a8", "w4g16a8", "w8a4"])
)
def test_interception_means_the_same_however_the_model_writes_it(name, preset):
    apply, shape = APPLIES[name]
    q = qj.quantize({"kernel": normal(*shape, seed=1)}, preset)
    x, act = normal(5, 64), q["kernel"].act
    got = jax.jit(intercept(apply))(q, x)
    # One scale a row of x is one a row of every form above, as each sums over all of a row.
    expected = apply(qj.dequantize(q), rounded(x, act, None, (1,)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
    (site,) = intercept(apply).report(q, x).sites
    assert site.act == str(act.format)
    # By its name the last axis of a kernel is the output; this model sums over it.
    across = name == "transposed" or "g" in preset
    assert site.lowering.startswith("float" if across else "int8 product")


@pytest.mark.parametrize(
    "preset", daily(["w8", "w4", "w4g64", "nf4", "w4g16a8", "mxfp8"], ["w4", "w4g16a8"])
)
def test_few_rows_read_codes(preset):
    """No float copy of the weight is made, and the result is that of the float product."""
    q, x = qj.quantize({"kernel": normal(4096, 512, seed=1)}, preset), normal(1, 4096)
    apply = lambda p, x: x @ p["kernel"]  # noqa: E731
    act = q["kernel"].act
    (site,) = intercept(apply).report(q, x).sites
    assert "from codes" in site.lowering
    seen = x if act is None else rounded(x, act, None, (1,))
    expected = apply(qj.dequantize(q), seen)
    np.testing.assert_allclose(jax.jit(intercept(apply))(q, x), expected, rtol=1e-5, atol=1e-3)
    memory = jax.jit(intercept(apply)).lower(q, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 512 * 4 / 2


def test_highest_precision_keeps_the_activation():
    def apply(p, x):
        return jnp.matmul(x, p["kernel"], precision="highest")

    q, x = qj.quantize({"kernel": normal(64, 24)}, "w8a8"), normal(5, 64)
    np.testing.assert_array_equal(intercept(apply)(q, x), apply(qj.dequantize(q), x))


@pytest.mark.parametrize(
    "formats",
    daily([(INT8, INT8), (UINT8, UINT8), (e4m3, e5m2)], [(UINT8, UINT8), (e4m3, e5m2)]),
)
def test_an_intercepted_model_exports_to_three_platforms_at_once(formats):
    act = qj.QuantSpec(format=formats[1], symmetric=formats[1] is not UINT8, observer=qj.minmax())
    spec = qj.QuantSpec(format=formats[0], act=act)
    q = qj.quantize({"kernel": normal(64, 24)}, qj.Policy(otherwise=spec))
    x = normal(5, 64)
    run = jax.jit(lambda x: intercept(lambda p, x: x @ p["kernel"])(q, x))
    data = jax.export.export(run, platforms=["cpu", "cuda", "tpu"])(x).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(data).call(x), run(x))


def test_a_missing_static_scale_is_an_error():
    act = dataclasses.replace(ACT, block=qj.Granularity.TENSOR, static=True)
    spec = qj.QuantSpec(format=INT8, act=act)
    q = qj.quantize({"a": {"kernel": normal(64, 24)}}, qj.Policy(otherwise=spec))
    with pytest.raises(ValueError, match="a/kernel: the scale of its activation is static"):
        intercept(lambda p, x: x @ p["a"]["kernel"])(q, normal(5, 64))
    with pytest.raises(ValueError, match="block=Granularity.TENSOR"):
        qj.QuantSpec(format=INT8, static=True)


def test_a_static_scale_once_found_is_used():
    act = dataclasses.replace(ACT, block=qj.Granularity.TENSOR, static=True)
    q = qj.quantize({"w": normal(64, 24)}, qj.Policy([("w", qj.QuantSpec(format=INT8, act=act))]))
    leaf = dataclasses.replace(q["w"], act_scale=jnp.float32(0.01))
    x = normal(5, 64)
    got = jax.jit(intercept(lambda p, x: x @ p["w"]))({"w": leaf}, x)
    seen = np.clip(np.round(np.asarray(x) * 100.0), -127, 127) * np.float32(0.01)
    # 64 terms of size one, and codes at a half rounded by a product or by a quotient.
    np.testing.assert_allclose(got, seen @ qj.dequantize(leaf), rtol=1e-4, atol=0.05)
