"""A product of an activation, rounded on the way, with a quantized weight.

y = s_x s_w sum_k (q_x - z_x)(q_w - z_w): where the scales are constant along the sum they come
after it, and the sum is one of integers. Jacob et al. 2018, arXiv:1712.05877, section 2.2-2.3."""

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import Scales, codes_of, dequantize_array, scale_values, zero_cotangent
from quantjax.blocks import counts, sizes, spread
from quantjax.formats import FloatFormat, IntFormat, Specials
from quantjax.ops.activation import activation_codes, fake_activation
from quantjax.ops.forms import DimensionNumbers
from quantjax.ops.grouped import grouped_dot, grouped_pays
from quantjax.ops.integer import integer_dot_general
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec


class Lowering(enum.Enum):
    """How a product of two rounded operands is computed."""

    INTEGER = "int8 product"
    GROUPS = "int8 products of groups"
    FP8 = "fp8 product"
    FLOAT = "float, both sides rounded"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The lowering of a product, and why it is not one of integers or of 8-bit floats.

    on_cpu: why a CPU multiplies rounded floats all the same. `str` speaks of the platform that JAX
    runs on by default.
    """

    lowering: Lowering
    reason: str = ""
    on_cpu: str = ""

    def __str__(self) -> str:
        if self.on_cpu and jax.default_backend() == "cpu":
            return f"{Lowering.FLOAT.value} on CPU: {self.on_cpu}"
        return f"{self.lowering.value}: {self.reason}" if self.reason else self.lowering.value


def plan_dot(q: QTensor, act: QuantSpec, numbers: DimensionNumbers, rows: int) -> Plan:
    """What `quantized_dot` does for this weight, activation, and number of rows of x."""
    (_, cw), (_, bw) = numbers
    if isinstance(q.format, FloatFormat) and isinstance(act.format, FloatFormat):
        reason = _no_fp8(q, act, cw)
        return Plan(Lowering.FLOAT, reason) if reason else _FP8_PLAN
    reason = no_integers(q, act, math.prod(q.shape[a] for a in cw))
    if reason:
        return Plan(Lowering.FLOAT, reason)
    blocks = counts(q.shape, q.block)
    if all(blocks[a] == 1 for a in cw):
        return Plan(Lowering.INTEGER)
    reason = _no_groups(q, act, numbers, rows)
    return Plan(Lowering.FLOAT, reason) if reason else Plan(Lowering.GROUPS)


BESIDE = "an input scale or low-rank factors beside the codes"
LONGEST = 2**16  # terms of 255 * 128 whose sum fits int32


def no_integers(q: QTensor, act: QuantSpec, terms: int) -> str:
    """Why formats, or the number of terms, rule a product of integers out; empty if they do not."""
    if not q.is_bare:
        return BESIDE
    if not isinstance(q.format, IntFormat) or not isinstance(act.format, IntFormat):
        return f"{q.format} with activations in {act.format}"
    if q.zero_point is not None and jnp.issubdtype(q.zero_point.dtype, jnp.floating):
        return "a zero point between two codes"
    if not act.format.has_zero:
        return "activations without a zero"
    if not q.format.has_zero and q.format.bits == 8:
        return "half-integer levels of 8 bits"
    if isinstance(q.scale, QTensor):
        return "a quantized scale"
    return f"a sum of {terms} terms" if terms > LONGEST else ""


def _no_groups(q: QTensor, act: QuantSpec, numbers: DimensionNumbers, rows: int) -> str:
    (_, cw), (_, bw) = numbers
    lead = len(bw)
    if tuple(cw) != (lead,) or tuple(bw) != tuple(range(lead)) or not act.symmetric:
        return "several scales along the sum"
    groups = counts(q.shape, q.block)[lead]
    if q.zero_point is not None or q.shape[lead] % groups:
        return "several scales along the sum"
    return "" if grouped_pays(rows, q.shape[lead] // groups) else "short groups along the sum"


_FP8_PLAN = Plan(Lowering.FP8, on_cpu="it has no 8-bit floats")
_FP8 = {
    FloatFormat(4, 3, Specials.NAN): jnp.float8_e4m3fn,
    FloatFormat(5, 2, Specials.IEEE): jnp.float8_e5m2,
}


def _no_fp8(q: QTensor, act: QuantSpec, summed: Sequence[int]) -> str:
    if q.format not in _FP8 or act.format not in _FP8:
        return f"{q.format} with activations in {act.format}"
    if not q.is_bare:
        return BESIDE
    if isinstance(q.scale, QTensor):
        return "a quantized scale"
    blocks = counts(q.shape, q.block)
    return "several scales along the sum" if any(blocks[a] > 1 for a in summed) else ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def quantized_dot(
    x: Float[Array, "*x"],
    q: QTensor,
    given: Scales | None,
    act: QuantSpec,
    dimension_numbers: DimensionNumbers,
) -> Float[Array, "*y"]:
    """`lax.dot_general(round(x), dequantize(q), dimension_numbers)` in float32.

    x is rounded as `fake_activation` rounds it, under `given` static scales or its own. Exact but
    for the roundings of x, of the scales and of the result: sums are integers (`plan_dot` says
    where). A row with NaN or infinity comes out as NaN. The gradient passes straight through the
    rounding of x, and is 0 where x is clipped; none reaches q or the scales.
    """
    (cx, cw), (bx, bw) = dimension_numbers
    rows = [a for a in range(x.ndim) if a not in (*cx, *bx)]
    row_shape, lead = tuple(x.shape[a] for a in rows), len(bx)
    many = math.prod(row_shape)
    lowering = plan_dot(q, act, dimension_numbers, many).lowering
    if lowering is Lowering.FLOAT:
        return _float_dot(x, q, given, act, dimension_numbers)
    # x as (batch, one axis of rows, summed axes); the result as (batch, rows, free axes of q).
    x = jnp.transpose(x, [*bx, *rows, *cx]).astype(jnp.float32)
    x = x.reshape(*x.shape[:lead], many, *x.shape[lead + len(rows) :])
    summed = tuple(range(lead + 1, x.ndim))
    numbers = ((summed, tuple(cw)), (tuple(range(lead)), tuple(bw)))
    codes, scales = activation_codes(x, act, given, summed)
    if lowering is Lowering.FP8:
        y = _fp8_dot(codes, q, act, numbers)
    elif lowering is Lowering.GROUPS:
        y = _groups_dot(codes, q, lead)
    else:
        y = _integer_dot(codes, scales.zero_point, q, numbers).astype(jnp.float32)
    free = y.ndim - lead - 1
    s_x = scale_values(scales.scale)
    s_x = s_x.reshape(*s_x.shape[: lead + 1], *(1,) * free)
    if lowering is not Lowering.GROUPS:  # there they stand inside the sum
        s_x = s_x * (along_output(scale_values(q.scale), q, numbers) * level_factor(q))
    y = y * s_x
    return y.reshape(*y.shape[:lead], *row_shape, *y.shape[lead + 1 :])


def _float_dot(x, q, given, act, dimension_numbers):
    w = dequantize_array(q).astype(jnp.float32)
    x = fake_activation(x.astype(jnp.float32), act, given, dimension_numbers[0][0])
    return lax.dot_general(x, w, dimension_numbers)


def _forward(x, q, given, act, dimension_numbers):
    return quantized_dot(x, q, given, act, dimension_numbers), (x, q, given)


def _backward(act, dimension_numbers, residuals, gradient):
    x, q, given = residuals
    (dx,) = jax.vjp(lambda x: _float_dot(x, q, given, act, dimension_numbers), x)[1](gradient)
    return dx, *jax.tree.map(zero_cotangent, (q, given))


quantized_dot.defvjp(_forward, _backward)


def integer_codes(q: QTensor) -> tuple[jax.Array, jax.Array | int | None]:
    """int8 codes of a weight, and what is to be taken off them: levels are `factor` times
    (code - zero), see `level_factor`. Half-integer levels are the odd integers over two; unsigned
    codes of 8 bits are moved into the range of int8."""
    codes = codes_of(q)
    zero: jax.Array | int | None = None
    if q.zero_point is not None:
        zero = q.zero_point.astype(jnp.int32)
    if not isinstance(q.format, IntFormat) or q.format.signed:
        # 2 codes + 1, without arithmetic of int8: see `affine._loaded`.
        return ((codes << np.int8(1)) | np.int8(1), zero) if level_factor(q) != 1 else (codes, zero)
    shifted = lax.bitcast_convert_type(codes ^ np.uint8(128), jnp.int8)
    return shifted, -128 if zero is None else zero - 128


def level_factor(q: QTensor) -> np.float32:
    """A level of the weight over its integer code."""
    return np.float32(1.0 if getattr(q.format, "has_zero", True) else 0.5)


def _integer_dot(codes, zero_x, q: QTensor, numbers: DimensionNumbers) -> jax.Array:
    """sum_k (c_x - z_x)(c_w - z_w) in int32. The sums of the weight's codes come of a row of ones
    in the same product; those of the activation's of one pass over it."""
    (summed, cw), (batch, _) = numbers
    lead = len(batch)
    w, zero_w = integer_codes(q)
    if zero_x is not None:
        ones = jnp.ones_like(lax.slice_in_dim(codes, 0, 1, axis=lead))
        y = integer_dot_general(jnp.concatenate([codes, ones], lead), w, numbers)
        y, sums = jnp.split(y, [codes.shape[lead]], lead)
    else:
        y, sums = integer_dot_general(codes, w, numbers), None
    free = y.ndim - lead - 1
    z_x = None
    if zero_x is not None:
        z_x = zero_x.astype(jnp.int32)
        z_x = z_x.reshape(*z_x.shape[: lead + 1], *(1,) * free)
        y = y - z_x * sums
    if zero_w is not None:
        z_w = zero_w if isinstance(zero_w, int) else along_output(zero_w, q, numbers)
        total = jnp.sum(codes, summed, dtype=jnp.int32)
        total = total.reshape(*total.shape, *(1,) * free)
        if z_x is not None:
            total = total - z_x * np.int32(math.prod(codes.shape[a] for a in summed))
        y = y - z_w * total
    return y


