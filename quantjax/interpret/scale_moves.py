"""Which scales has a value whose elements were moved, joined, cut out or looked up? Those of the
elements, moved as they were. Zeros that are added take the scale that is asked of them."""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from quantjax.interpret import moves
from quantjax.interpret.products import GATHER
from quantjax.interpret.scale_context import Context, Rule, State, each
from quantjax.interpret.unknowns import Scale, ones


def _moved(move: Callable[[Context, Scale], Scale]) -> Rule:
    """A rule that moves elements of one value."""
    return lambda c, states: [each(states[0], lambda x: move(c, x))]


def _reshape(c: Context, x: Scale) -> Scale:
    return moves.reshape(x, c.step.shapes[0], c.step.out_shapes[0])


def _transpose(c: Context, x: Scale) -> Scale:
    return x.map(lambda a: np.transpose(a, c.step.params["permutation"]))


def _broadcast(c: Context, x: Scale) -> Scale:
    dims = c.step.params["broadcast_dimensions"]
    return moves.broadcast(x, len(c.step.out_shapes[0]), dims)


def _slice(c: Context, x: Scale) -> Scale:
    p = c.step.params
    return moves.sliced(x, p["start_indices"], p["limit_indices"], p["strides"])


def _reverse(c: Context, x: Scale) -> Scale:
    return x.map(lambda a: np.flip(a, c.step.params["dimensions"]))


def _pad(c: Context, states: Sequence[State]) -> list[State]:
    state, zeros = states[0], states[1] is None
    if state is None and zeros:
        return [None]
    config = c.step.params["padding_config"]
    if state is None or not any(x.node.any() for x in state):
        return [(ones(len(config)),)]

    def fill(shape: tuple[int, ...]) -> Scale:
        if zeros:
            return c.unknowns.fresh(shape)
        return Scale(np.zeros(shape, np.int64), np.zeros(shape))

    x = c.single(state, 0)
    if zeros:
        c.unknowns.keep_sign(x)
    return [(moves.padded(x, fill, c.step.shapes[0], config),)]


def _concatenate(c: Context, states: Sequence[State]) -> list[State]:
    if all(x is None for x in states):
        return [None]
    axis, made = c.step.params["dimension"], []
    for i, (state, shape) in enumerate(zip(states, c.step.shapes, strict=True)):
        if state is None:
            made.append(c.unknowns.fresh([n if a == axis else 1 for a, n in enumerate(shape)]))
        else:
            made.append(c.single(state, i))
    return [(moves.concatenated(made, [shape[axis] for shape in c.step.shapes], axis),)]


def _split(c: Context, states: Sequence[State]) -> list[State]:
    axis, ends = c.step.params["axis"], np.cumsum([0, *c.step.params["sizes"]]).tolist()

    def part(start: int, stop: int) -> State:
        return each(states[0], lambda x: moves.part(x, axis, start, stop))

    return [part(*found) for found in pairwise(ends)]


def _unstack(c: Context, states: Sequence[State]) -> list[State]:
    axis = c.step.params["axis"]

    def entry(i: int) -> State:
        return each(states[0], lambda x: moves.entry(x, axis, i))

    return [entry(i) for i in range(c.step.shapes[0][axis])]


def _indexed(c: Context, x: Scale, sizes: Sequence[int]) -> Scale:
    """Entries at places that are not known: one scale along each axis that is cut."""
    cut = [a for a, n in enumerate(sizes) if n != c.step.shapes[0][a] and x.shape[a] > 1]
    if cut and x.role:  # one of several factors: nothing could compensate for it
        c.unknowns.keep(x, c.step.reason(f"{c.step.name!r} takes rows of it"))
        return functools.reduce(Scale.first, cut, x)
    return c.along(x, cut)


def _dynamic_slice(c: Context, states: Sequence[State]) -> list[State]:
    c.keep(states[1:], "it is an index")
    return [each(states[0], lambda x: _indexed(c, x, c.step.params["slice_sizes"]))]


def _gather(c: Context, states: Sequence[State]) -> list[State]:
    c.keep(states[1:], "it is an index")
    dims = c.step.params["dimension_numbers"]
    batching = getattr(dims, "operand_batching_dims", ())
    sizes = [0 if a in batching else n for a, n in enumerate(c.step.params["slice_sizes"])]
    gone = (*dims.collapsed_slice_dims, *batching)

    def rows(x: Scale) -> Scale:
        x = c.along(_indexed(c, x, sizes), gone)  # of length one: taken whole, and dropped
        kept = x.map(lambda a: np.squeeze(a, gone))
        return moves.broadcast(kept, len(c.step.out_shapes[0]), dims.offset_dims)

    return [each(states[0], rows)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _moved(_reshape)),
    "transpose": _moved(_transpose),
    "broadcast_in_dim": _moved(_broadcast),
    "slice": _moved(_slice),
    "rev": _moved(_reverse),
    "pad": _pad,
    "concatenate": _concatenate,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    GATHER: _gather,
}
