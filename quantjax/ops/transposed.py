"""How does one convolve an input with holes without multiplying by the holes?

The outputs at distance d, as far apart as the elements, see the same elements of the kernel; so a
transposed convolution is an ordinary one with an output channel for each of the d phases, which
are then interleaved. Shi et al., "Is the deconvolution layer the same as a convolutional layer?",
2016, arXiv:1609.07009. Where zero has a code other than 0, the holes add it times the weights that
they meet, which for each phase is a constant."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8, Int32, Integer

from quantjax.ops.patches import output_sums


class Phases(NamedTuple):
    """One spatial axis: `holes` outputs for each place of a window of `size`, in an input padded
    by `pad`; the weight that element j of it has in phase r is number `start - r + holes * j`."""

    holes: int
    size: int
    start: int
    pad: tuple[int, int]
    out: int


def phases(n: int, window: int, padding: tuple[int, int], holes: int) -> Phases:
    """Of a window that moves in steps of one over n elements, `holes` apart and then padded."""
    low, high = padding
    out = (n - 1) * holes + 1 + low + high - window + 1
    first, last = -(low // holes), (window + holes - 2 - low) // holes  # elements seen at place 0
    places = -(-out // holes)
    pad = (-first, places - 1 + last - (n - 1))
    return Phases(holes, last - first + 1, low + holes * first, pad, out)


def kernel_of_phases(
    w: Int8[Array, "*w"], axes: Sequence[Phases], numbers: lax.ConvDimensionNumbers, groups: int
) -> Int8[Array, "*v"]:
    """The kernel whose outputs are (groups, phase of the first axis, of the next, ..., outputs)."""
    o = numbers.rhs_spec[0]
    for axis, p in reversed(list(zip(numbers.rhs_spec[2:], axes, strict=True))):
        first = p.start - (p.holes - 1)
        edges = [(0, 0, 0)] * w.ndim
        edges[axis] = (-first, first + p.holes * p.size - w.shape[axis], 0)
        padded = lax.pad(w, np.int8(0), edges)
        parts = [
            lax.slice_in_dim(padded, q, q + p.holes * (p.size - 1) + 1, p.holes, axis)
            for q in reversed(range(p.holes))
        ]
        shape = (*parts[0].shape[:o], groups, -1, *parts[0].shape[o + 1 :])
        w = jnp.stack([part.reshape(shape) for part in parts], o + 1)
        w = w.reshape(*shape[:o], -1, *shape[o + 2 :])
    return w


def interleave(
    y: Int32[Array, "*y"],
    w: Int8[Array, "*w"],
    v: Int8[Array, "*v"],
    zero: Integer[Array, "*n"] | None,
    axes: Sequence[Phases],
    numbers: lax.ConvDimensionNumbers,
    groups: int,
) -> Int32[Array, "*z"]:
    """The convolution by w of the input with holes from y, that of the input itself by v, the
    kernel of phases. `zero`: the code of the holes, of all or of each example; None if it is 0."""
    rank, counts = len(axes), [p.holes for p in axes]
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    y = jnp.transpose(y, order)
    y = y.reshape(*y.shape[: 1 + rank], groups, *counts, -1)
    if zero is not None:
        unseen = output_sums(w, numbers).reshape(groups, *(1,) * rank, -1)
        unseen = unseen - output_sums(v, numbers).reshape(groups, *counts, -1)
        y = y + zero.astype(jnp.int32).reshape(-1, *(1,) * (y.ndim - 1)) * unseen
    pairs = [a for i in range(rank) for a in (1 + i, 2 + rank + i)]
    y = jnp.transpose(y, (0, *pairs, 1 + rank, y.ndim - 1))
    places = [math.prod(y.shape[1 + 2 * i : 3 + 2 * i]) for i in range(rank)]
    y = y.reshape(y.shape[0], *places, -1)
    y = lax.slice(y, [0] * y.ndim, [y.shape[0], *(p.out for p in axes), y.shape[-1]])
    return jnp.transpose(y, np.argsort(order).tolist())