def along_output(per_block: jax.Array, q: QTensor, numbers: DimensionNumbers) -> jax.Array:
    """One value per block of q, constant along the sum, as it multiplies (batch, rows, free)."""
    (_, cw), (_, bw) = numbers
    if not per_block.ndim:
        return per_block
    free = [a for a in range(q.ndim) if a not in (*cw, *bw)]
    out = jnp.transpose(spread(per_block, q.shape, q.block), [*bw, *free, *cw])
    return out.reshape(*out.shape[: len(bw)], 1, *out.shape[len(bw) : len(bw) + len(free)])


def _groups_dot(codes: jax.Array, q: QTensor, lead: int) -> jax.Array:
    """The product without the scales of x, as (batch, rows, free axes)."""
    w, scale = integer_codes(q)[0], scale_values(q.scale) * level_factor(q)
    whole = tuple(1 if a == lead else b for a, b in enumerate(sizes(q.shape, q.block)))
    scale = spread(scale, (*q.shape[:lead], scale.shape[lead], *q.shape[lead + 1 :]), whole)
    scale = jnp.broadcast_to(scale, (*q.shape[:lead], scale.shape[lead], *q.shape[lead + 1 :]))
    merged = (a.reshape(*a.shape[: lead + 1], -1) for a in (codes, w, scale))
    return grouped_dot(*merged).reshape(*codes.shape[: lead + 1], *q.shape[lead + 1 :])


def _fp8_dot(codes: jax.Array, q: QTensor, act: QuantSpec, numbers: DimensionNumbers) -> jax.Array:
    """Codes of 8-bit floats, multiplied as such where the platform can; CPUs decode them, as XLA
    would there, operand by operand."""
    assert isinstance(q.format, FloatFormat) and isinstance(act.format, FloatFormat)
    x_format, w_format = act.format, q.format

    def decoded(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(x_format.decode(x), w_format.decode(w), numbers)

    def native(x: jax.Array, w: jax.Array) -> jax.Array:
        x = lax.bitcast_convert_type(x, _FP8[x_format])
        w = lax.bitcast_convert_type(w, _FP8[w_format])
        return lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)

    return lax.platform_dependent(codes, codes_of(q), cpu=decoded, default=native)
