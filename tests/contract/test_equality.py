"""One set of numbers everywhere, to the last bit: every format, granularity and dtype.

dequantize(quantize(p)) is fake_quantize(p), jitted or not, with scales passed as arguments or
compiled in as constants. No tolerance: bits are compared, so -0 is not 0."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import affine, formats
from quantjax.formats import Codebook, ExponentFormat, IntFormat, Levels
from quantjax.spec import QuantSpec
from tests.daily import daily, dealt

FORMATS: dict[str, dict[str, Any]] = {
    "int8": dict(format=IntFormat(8)),
    "int8 full": dict(format=IntFormat(8, levels=Levels.FULL)),
    "int8 asymmetric": dict(format=IntFormat(8), symmetric=False, observer=qj.minmax()),
    "int5": dict(format=IntFormat(5)),
    "int4": dict(format=IntFormat(4)),
    "int4 full": dict(format=IntFormat(4, levels=Levels.FULL)),
    "int4 half": dict(format=IntFormat(4, levels=Levels.HALF)),
    "int4 mse": dict(format=IntFormat(4), observer=qj.mse(steps=10)),
    "int4 percentile": dict(format=IntFormat(4), observer=qj.percentile(90.0)),
    "int4 asymmetric": dict(format=IntFormat(4), symmetric=False, observer=qj.minmax()),
    "uint4": dict(format=IntFormat(4, signed=False)),
    "uint4 asymmetric": dict(
        format=IntFormat(4, signed=False), symmetric=False, observer=qj.minmax()
    ),
    "int3 half": dict(format=IntFormat(3, levels=Levels.HALF)),
    "ternary": dict(format=formats.ternary),
    "binary": dict(format=formats.binary),
    "e4m3": dict(format=formats.e4m3),
    "e5m2": dict(format=formats.e5m2),
    "e3m2": dict(format=formats.e3m2),
    "e2m3": dict(format=formats.e2m3),
    "e2m1": dict(format=formats.e2m1),
    "nf4": dict(format=formats.nf4),
    "apot6": dict(format=formats.apot(6)),
    "kmeans3": dict(format=Codebook.learned(3)),
    "mxfp4": dict(format=formats.e2m1, scale_format=ExponentFormat()),
    "mxint8": dict(format=IntFormat(8), scale_format=ExponentFormat(formats.ScaleRule.CEIL)),
    "nvfp4": dict(format=formats.e2m1, scale_format=formats.e4m3),
    "double": dict(
        format=IntFormat(4), scale_format=QuantSpec(format=IntFormat(8), block=(None, None))
    ),
}
SHAPE = (12, 8)
GRANULARITIES: dict[str, dict[str, Any]] = {
    "channel": dict(block=(None, 1)),
    "tensor": dict(block=(None, None)),
    "group": dict(block=(4, 1)),
    "short group": dict(block=(5, 1)),
    "tile": dict(block=(5, 3)),
    "stacked": dict(block=(None, 1), stacked=1),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# Daily is each kind of grid and of scale with one granularity and one dtype. The rest of the
# product is `full`, as is all but a core of formats in the further questions, of which each is
# asked a quarter.
KINDS = ("int8 asymmetric", "int4 half", "int4 percentile", "e5m2", "nf4", "kmeans3", "mxint8")
CORE = ("int8", "int4 half", "int4 asymmetric", "e4m3", "kmeans3", "nf4", "nvfp4", "mxfp4")
each_cell = pytest.mark.parametrize(
    "fmt, granularity, dtype",
    dealt(daily(FORMATS, (*KINDS, "double")), GRANULARITIES, DTYPES),
)
each_format, each_other = (
    pytest.mark.parametrize("fmt", daily(FORMATS, CORE[i::4])) for i in (0, 1)
)


def make(fmt: str, granularity: str = "channel", **more: Any) -> QuantSpec:
    return QuantSpec(**{**FORMATS[fmt], **GRANULARITIES[granularity], **more})


def sample(granularity: str = "channel", dtype: Any = jnp.float32) -> jax.Array:
    """Normal values with ties, zeros of both signs, tiny numbers and an all-zero column."""
    shape = (3, *SHAPE) if granularity == "stacked" else SHAPE
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x[..., 0, :4] = [0.0, -0.0, 1e-6, -1e-6]
    x[..., :, 5] = 0
    x[..., :, 6] = np.round(x[..., :, 6] * 4) / 8
    x[..., 0, 6] = 7 * np.max(np.abs(x[..., :, 6]))  # an outlier: many codes are zero
    return jnp.asarray(x, dtype)


def assert_same_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.dtype == v.dtype and u.shape == v.shape
        u, v = np.asarray(u), np.asarray(v)
        if u.dtype.kind not in "iu":
            as_int = np.dtype(f"u{u.dtype.itemsize}")
            u, v = u.view(as_int), v.view(as_int)
        np.testing.assert_array_equal(u, v)


@functools.partial(jax.jit, static_argnames="spec")
def find(x: jax.Array, spec: QuantSpec) -> affine.Scales:
    return affine.find_scales(x, spec)


def there_and_back(x, scales, spec, uniform=None):
    return affine.dequantize_array(affine.quantize_array(x, scales, uniform, spec=spec))


@each_cell
def test_one_set_of_numbers(fmt, granularity, dtype):
    spec, x = make(fmt, granularity), sample(granularity, DTYPES[dtype])
    policy = qj.Policy([("w", spec)])
    q = qj.quantize({"w": x}, policy)
    y = qj.dequantize(q)["w"]
    assert y.dtype == x.dtype and y.shape == x.shape == q["w"].shape
    assert bool(jnp.isfinite(y).all())
    assert_same_bits(qj.fake_quantize({"w": x}, policy)["w"], y)

    # Constants are folded, by other rewrites than values that arrive at run time. Each way is a
    # program of its own, so that the compiler can not merge the two.
    scales = affine.scales_of(q["w"])
    x = x * 1.25  # so that some values are clipped
    fake = affine.fake_quantize_array(x, scales, spec=spec)  # operation by operation
    assert_same_bits(jax.jit(lambda x: there_and_back(x, scales, spec))(x), fake)
    assert_same_bits(jax.jit(lambda x: affine.fake_quantize_array(x, scales, spec=spec))(x), fake)


@each_format
def test_like_takes_the_scales_of_a_quantized_tree(fmt):
    p = {"w": sample()}
    q = qj.quantize(p, qj.Policy([("w", make(fmt, "short group"))]))
    y = qj.dequantize(q)
    assert_same_bits(qj.quantize(p, like=q), q)
    assert_same_bits(qj.fake_quantize(p, like=q), y)
    # Values on the grid stay where they are.
    assert_same_bits(qj.dequantize(qj.quantize(y, like=q)), y)


@pytest.mark.parametrize("fmt", daily(FORMATS, CORE))
def test_range_scales_are_equal_jitted_or_not(fmt):
    """absmax and minmax scales; searched ones are equal as both ways call one program."""
    if FORMATS[fmt].get("observer", qj.absmax()) not in (qj.absmax(), qj.minmax()):
        pytest.skip("a searched scale")
    spec, x = make(fmt, "tile"), sample()
    if isinstance(spec.format, Codebook) and spec.format.learned_bits:
        pytest.skip("a searched codebook")
    assert_same_bits(find(x, spec), affine.find_scales(x, spec))
    assert_same_bits(jax.jit(lambda: affine.find_scales(x, spec))(), find(x, spec))


@each_other
def test_stochastic_rounding_agrees_for_one_key(fmt, key):
    spec, x = make(fmt, "short group", rounding=qj.Rounding.STOCHASTIC), sample()
    policy = qj.Policy([("w", spec)])
    q = qj.quantize({"w": x}, policy, key=key)
    fake = qj.fake_quantize({"w": x}, policy, key=key)["w"]
    assert_same_bits(qj.dequantize(q)["w"], fake)
    jitted = jax.jit(lambda p, k: qj.fake_quantize(p, policy, key=k))({"w": x}, key)["w"]
    assert_same_bits(jitted, fake)
    nearest = affine.fake_quantize_array(x, affine.scales_of(q["w"]), spec=spec)
    assert bool((fake != nearest).any())
    # With the noise and the scales compiled in, sums and products might contract.
    noise, scales = jax.random.uniform(key, x.shape), affine.scales_of(q["w"])
    fake = affine.fake_quantize_array(x, scales, noise, spec=spec)
    assert_same_bits(jax.jit(lambda x: there_and_back(x, scales, spec, noise))(x), fake)


@each_format
def test_vmap_and_stacking_are_a_loop(fmt):
    """Layers of a stacked tensor, and members of a vmap, are what each would be alone."""
    spec, x = make(fmt, "stacked"), sample("stacked")
    alone = make(fmt, "channel")
    stacked = qj.quantize({"w": x}, qj.Policy([("w", spec)]))["w"]
    scales = find(x, spec)
    fake = affine.fake_quantize_array(x, scales, spec=spec)
    for i in range(3):
        own = jax.tree.map(lambda a: a[i], scales)  # noqa: B023
        assert_same_bits(affine.fake_quantize_array(x[i], own, spec=alone), fake[i])
        layer = jax.tree.map(lambda a: a[i], stacked)  # noqa: B023
        assert_same_bits(affine.dequantize_array(layer), fake[i])
    mapped = jax.vmap(lambda x, s: affine.fake_quantize_array(x, s, spec=alone))(x, scales)
    assert_same_bits(mapped, fake)
    q = jax.vmap(lambda x, s: affine.quantize_array(x, s, spec=alone))(x, scales)
    assert_same_bits(affine.dequantize_array(q), fake)


@each_other
def test_the_forward_value_is_exact_under_grad(fmt):
    spec, x = make(fmt), sample()
    scales = find(x, spec)

    def loss(x):
        y = affine.fake_quantize_array(x, scales, spec=spec)
        return y.sum(), y

    (_, y), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    assert_same_bits(y, there_and_back(x, scales, spec))
