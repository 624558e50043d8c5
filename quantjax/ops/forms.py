"""In which forms can a CPU compute the exact product of 8-bit codes?

Three, of one meaning. u8s8: the StableHLO operation `uint8 x int8 -> int32`, which reaches the VNNI
and AMX kernels of jaxlib >= 0.10.1 and which JAX can not say, as `lax.dot_general` first makes both
operands one type. s8s8: `int8 x int8 -> int32`. float32: sums short enough to be exact, added as
integers. `quantjax.ops.probe` finds out which is fast.

The first two may add a row of ones below x. Codes of the other sign are shifted by 128, and
sum_k (x_k + 128) w_k - 128 sum_k w_k takes the sums of w, which that row gives at next to no cost
(summing int8 without a product takes longer than a small product). It also keeps a single row off
the scalar code that XLA has for a vector times a matrix, and a transposed x from being folded into
the product, where it is up to 30 times slower."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from jaxtyping import Array, Int8, Int32, UInt8

Pair = tuple[tuple[int, ...], tuple[int, ...]]
DimensionNumbers = tuple[Pair, Pair]  # (summed axes, batch axes) of both operands
Codes = Int8[Array, "*x"] | UInt8[Array, "*x"]

# float32 holds every integer up to 2^24; 128 * 128 * 1024 is that, 255 * 128 * 512 is below.
EXACT = {np.dtype(np.int8): 1024, np.dtype(np.uint8): 512}


def flip(x: Codes) -> Codes:
    """uint8 less 128 as int8, int8 plus 128 as uint8: the same bits, the highest one turned.

    >>> flip(jnp.array([0, 255], jnp.uint8)).tolist(), flip(jnp.array([-128], jnp.int8)).tolist()
    ([-128, 127], [0])
    """
    if x.dtype == np.uint8:
        return lax.bitcast_convert_type(x ^ np.uint8(128), jnp.int8)
    return lax.bitcast_convert_type(x, jnp.uint8) ^ np.uint8(128)


def s8s8(x: Codes, w: Int8[Array, "*w"], dimension_numbers: DimensionNumbers) -> jax.Array:
    """The product by int8 x int8, a uint8 x shifted down by 128."""
    if x.dtype == np.uint8:
        return _product(signed_dot, flip(x), w, dimension_numbers, shift=128)
    return _product(signed_dot, x, w, dimension_numbers)


def u8s8(x: Codes, w: Int8[Array, "*w"], dimension_numbers: DimensionNumbers) -> jax.Array:
    """The product by uint8 x int8, an int8 x shifted up by 128."""
    if x.dtype == np.int8:
        return _product(_mixed_dot, flip(x), w, dimension_numbers, shift=-128)
    return _product(_mixed_dot, x, w, dimension_numbers)


def float32(x: Codes, w: Int8[Array, "*w"], dimension_numbers: DimensionNumbers) -> jax.Array:
    """The product in float32, in parts of the sum that are exact."""
    (cx, cw), (bx, bw) = dimension_numbers
    exact, lead = EXACT[np.dtype(x.dtype)], len(bx)
    rows, free = _others(x.ndim, cx, bx), _others(w.ndim, cw, bw)
    out = _lengths(x, bx) + _lengths(x, rows) + _lengths(w, free)
    length = math.prod(_lengths(x, cx))
    batch = _lengths(x, bx)
    x = lax.transpose(x, [*bx, *rows, *cx]).reshape(*batch, math.prod(_lengths(x, rows)), length)
    w = lax.transpose(w, [*bw, *cw, *free]).reshape(*batch, length, math.prod(_lengths(w, free)))
    numbers = (((lead + 1,), (lead,)), (tuple(range(lead)), tuple(range(lead))))

    def part(start: Any, size: int) -> jax.Array:
        a = lax.dynamic_slice_in_dim(x, start, size, lead + 1).astype(jnp.float32)
        b = lax.dynamic_slice_in_dim(w, start, size, lead).astype(jnp.float32)
        y = lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST)
        return y.astype(jnp.int32)

    if length <= exact:
        return part(0, length).reshape(out)
    count = length // exact
    y = part(count * exact, length - count * exact)
    y = lax.fori_loop(0, count, lambda i, y: y + part(i * exact, exact), y)
    return y.reshape(out)


FORMS: dict[str, Callable[..., jax.Array]] = {"u8s8": u8s8, "s8s8": s8s8, "float32": float32}


def _others(ndim: int, *used: Any) -> list[int]:
    return [a for a in range(ndim) if not any(a in axes for axes in used)]


def _lengths(x: jax.Array, axes: Any) -> tuple[Any, ...]:  # numbers, or symbols of jax.export
    return tuple(x.shape[a] for a in axes)


def _product(
    dot: Callable[..., jax.Array],
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: DimensionNumbers,
    *,
    shift: int = 0,
) -> jax.Array:
    """sum_k (x_k + shift) w_k by `dot`, laid out so that it is fast."""
    (cx, cw), (bx, bw) = dimension_numbers
    # Summed axes in the order of w, which is the operand that is costly to transpose.
    order = sorted(range(len(cw)), key=lambda i: cw[i])
    cx, cw = tuple(cx[i] for i in order), tuple(cw[i] for i in order)
    rows, free, lead = _others(x.ndim, cx, bx), _others(w.ndim, cw, bw), len(bx)
    out = _lengths(x, bx) + _lengths(x, rows) + _lengths(w, free)

    # x as (batch, one axis of rows, summed axes)
    axes, count = [*bx, *rows, *cx], math.prod(_lengths(x, rows))
    x = lax.transpose(x, axes).reshape(*_lengths(x, bx), count, *_lengths(x, cx))
    # A length that is not a number is a symbol of jax.export, and may be one.
    several = isinstance(count, int) and count > 1
    add_row = bool(shift) or axes != sorted(axes) or not several
    # JAX pads no axis that an explicit mesh cuts; such rows are many.
    sums_apart = None
    if add_row and jax.typeof(x).sharding.spec[lead] is not None:
        add_row, sums_apart = False, column_sums(w, ((cx, cw), (bx, bw)), 1)
    if add_row:
        one = x.dtype.type(1)
        x = lax.pad(x, one, [(0, int(a == lead), 0) for a in range(x.ndim)])

    # A single column would be scalar code too.
    add_column = all(isinstance(w.shape[a], int) and w.shape[a] == 1 for a in free)
    if add_column:
        w = lax.transpose(w, [*bw, *cw, *free]).reshape(*_lengths(w, bw), *_lengths(w, cw), 1)
        bw, cw = tuple(range(lead)), tuple(range(lead, w.ndim - 1))
        w = lax.pad(w, np.int8(0), [(0, int(a == w.ndim - 1), 0) for a in range(w.ndim)])

    y = dot(x, w, ((tuple(range(lead + 1, x.ndim)), cw), (tuple(range(lead)), bw)))
    if add_column:
        y = lax.slice_in_dim(y, 0, 1, axis=y.ndim - 1)
    if add_row:
        sums = lax.slice_in_dim(y, count, count + 1, axis=lead)
        y = lax.slice_in_dim(y, 0, count, axis=lead)
        y = y + np.int32(shift) * sums if shift else y
    if sums_apart is not None:
        y = (
            y.reshape(*y.shape[: lead + 1], *sums_apart.shape[lead + 1 :])
            + np.int32(shift) * sums_apart
        )
    return y.reshape(out)


def column_sums(
    w: Int8[Array, "*w"], dimension_numbers: DimensionNumbers, rows: int
) -> Int32[Array, "*sums"]:
    """sum_k w_k, as it meets a product with so many axes of rows."""
    (_, cw), (_, bw) = dimension_numbers
    free, kept = _others(w.ndim, cw, bw), [a for a in range(w.ndim) if a not in cw]
    sums = lax.transpose(jnp.sum(w, cw, dtype=jnp.int32), [kept.index(a) for a in (*bw, *free)])
    return sums.reshape(*sums.shape[: len(bw)], *(1,) * rows, *sums.shape[len(bw) :])


def signed_dot(
    x: Int8[Array, "*x"], w: Int8[Array, "*w"], dimension_numbers: DimensionNumbers
) -> Int32[Array, "*y"]:
    """int8 x int8 -> int32 as JAX says it, for the platforms that have it in hardware."""
    return lax.dot_general(x, w, dimension_numbers, preferred_element_type=jnp.int32)


def _mixed_dot(x: jax.Array, w: jax.Array, dimension_numbers: DimensionNumbers) -> jax.Array:
    return u8s8_p.bind(x, w, dimension_numbers=dimension_numbers)


u8s8_p = Primitive("u8s8_dot_general")


@u8s8_p.def_abstract_eval
def _abstract(x: Any, w: Any, *, dimension_numbers: DimensionNumbers) -> Any:
    as_signed = jax.ShapeDtypeStruct(x.shape, jnp.int8)
    out = jax.eval_shape(lambda x, w: signed_dot(x, w, dimension_numbers), as_signed, w)
    return jax.core.ShapedArray(out.shape, jnp.int32)


def _lower(ctx: Any, x: Any, w: Any, *, dimension_numbers: DimensionNumbers) -> list[Any]:
    (cx, cw), (bx, bw) = dimension_numbers
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=list(bx),
        rhs_batching_dimensions=list(bw),
        lhs_contracting_dimensions=list(cx),
        rhs_contracting_dimensions=list(cw),
    )
    unknown = ir.ShapedType.get_dynamic_size()  # a symbol of jax.export
    shape = [n if isinstance(n, int) else unknown for n in ctx.avals_out[0].shape]
    out = ir.RankedTensorType.get(shape, ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(out, x, w, numbers)]


mlir.register_lowering(u8s8_p, _lower)
