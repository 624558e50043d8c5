"""A float activation times a quantized weight, in the form that is fast where it runs.

On CPU the weight is read as codes and no float copy of it is made: one row by `vector_dot` where it
serves, a few by `blocked_dot`, both in float32, and many by `digits_dot`, where integers are fast
enough. Elsewhere the weight is dequantized, which compilers fuse into the product."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from quantjax.affine import dequantize_array, zero_cotangent
from quantjax.ops.blocked import blocked_dot, fits_blocks
from quantjax.ops.digits import digits_dot, digits_pay, no_digits
from quantjax.ops.dot import BESIDE
from quantjax.ops.forms import DimensionNumbers
from quantjax.ops.thresholds import (
    BLOCK_ROWS,
    CACHED_ROWS,
    CACHED_WEIGHT,
    DIGIT_ROWS,
    SMALL_WEIGHT,
    VECTOR_ROWS,
)
from quantjax.ops.vector import count_terms, vector_dot
from quantjax.qtensor import QTensor


def fits_weight_only(
    x: jax.Array | jax.ShapeDtypeStruct, q: QTensor, dimension_numbers: DimensionNumbers
) -> str:
    """Why `weight_only_dot` does not serve x of this shape and dtype, or would not be faster than
    to dequantize and multiply; empty if it serves.

    It serves every format where q is summed over its first or its last axes, without batch axes,
    up to a measured number of rows of x (`quantjax.ops.thresholds`); and any number in float32
    where `digits_dot` serves.
    """
    (cx, cw), (bx, _) = dimension_numbers
    rows = math.prod(n for a, n in enumerate(x.shape) if a not in cx)
    axes, first = tuple(sorted(cw)), tuple(range(len(cw)))
    if not q.is_bare:
        return BESIDE
    if bx:
        return "batch axes"
    if axes not in (first, tuple(a + q.ndim - len(cw) for a in first)) or not cw:
        return "a sum over axes that are neither the first nor the last"
    if len(cw) == q.ndim:
        return "a weight that is summed away"
    if q.size < SMALL_WEIGHT:
        return f"a small weight ({q.size} < {SMALL_WEIGHT})"
    if not isinstance(rows, int):
        return "a number of rows that is not known"  # a symbol of jax.export
    if rows > _most_rows(q):
        many = f"many rows ({rows} > {_most_rows(q)})"
        if x.dtype != np.float32 or q.dtype != np.float32:
            return f"{many} in {x.dtype} times {q.dtype}"
        if why := no_digits(q, axes):
            return f"{many} with {why}"
    if q.codebook is not None and q.codebook.ndim > 1:
        return "a codebook for each layer"
    if not fits_blocks(q, axes):
        return "rows too long to be dequantized a few at a time"
    return ""


def _most_rows(q: QTensor) -> int:
    """How many rows of x may meet blocks of q."""
    return CACHED_ROWS if q.size < CACHED_WEIGHT else BLOCK_ROWS


def weight_only_dot(
    x: Float[Array, "*x"], q: QTensor, dimension_numbers: DimensionNumbers
) -> Float[Array, "*y"]:
    """`lax.dot_general(x, dequantize(q), dimension_numbers)` in float32, from the codes of q.

    The values of q are those of float32, whatever its dtype, so a sum of n terms is off by no
    more than a float32 product of these values is: |y - y_exact| <= (n + 4) 2^-24 sum_k |x_k w_k|.
    A level is exact and takes one rounding with x; n - 1 follow in the sum, in any order; scaling
    the sum of a group takes one, and the scale itself, where quantized, two. Many rows may come
    with the bound of `digits_dot` instead, which is by max |x| of the row and smaller where its
    values are of one size and the sum is long.

    NaN and infinity do what they do in the float product, but in digits, where a row that holds
    them comes out as NaN; and as the scale may come after the sum, the largest |x| that does not
    overflow is 128 times smaller. The gradient is that of the float
    product in x; none reaches q. `fits_weight_only` must be empty.
    """
    (cx, cw), _ = dimension_numbers
    order = sorted(range(len(cw)), key=lambda i: cw[i])
    numbers = ((tuple(cx[i] for i in order), tuple(cw[i] for i in order)), ((), ()))
    # What does not matter is left out, so that equal products share one compiled function.
    return _dot(x, dataclasses.replace(q, dtype=np.dtype(np.float32), act=None), numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x: jax.Array, q: QTensor, numbers: DimensionNumbers) -> jax.Array:
    return _mapped(numbers)(x, q)


def _forward(x: jax.Array, q: QTensor, numbers: DimensionNumbers) -> Any:
    return _dot(x, q, numbers), (x, q)


def _backward(numbers: DimensionNumbers, residuals: Any, gradient: jax.Array) -> Any:
    x, q = residuals
    (dx,) = jax.linear_transpose(lambda x: _floats(x, q, numbers), x)(gradient)
    return dx, jax.tree.map(zero_cotangent, q)


_dot.defvjp(_forward, _backward)


@functools.cache
def _mapped(numbers: DimensionNumbers) -> Any:
    """The product of these dimension numbers, with its rule of vmap: mapped x is more rows, and
    many rows want the float product."""
    (cx, cw), _ = numbers

    @custom_vmap
    def dot(x: jax.Array, q: QTensor) -> jax.Array:
        return _compiled(x, q, numbers)

    @dot.def_vmap
    def mapped(size: int, batched: Any, x: jax.Array, q: QTensor) -> tuple[jax.Array, bool]:
        if any(jax.tree.leaves(batched[1])):
            axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
            return jax.vmap(lambda x, q: _floats(x, q, numbers), axes)(x, q), True
        later = ((tuple(a + 1 for a in cx), cw), ((), ()))
        serves = not fits_weight_only(x, q, later)
        return (_mapped(later)(x, q) if serves else _floats(x, q, later)), True

    return dot


def _floats(x: jax.Array, q: QTensor, numbers: DimensionNumbers) -> jax.Array:
    """The product that is meant: dequantize, then multiply."""
    return lax.dot_general(x.astype(jnp.float32), dequantize_array(q), numbers)


@functools.partial(jax.jit, static_argnums=2)
def _compiled(x: jax.Array, q: QTensor, numbers: DimensionNumbers) -> jax.Array:
    # One jitted function: equal products of a model are traced and lowered once.
    codes = functools.partial(_from_codes, numbers=numbers)
    return lax.platform_dependent(x, q, cpu=codes, default=lambda x, q: _floats(x, q, numbers))


def _from_codes(x: jax.Array, q: QTensor, numbers: DimensionNumbers) -> jax.Array:
    (cx, axes), _ = numbers
    rows = [a for a in range(x.ndim) if a not in cx]
    shape = tuple(x.shape[a] for a in rows)
    x = lax.transpose(x.astype(jnp.float32), [*rows, *cx])
    x = x.reshape(math.prod(shape), *x.shape[len(rows) :])
    least = DIGIT_ROWS if q.size < CACHED_WEIGHT else 2 * DIGIT_ROWS
    floats = functools.partial(_in_floats, axes=axes)
    if len(x) < least or no_digits(q, axes) or _is_cut(x, q):
        y = floats(x, q)
    else:
        # Where digits do not pay that is a constant, and no compiled program holds them.
        digits = functools.partial(digits_dot, axes=axes)
        y = lax.cond(digits_pay(), digits, floats, x, q)
    return y.reshape(*shape, *y.shape[1:])


def _is_cut(x: jax.Array, q: QTensor) -> bool:
    """Whether an explicit mesh cuts an operand."""
    return any(cut is not None for a in (x, q.qvalue) for cut in jax.typeof(a).sharding.spec)


def _in_floats(x: jax.Array, q: QTensor, axes: tuple[int, ...]) -> jax.Array:
    if len(x) > _most_rows(q):
        return _floats(x, q, ((tuple(range(1, x.ndim)), axes), ((), ())))
    if 0 < len(x) <= VECTOR_ROWS and count_terms(q, axes):
        return jnp.stack([vector_dot(row, q, axes) for row in x])
    return blocked_dot(x, q, axes)
