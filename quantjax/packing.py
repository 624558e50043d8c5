"""How do codes of 1 to 8 bits become bytes, and come back? An exact, dense, jit-able layout.

Along one axis the codes form a little-endian bit stream: code i takes bits i*b ... i*b+b-1 of
it. n codes take ceil(n*b/8) bytes. The other axes are kept, so the rank is too, and a shard or
a slice that holds whole bytes is itself a valid packing."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8


def packed_length(n: int, bits: int) -> int:
    """Bytes of n codes: ceil(n * bits / 8).

    >>> packed_length(3, 4), packed_length(8, 3)
    (2, 3)
    """
    return -(-n * bits // 8)


def packed_axis(shape: tuple[int, ...], lead: int, bits: int, reduced: tuple[bool, ...]) -> int:
    """The axis (negative) along which codes are packed: the one that wastes fewest bits.

    Ties go to an axis whose elements share a scale (`reduced`), so that a row of an embedding
    keeps its own bytes; then to the last axis but one, where unpacking runs along contiguous
    memory. The first `lead` axes are layers, which are indexed and so never packed.
    """

    def cost(axis: int) -> tuple[int, bool, bool, int]:
        n = shape[axis]
        rest = math.prod(shape) // max(n, 1)
        return rest * packed_length(n, bits), not reduced[axis], axis != -2, -axis

    return min(range(lead - len(shape), 0), key=cost)


def _unit(bits: int) -> tuple[int, int]:
    """The shortest run of codes that fills whole bytes: (codes, bytes)."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _first(x: UInt8[Array, "*n"], n: int, axis: int) -> UInt8[Array, "*m"]:
    return x if x.shape[axis] == n else lax.slice_in_dim(x, 0, n, axis=axis)


def pack(codes: UInt8[Array, "*n"], bits: int, axis: int = -1) -> UInt8[Array, "*m"]:
    """Packs codes below 2^bits along `axis`; 8 bits are returned as they are.

    >>> pack(jnp.array([1, 2, 3], jnp.uint8), 4).tolist()
    [33, 3]
    """
    if bits == 8:
        return codes
    axis = axis % codes.ndim
    per, bytes_ = _unit(bits)
    n = codes.shape[axis]
    pad = [(0, 0)] * codes.ndim
    pad[axis] = (0, -n % per)
    codes = jnp.pad(codes, pad) if n % per else codes
    # Codes are split into their places first and each byte built by shifts: every operation
    # runs along the axes after `axis`, which stay contiguous.
    units = codes.reshape(codes.shape[:axis] + (-1, per) + codes.shape[axis + 1 :])
    place = [lax.index_in_dim(units, i, axis + 1, keepdims=False) for i in range(per)]
    built = []
    for byte in range(bytes_):
        shifts = [i * bits - byte * 8 for i in range(per)]
        parts = [
            code << np.uint8(shift) if shift >= 0 else code >> np.uint8(-shift)
            for code, shift in zip(place, shifts, strict=True)
            if -bits < shift < 8
        ]
        built.append(functools.reduce(jnp.bitwise_or, parts))
    packed = jnp.stack(built, axis + 1)
    packed = packed.reshape(codes.shape[:axis] + (-1,) + codes.shape[axis + 1 :])
    length = packed_length(n, bits)
    return _first(packed, length, axis)


def unpack(packed: UInt8[Array, "*m"], bits: int, n: int, axis: int = -1) -> UInt8[Array, "*n"]:
    """The n codes that `pack` packed along `axis`.

    Raises ValueError if `axis` does not hold the bytes of n codes.

    >>> unpack(jnp.array([33, 3], jnp.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    axis = axis % packed.ndim
    if packed.shape[axis] != packed_length(n, bits):
        raise ValueError(
            f"unpack: axis {axis} of {packed.shape} holds {packed.shape[axis]} bytes, but {n} "
            f"codes of {bits} bits take {packed_length(n, bits)}."
        )
    if bits == 8:
        return packed
    per, bytes_ = _unit(bits)
    pad = [(0, 0)] * packed.ndim
    pad[axis] = (0, -packed.shape[axis] % bytes_)
    packed = jnp.pad(packed, pad) if packed.shape[axis] % bytes_ else packed
    units = packed.reshape(packed.shape[:axis] + (-1, bytes_) + packed.shape[axis + 1 :])
    byte = [lax.index_in_dim(units, i, axis + 1, keepdims=False) for i in range(bytes_)]
    mask = np.uint8(2**bits - 1)
    codes = []
    for i in range(per):
        first, shift = divmod(i * bits, 8)
        code = byte[first] >> np.uint8(shift)
        if shift + bits > 8:
            code = code | (byte[first + 1] << np.uint8(8 - shift))
        codes.append(code & mask)
    stacked = jnp.stack(codes, axis + 1)
    stacked = stacked.reshape(packed.shape[:axis] + (-1,) + packed.shape[axis + 1 :])
    return _first(stacked, n, axis)
