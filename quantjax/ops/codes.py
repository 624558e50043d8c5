"""A weight of integer codes as a matrix: which levels do its bytes hold, and what scales them?

Codes are never put side by side again, which is slow: bytes that hold several codes give several
planes, each of the first, second, ... code of every byte, and x is split the same way."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.affine import scale_values
from quantjax.blocks import sizes, spread
from quantjax.formats import IntFormat
from quantjax.qtensor import QTensor


class CodeMatrix(NamedTuple):
    """Bytes, and a scale and a zero point (or None) per group: (sum, columns) where q is summed
    over its first axes, (columns, sum) where over its last. `unit` codes fill `unit_bytes`."""

    stored: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    format: IntFormat
    unit: int
    unit_bytes: int

    def levels(self, stored: list[jax.Array]) -> list[jax.Array]:
        """The levels, less no zero point, of the codes in neighbouring bytes, in float32."""
        bits, packed = self.format.bits, self.format.bits < 8
        codes = stored
        if packed:
            wide, codes = [byte.astype(jnp.int32) for byte in stored], []
            for i in range(len(stored) * 8 // bits):
                first, shift = divmod(i * bits, 8)
                code = wide[first] >> np.int32(shift)
                if shift + bits > 8:
                    code = code | (wide[first + 1] << np.int32(8 - shift))
                codes.append(code & np.int32(2**bits - 1))
        offset = 2.0 ** (bits - 1) if packed and self.format.signed else 0.0
        offset -= 0.0 if self.format.has_zero else 0.5
        levels = [code.astype(jnp.float32) for code in codes]
        return [level - np.float32(offset) for level in levels] if offset else levels


def group_of(q: QTensor, axes: tuple[int, ...]) -> int:
    """How many codes in a row along the sum over `axes` share a scale; 0 if q is no such matrix.

    It is one if it holds integer codes, packed along the last of the axes if at all and in whole
    bytes, in groups of one size."""
    if not isinstance(q.format, IntFormat) or not q.size:
        return 0
    if q.packed is not None:
        whole = q.shape[axes[-1]] * q.format.bits % 8 == 0
        if q.packed[0] % q.ndim != axes[-1] or not whole:
            return 0
    size, group = sizes(q.shape, q.block), 1
    for i in reversed(range(len(axes))):
        length, own = q.shape[axes[i]], size[axes[i]]
        if own != length:
            equal = length % own == 0 and all(size[a] == 1 for a in axes[:i])
            return group * own if equal else 0
        group *= own
    return group


def as_matrix(q: QTensor, axes: tuple[int, ...]) -> CodeMatrix:
    """q summed over `axes`, its first or its last ones. `group_of` must not be 0."""
    leading = axes[0] == 0
    columns = math.prod(n for a, n in enumerate(q.shape) if a not in axes)
    block = tuple(1 if a in axes else n for a, n in enumerate(sizes(q.shape, q.block)))

    def matrix(values: jax.Array) -> jax.Array:
        return values.reshape((-1, columns) if leading else (columns, -1))

    def per_group(values: jax.Array) -> jax.Array:
        shape = tuple(values.shape[a] if a in axes else n for a, n in enumerate(q.shape))
        return matrix(jnp.broadcast_to(spread(values, shape, block), shape))

    scale = scale_values(q.scale)
    scale = scale.reshape((1,) * q.ndim) if q.scale is None else scale
    zero = None if q.zero_point is None else per_group(q.zero_point.astype(jnp.float32))
    assert isinstance(q.format, IntFormat)
    common = math.gcd(8, q.format.bits)
    return CodeMatrix(
        matrix(q.qvalue), per_group(scale), zero, q.format, 8 // common, q.format.bits // common
    )
