"""The integer product of 8-bit codes that XLA's fast CPU kernels compute: u8 x s8 -> s32.

JAX can not say it, as `lax.dot_general` first makes both operands one type. StableHLO can, so here
is a primitive of two lowerings: on CPU the raw operation, which reaches the VNNI kernels of
jaxlib >= 0.10.1; elsewhere s8 x s8, which the tensor cores of GPUs and TPUs have, with the
first operand shifted by 128."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import batching, mlir
from jaxtyping import Array, Int8, Int32, UInt8

Pair = tuple[tuple[int, ...], tuple[int, ...]]
DimensionNumbers = tuple[Pair, Pair]  # (summed axes, batch axes) of both operands

u8s8_p = Primitive("u8s8_dot_general")


def u8s8_dot(
    x: UInt8[Array, "*x"], w: Int8[Array, "*w"], dimension_numbers: DimensionNumbers
) -> Int32[Array, "*y"]:
    """sum_k x_k w_k in int32, exactly, with the dimension numbers of `lax.dot_general`.

    >>> x, w = jnp.array([[255, 1]], jnp.uint8), jnp.array([[-127], [5]], jnp.int8)
    >>> u8s8_dot(x, w, (((1,), (0,)), ((), ()))).tolist()
    [[-32380]]
    """
    (cx, cw), (bx, bw) = dimension_numbers
    numbers = ((tuple(cx), tuple(cw)), (tuple(bx), tuple(bw)))
    return u8s8_p.bind(x, w, dimension_numbers=numbers)


def _as_signed(x: jax.Array) -> jax.Array:
    """u8 as s8 less 128: the same bits with the highest one turned."""
    return lax.bitcast_convert_type(x ^ np.uint8(128), jnp.int8)


def _reference(x: jax.Array, w: jax.Array, *, dimension_numbers: DimensionNumbers) -> jax.Array:
    """x w = (x - 128) w + 128 sum w, all products of signed codes."""
    (cx, cw), (bx, bw) = dimension_numbers
    signed = lax.dot_general(_as_signed(x), w, dimension_numbers, preferred_element_type=jnp.int32)
    free = [a for a in range(w.ndim) if a not in (*cw, *bw)]
    sums = jnp.sum(w, cw, dtype=jnp.int32)
    kept = [a for a in range(w.ndim) if a not in cw]
    sums = jnp.transpose(sums, [kept.index(a) for a in (*bw, *free)])
    rows = x.ndim - len(cx) - len(bx)
    shape = (*sums.shape[: len(bw)], *(1,) * rows, *sums.shape[len(bw) :])
    return signed + 128 * sums.reshape(shape)


def _abstract(x: Any, w: Any, *, dimension_numbers: DimensionNumbers) -> Any:
    if (x.dtype, w.dtype) != (np.uint8, np.int8):
        raise TypeError(f"u8s8_dot: expected uint8 and int8, got {x.dtype} and {w.dtype}.")
    out = jax.eval_shape(
        lambda x, w: lax.dot_general(x, w, dimension_numbers, preferred_element_type=jnp.int32),
        jax.ShapeDtypeStruct(x.shape, jnp.int8),
        jax.ShapeDtypeStruct(w.shape, jnp.int8),
    )
    return jax.core.ShapedArray(out.shape, jnp.int32)


def _raw(ctx: Any, x: Any, w: Any, *, dimension_numbers: DimensionNumbers) -> list[Any]:
    (cx, cw), (bx, bw) = dimension_numbers
    numbers = stablehlo.DotDimensionNumbers.get(
        lhs_batching_dimensions=list(bx),
        rhs_batching_dimensions=list(bw),
        lhs_contracting_dimensions=list(cx),
        rhs_contracting_dimensions=list(cw),
    )
    out = ir.RankedTensorType.get(ctx.avals_out[0].shape, ir.IntegerType.get_signless(32))
    return [stablehlo.dot_general(out, x, w, numbers)]


def _batch(args: Any, dims: Any, *, dimension_numbers: DimensionNumbers) -> Any:
    """A mapped axis of both operands is a batch axis; of one alone, an axis of its rows."""
    (x, w), (dx, dw) = args, dims
    (cx, cw), (bx, bw) = dimension_numbers

    def past(axes: tuple[int, ...], d: int | None) -> tuple[int, ...]:
        return axes if d is None else tuple(a + (a >= d) for a in axes)

    cx, bx, cw, bw = past(cx, dx), past(bx, dx), past(cw, dw), past(bw, dw)
    if dx is not None and dw is not None:
        return u8s8_dot(x, w, ((cx, cw), ((dx, *bx), (dw, *bw)))), 0
    out = u8s8_dot(x, w, ((cx, cw), (bx, bw)))
    if dw is None:  # the mapped axis lies among the rows, after the batch axes
        return out, len(bx) + sum(a not in (*cx, *bx) for a in range(dx))
    rows = x.ndim - len(cx) - len(bx)
    return out, len(bw) + rows + sum(a not in (*cw, *bw) for a in range(dw))


@functools.partial(jax.jit, static_argnames="dimension_numbers")
def _compiled(x: jax.Array, w: jax.Array, *, dimension_numbers: DimensionNumbers) -> jax.Array:
    return u8s8_p.bind(x, w, dimension_numbers=dimension_numbers)


u8s8_p.def_impl(_compiled)
u8s8_p.def_abstract_eval(_abstract)
mlir.register_lowering(u8s8_p, mlir.lower_fun(_reference, multiple_results=False))
mlir.register_lowering(u8s8_p, _raw, platform="cpu")
batching.primitive_batchers[u8s8_p] = _batch
