"""Where do the scales of a value go when its elements move? The same place, as small arrays.

Reshapes, transposes, slices, pads and the like, on the scales of `unknowns`: an axis along which
nothing differs has length one there, so that an activation's scales are as many as its channels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantjax.interpret.unknowns import Scale, compact

Shape = tuple[int, ...]


def full(x: np.ndarray, axis: int, n: int) -> np.ndarray:
    """x with all n positions of an axis."""
    return np.broadcast_to(x, (*x.shape[:axis], n, *x.shape[axis + 1 :]))


def reshape(x: Scale, old: Shape, new: Shape) -> Scale:
    """After `lax.reshape`: axes that are merged or split together are written out where any of them
    differs."""
    if 0 in old:
        return x.map(lambda a: a.ravel()[:1].reshape((1,) * len(new)))
    lengths, target = list(x.shape), [1] * len(new)
    for before, after in groups(old, new):
        if any(lengths[a] > 1 for a in before):
            for a in before:
                lengths[a] = old[a]
            for a in after:
                target[a] = new[a]
    return compact(x.map(lambda a: np.broadcast_to(a, lengths).reshape(target)))


def groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The axes, of length above one, that a reshape merges and splits together."""
    left = [a for a, n in enumerate(old) if n > 1]
    right = [a for a, n in enumerate(new) if n > 1]
    groups = []
    while left and right:
        before, after = [left.pop(0)], [right.pop(0)]
        m, n = old[before[0]], new[after[0]]
        while m != n:
            if m < n:
                before.append(left.pop(0))
                m *= old[before[-1]]
            else:
                after.append(right.pop(0))
                n *= new[after[-1]]
        groups.append((before, after))
    return groups


def broadcast(x: Scale, rank: int, dims: Sequence[int]) -> Scale:
    """After `lax.broadcast_in_dim`."""
    shape = [1] * rank
    for a, dim in enumerate(dims):
        shape[dim] = x.shape[a]
    # Axes of x may be listed in any order.
    return x.map(lambda v: np.transpose(v, np.argsort(dims)).reshape(shape))


def sliced(x: Scale, start: Shape, limit: Shape, strides: Shape | None) -> Scale:
    """After `lax.slice`."""
    steps = strides or (1,) * len(start)
    cuts = tuple(
        slice(None) if n == 1 else slice(*cut)
        for n, cut in zip(x.shape, zip(start, limit, steps, strict=True), strict=True)
    )
    return x.map(lambda a: a[cuts])


def part(x: Scale, axis: int, start: int, stop: int) -> Scale:
    """Neighbouring entries of an axis."""
    cut = (*[slice(None)] * axis, slice(start, stop))
    return x if x.shape[axis] == 1 else x.map(lambda a: a[cut])


def entry(x: Scale, axis: int, i: int) -> Scale:
    """One entry of an axis, which it loses."""
    return x.map(lambda a: a.take(min(i, a.shape[axis] - 1), axis))


def concatenated(xs: Sequence[Scale], lengths: Sequence[int], axis: int) -> Scale:
    """After `lax.concatenate` of values with these lengths along the axis."""
    rank = len(xs[0].shape)
    shape = [max(x.shape[a] for x in xs) for a in range(rank)]

    def one(arrays: Sequence[np.ndarray]) -> np.ndarray:
        wide = [
            np.broadcast_to(a, (*shape[:axis], n, *shape[axis + 1 :]))
            for a, n in zip(arrays, lengths, strict=True)
        ]
        return np.concatenate(wide, axis)

    return compact(Scale(one([x.node for x in xs]), one([x.power for x in xs])))


def padded(x: Scale, fill: Any, old: Shape, config: Sequence[tuple[int, int, int]]) -> Scale:
    """After `lax.pad`; `fill(shape)` gives the scales of what is added."""
    for axis, (low, high, inner) in enumerate(config):
        if (low, high, inner) == (0, 0, 0):
            continue
        n = old[axis]
        length = low + high + n + max(n - 1, 0) * inner
        added = fill((*x.shape[:axis], length, *x.shape[axis + 1 :]))
        places = low + np.arange(n) * (inner + 1)
        seen = (places >= 0) & (places < length)
        index = tuple(slice(None) if a != axis else places[seen] for a in range(len(old)))
        node, power = added.node.copy(), added.power.copy()
        for whole, part in ((node, x.node), (power, x.power)):
            whole[index] = full(part, axis, n).compress(seen, axis)
        x = compact(Scale(node, power, x.role))
    return x
