"""How is x times a quantized weight computed without a float copy of the weight? Block by block.

A few rows of the weight at a time become floats, which stay in the cache, and meet x in a float
product: the accuracy is float32's, and the gain is that memory is read as codes. The loop runs
along the weight's first axis, where blocks are contiguous: if that axis is summed the products are
added, if not they lie side by side. Integer codes come as planes (`quantjax.ops.codes`), every
other format as it is dequantized. A weight that is sharded along that axis is gathered, as codes;
along another it is multiplied where it lies."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import dequantize_array, scale_values
from quantjax.blocks import sizes
from quantjax.ops.codes import CodeMatrix, as_matrix, group_of
from quantjax.ops.thresholds import BLOCK_ELEMENTS, BLOCK_LIMIT
from quantjax.packing import packed_length
from quantjax.qtensor import QTensor


def _block_rows(length: int, row: int, group: int, unit: int) -> int:
    """How many of `length` rows of `row` elements make a block: whole units of packing, whose
    codes are in planes of their own, and whole groups or an even part of one."""
    wanted = max(BLOCK_ELEMENTS // max(row, 1), 1) * unit
    step = unit if group in (1, length) else math.lcm(group, unit)
    if step > wanted:
        return max((n for n in range(unit, wanted + 1, unit) if group % n == 0), default=step)
    return min(wanted // step * step, length)


def _rows_of(q: QTensor) -> int:
    along = q.packed is not None and q.packed[0] == -q.ndim
    unit = 8 // math.gcd(8, q.format.bits) if along else 1
    return _block_rows(q.shape[0], math.prod(q.shape[1:]), sizes(q.shape, q.block)[0], unit)


def fits_blocks(q: QTensor, axes: tuple[int, ...]) -> bool:
    """Whether a block of q is small enough to stay in the cache."""
    if group_of(q, axes):
        return True
    return _rows_of(q) * math.prod(q.shape[1:]) <= BLOCK_LIMIT


def blocked_dot(x: Float[Array, "m *k"], q: QTensor, axes: tuple[int, ...]) -> Float[Array, "m *n"]:
    """sum of x q over `axes` of q, its first or its last ones, for each row of x."""
    if group_of(q, axes):
        over = _over_rows if axes[0] == 0 else _over_columns
        y = over(x.reshape(len(x), math.prod(x.shape[1:])), as_matrix(q, axes))
        return y.reshape(len(x), *(n for a, n in enumerate(q.shape) if a not in axes))
    return _any_format(x, q, axes)


def _add_blocks(step: Callable[..., jax.Array], y: jax.Array, length: int, rows: int) -> jax.Array:
    """y = step(start, rows, y) for each block, the last of which may be short."""
    whole = length // rows
    if whole:
        y = lax.fori_loop(0, whole, lambda i, y: step(i * rows, rows, y), y)
    rest = length - whole * rows
    return step(whole * rows, rest, y) if rest else y


def _over_rows(x_MK: jax.Array, w: CodeMatrix) -> jax.Array:
    # G groups in a block, B units in each of them, Q bytes in a unit, U codes in a unit
    (groups, columns), (rows_of_x, length) = w.scale.shape, x_MK.shape
    group, bits = length // groups, w.format.bits

    def step(start: Any, size: int, y_MN: jax.Array) -> jax.Array:
        count = max(size // group, 1)
        stored = lax.dynamic_slice_in_dim(w.stored, start * bits // 8, size * bits // 8, 0)
        stored = stored.reshape(count, -1, w.unit_bytes, columns)
        part_MBU = lax.dynamic_slice_in_dim(x_MK, start, size, 1)
        part_MBU = part_MBU.reshape(rows_of_x, size // w.unit, w.unit)

        def of_groups(a: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, start // group, count, 0)[:, None]

        for u, level_GBN in enumerate(w.levels([stored[:, :, i] for i in range(w.unit_bytes)])):
            if w.zero is not None:
                level_GBN = level_GBN - of_groups(w.zero)
            if groups > 1:
                level_GBN = level_GBN * of_groups(w.scale)
            y_MN = y_MN + part_MBU[:, :, u] @ level_GBN.reshape(-1, columns)
        return y_MN

    rows = _block_rows(length, columns, group, w.unit)
    y_MN = _add_blocks(step, jnp.zeros((rows_of_x, columns), jnp.float32), length, rows)
    return y_MN if groups > 1 else y_MN * w.scale


def _over_columns(x_MK: jax.Array, w: CodeMatrix) -> jax.Array:
    # C columns of a block, G groups, B units in each of them
    (columns, groups), (rows_of_x, length) = w.scale.shape, x_MK.shape
    x_MBU = x_MK.reshape(rows_of_x, length // w.unit, w.unit)

    def step(start: Any, size: int, y_MN: jax.Array) -> jax.Array:
        def of_columns(a: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, start, size, 0)

        stored = of_columns(w.stored).reshape(size, groups, -1, w.unit_bytes)
        y_MC = jnp.zeros((rows_of_x, size), jnp.float32)
        for u, level_CGB in enumerate(w.levels([stored[..., i] for i in range(w.unit_bytes)])):
            if w.zero is not None:
                level_CGB = level_CGB - of_columns(w.zero)[..., None]
            if groups > 1:
                level_CGB = level_CGB * of_columns(w.scale)[..., None]
            y_MC = y_MC + x_MBU[:, :, u] @ level_CGB.reshape(size, -1).T
        return lax.dynamic_update_slice_in_dim(y_MN, y_MC, start, 1)

    rows = _block_rows(columns, length, 1, 1)
    y_MN = _add_blocks(step, jnp.zeros((rows_of_x, columns), jnp.float32), columns, rows)
    return y_MN if groups > 1 else y_MN * w.scale[:, 0]


def _any_format(x: jax.Array, q: QTensor, axes: tuple[int, ...]) -> jax.Array:
    if isinstance(q.scale, QTensor):
        q = dataclasses.replace(q, scale=scale_values(q.scale))
    numbers = ((tuple(range(1, x.ndim)), axes), ((), ()))
    shape = (len(x), *(n for a, n in enumerate(q.shape) if a not in axes))

    def step(start: Any, size: int, y: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(x, start, size, 1) if 0 in axes else x
        product = lax.dot_general(part, _values(q, start, size), numbers)
        return y + product if 0 in axes else lax.dynamic_update_slice_in_dim(y, product, start, 1)

    return _add_blocks(step, jnp.zeros(shape, jnp.float32), q.shape[0], _rows_of(q))


def _values(q: QTensor, start: Any, size: int) -> jax.Array:
    """The values of `size` rows of the first axis from `start`, where a block begins."""
    group, bits, packed = sizes(q.shape, q.block)[0], q.format.bits, q.packed

    def per_block(child: Any) -> Any:
        if child is None or child.shape[0] == 1:
            return child
        return lax.dynamic_slice_in_dim(child, start // group, -(-size // group), 0)

    first, count = start, size
    if packed is not None and packed[0] == -q.ndim:
        first, count, packed = start * bits // 8, packed_length(size, bits), (packed[0], size)
    taken = dataclasses.replace(
        q,
        qvalue=lax.dynamic_slice_in_dim(q.qvalue, first, count, 0),
        scale=per_block(q.scale),
        zero_point=per_block(q.zero_point),
        packed=packed,
    )
    return dequantize_array(taken)
