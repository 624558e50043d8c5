"""Which elements share a scale? Blocks of an array, counted from its last axis.

A block is a tuple like the end of a shape: block[i] neighbours along the axis share a scale,
None means the whole axis, and axes before the block each have their own. (64, 1) on (I, O) is a
group of 64 rows per column; (None, 1) one scale per column; (None, None) one for the matrix.
The last block of an axis may be short."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

Block = tuple[int | None, ...]


def sizes(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The block's length on every axis of `shape`, None resolved, 1 on leading and empty axes.

    >>> sizes((6, 100, 32), (64, 1)), sizes((100, 32), (None, 1))
    ((1, 64, 1), (100, 1))
    """
    lead = len(shape) - len(block)
    whole = [n if b is None else min(b, n) for n, b in zip(shape[lead:], block, strict=True)]
    return (1,) * lead + tuple(max(n, 1) for n in whole)


def counts(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """How many blocks lie along every axis: ceil(n / b), the shape of the scales.

    >>> counts((6, 100, 32), (64, 1))
    (6, 2, 32)
    """
    return tuple(-(-n // b) for n, b in zip(shape, sizes(shape, block), strict=True))


class Blocked(NamedTuple):
    """An array with every axis split in (block, place in block); reduce over `axes`."""

    values: Float[Array, "*split"]
    axes: tuple[int, ...]
    valid: Bool[Array, "*split"] | None  # None where every block is full


def split(x: Float[Array, "*n"], block: Block) -> Blocked:
    """Splits x in blocks; short last blocks repeat their edge and are marked not valid."""
    size = sizes(x.shape, block)
    count = counts(x.shape, block)
    pad = [(0, c * b - n) for n, b, c in zip(x.shape, size, count, strict=True)]
    shape, axes = [], []
    for b, c in zip(size, count, strict=True):
        shape.append(c)
        if b > 1:  # an axis of blocks of one is left alone: fewer axes, simpler loops
            axes.append(len(shape))
            shape.append(b)
    valid = None
    if any(after for _, after in pad):
        valid = jnp.pad(jnp.ones(x.shape, bool), pad).reshape(shape)
        x = jnp.pad(x, pad, mode="edge")
    return Blocked(x.reshape(shape), tuple(axes), valid)


def block_sum(x: Float[Array, "*n"], block: Block) -> Float[Array, "*b"]:
    """The sum over every block, half onto half: as sums of arrays have no order of their own, it is
    the same bits in every program, which those of XLA's reductions are not.

    >>> block_sum(jnp.ones((6, 5)), (4, 1))[:, 0].tolist()
    [4.0, 2.0]
    """
    parts = split(x, block)
    values = parts.values if parts.valid is None else jnp.where(parts.valid, parts.values, 0)
    for axis in parts.axes:
        while (n := values.shape[axis]) > 1:
            half = -(-n // 2)
            first = jax.lax.slice_in_dim(values, 0, half, axis=axis)
            rest = jax.lax.slice_in_dim(values, half, n, axis=axis)
            edges = [(0, first.shape[a] - rest.shape[a]) for a in range(values.ndim)]
            values = first + jnp.pad(rest, edges)
    return values.reshape([n for a, n in enumerate(values.shape) if a not in parts.axes])


def block_mean(x: Float[Array, "*n"], block: Block) -> Float[Array, "*b"]:
    """The mean over every block, the same bits in every program."""
    share = np.ones((), np.float32)
    for axis, (n, b) in enumerate(zip(x.shape, sizes(x.shape, block), strict=True)):
        lengths = np.minimum(b, n - np.arange(-(-n // b)) * b)
        shape = [-1 if a == axis else 1 for a in range(x.ndim)]
        share = share * lengths.astype(np.float32).reshape(shape)
    return block_sum(x, block) * (np.float32(1) / share)


def whole(x: Float[Array, "*n"]) -> Blocked:
    """x as a single block, whose range has shape () whatever the rank of x."""
    return Blocked(x, tuple(range(x.ndim)), None)


def spread(per_block: Num[Array, "*b"], shape: tuple[int, ...], block: Block) -> jax.Array:
    """One value per block, repeated over its elements: broadcastable against `shape`."""
    for axis, (n, b) in enumerate(zip(shape, sizes(shape, block), strict=True)):
        if b > 1 and per_block.shape[axis] > 1:
            per_block = jnp.repeat(per_block, b, axis, total_repeat_length=None)
            if per_block.shape[axis] != n:
                per_block = jax.lax.slice_in_dim(per_block, 0, n, axis=axis)
    return per_block
