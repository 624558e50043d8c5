"""The exact product of 8-bit codes, in the form that is fast where it runs.

One primitive. On CPU a row or two of x meet a large weight vector by vector
(`quantjax.ops.vector`), and for others its lowering rule asks `quantjax.ops.probe` which form to
emit; elsewhere it is int8 x int8, which the tensor cores of GPUs and TPUs have. So one traced
function serves every platform, and may be exported for all of them at once."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Int8, Int32

from quantjax.ops.forms import FORMS, Codes, DimensionNumbers, column_sums, flip, signed_dot
from quantjax.ops.probe import forced, probe
from quantjax.ops.thresholds import VECTOR_CODES, VECTOR_ROWS
from quantjax.ops.vector import count_code_terms, integer_vector_dot

integer_p = Primitive("integer_dot_general")


def integer_dot_general(
    x: Codes, w: Int8[Array, "*w"], dimension_numbers: DimensionNumbers
) -> Int32[Array, "*y"]:
    """sum_k x_k w_k in int32, exactly, with the dimension numbers of `lax.dot_general`.

    x is int8 or uint8, w int8; the axes of y are (batch, others of x, others of w). Sums of more
    than 65,000 terms may pass 2^31 and wrap. Raises TypeError for other types. It has no gradient.

    >>> x, w = jnp.array([[255, 1]], jnp.uint8), jnp.array([[-127], [5]], jnp.int8)
    >>> integer_dot_general(x, w, (((1,), (0,)), ((), ()))).tolist()
    [[-32380]]
    """
    (cx, cw), (bx, bw) = dimension_numbers
    return _bind(x, w, ((tuple(cx), tuple(cw)), (tuple(bx), tuple(bw))), forced())


def _bind(x: Any, w: Any, numbers: DimensionNumbers, form: str | None) -> jax.Array:
    return integer_p.bind(x, w, dimension_numbers=numbers, form=form)


@functools.partial(jax.jit, static_argnames=("dimension_numbers", "form"))
def _compiled(x: Any, w: Any, *, dimension_numbers: DimensionNumbers, form: str | None) -> Any:
    return _bind(x, w, dimension_numbers, form)


integer_p.def_impl(_compiled)


@integer_p.def_abstract_eval
def _abstract(x: Any, w: Any, *, dimension_numbers: DimensionNumbers, form: str | None) -> Any:
    if x.dtype not in (np.int8, np.uint8) or w.dtype != np.int8:
        raise TypeError(
            f"integer_dot_general: expected int8 or uint8 and int8, got {x.dtype} and {w.dtype}."
        )
    signed = jax.ShapeDtypeStruct(x.shape, jnp.int8)
    out = jax.eval_shape(lambda x, w: signed_dot(x, w, dimension_numbers), signed, w)
    return jax.core.ShapedArray(out.shape, jnp.int32)


def _signed(
    x: jax.Array, w: jax.Array, *, dimension_numbers: DimensionNumbers, form: str | None
) -> jax.Array:
    """x w = (x - 128) w + 128 sum w, all products of signed codes."""
    if x.dtype == np.int8:
        return signed_dot(x, w, dimension_numbers)
    (cx, _), (bx, _) = dimension_numbers
    y = signed_dot(flip(x), w, dimension_numbers)
    return y + 128 * column_sums(w, dimension_numbers, x.ndim - len(cx) - len(bx))


def _fits_vectors(avals: Sequence[Any], dimension_numbers: DimensionNumbers) -> bool:
    """Whether x has so few rows, and w so many codes, that to lay w out for a product costs more
    than the product. Summed over its last axes w lies right as it is, and what an explicit mesh
    cuts is left alone."""
    (x, w), ((cx, cw), (bx, _)) = avals, dimension_numbers
    numbers = all(isinstance(n, int) for n in (*x.shape, *w.shape))  # no symbols of jax.export
    cut = any(axis is not None for a in (x, w) for axis in a.sharding.spec)
    leading = cw and sorted(cw) == list(range(len(cw))) and len(cw) < w.ndim
    if bx or cut or not leading or not numbers or math.prod(w.shape) < VECTOR_CODES:
        return False
    rows = math.prod(n for a, n in enumerate(x.shape) if a not in cx)
    return 0 < rows <= VECTOR_ROWS and count_code_terms(math.prod(x.shape[a] for a in cx)) > 0


def _by_vectors(x: jax.Array, w: jax.Array, dimension_numbers: DimensionNumbers) -> jax.Array:
    (cx, cw), _ = dimension_numbers
    order = sorted(range(len(cw)), key=lambda i: cw[i])
    rows = [a for a in range(x.ndim) if a not in cx]
    out = (*(x.shape[a] for a in rows), *w.shape[len(cw) :])
    length = math.prod(x.shape[a] for a in cx)
    x_MK = lax.transpose(x, [*rows, *(cx[i] for i in order)]).reshape(-1, length)
    w_KN = w.reshape(length, -1)
    return jnp.stack([integer_vector_dot(x_K, w_KN) for x_K in x_MK]).reshape(out)


def _lower_on_cpu(
    ctx: Any, x: Any, w: Any, *, dimension_numbers: DimensionNumbers, form: str | None
) -> Any:
    vectors = form is None and _fits_vectors(ctx.avals_in, dimension_numbers)
    product = _by_vectors if vectors else FORMS[form or probe().form]

    def chosen(x: jax.Array, w: jax.Array) -> jax.Array:
        return product(x, w, dimension_numbers)

    return mlir.lower_fun(chosen, multiple_results=False)(ctx, x, w)


mlir.register_lowering(integer_p, mlir.lower_fun(_signed, multiple_results=False))
mlir.register_lowering(integer_p, _lower_on_cpu, platform="cpu")


def _batch(
    args: Any, dims: Any, *, dimension_numbers: DimensionNumbers, form: str | None
) -> tuple[jax.Array, int]:
    """A mapped axis of both operands is a batch axis; of one alone, an axis of its rows."""
    (x, w), (dx, dw) = args, dims
    (cx, cw), (bx, bw) = dimension_numbers

    def past(axes: tuple[int, ...], d: int | None) -> tuple[int, ...]:
        return axes if d is None else tuple(a + (a >= d) for a in axes)

    cx, bx, cw, bw = past(cx, dx), past(bx, dx), past(cw, dw), past(bw, dw)
    if dx is not None and dw is not None:
        return _bind(x, w, ((cx, cw), ((dx, *bx), (dw, *bw))), form), 0
    out = _bind(x, w, ((cx, cw), (bx, bw)), form)
    if dw is None:  # the mapped axis lies among the rows, after the batch axes
        return out, len(bx) + sum(a not in (*cx, *bx) for a in range(dx))
    rows = x.ndim - len(cx) - len(bx)
    return out, len(bw) + rows + sum(a not in (*cw, *bw) for a in range(dw))


batching.primitive_batchers[integer_p] = _batch
