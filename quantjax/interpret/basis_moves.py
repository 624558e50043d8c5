"""What becomes of the bases of a value whose elements are moved, cut out, joined or looked up? Axes
keep theirs when they are moved whole, and the last part of an axis that is split."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from quantjax.interpret.abstract import Step
from quantjax.interpret.bases import (
    Axis,
    Known,
    Part,
    State,
    cut_part,
    fix,
    fix_all,
    join,
    parts,
    plain,
)
from quantjax.interpret.products import GATHER

# The bases of an operation's outputs by those of its inputs; None where all are fixed.
Rule = Callable[[Step, Sequence[Known]], list[Known] | None]


def _lengths(x: State) -> tuple[int, ...]:
    return tuple(int(np.prod([part.length for part in axis])) for axis in x.axes)


def _transpose(step: Step, states: Sequence[Known]) -> list[Known]:
    x = states[0]
    if x is None:
        return [None]
    return [dataclasses.replace(x, axes=tuple(x.axes[a] for a in step.params["permutation"]))]


def _reshape(step: Step, states: Sequence[Known]) -> list[Known] | None:
    x, shape = states[0], step.out_shapes[0]
    if x is None:
        return [None]
    left = [part for axis in x.axes for part in parts(axis)]
    axes = []
    for n in shape:
        axis, have = [], 1
        while have < n and left:
            part = left.pop(0)
            if have * part.length > n:
                if n % have or part.length % (n // have):
                    return None
                part, rest = cut_part(part, n // have)
                left.insert(0, rest)
            axis.append(part)
            have *= part.length
        if have != n:
            return None
        axes.append(tuple(axis))
    return [dataclasses.replace(x, axes=tuple(axes))]


def _broadcast(step: Step, states: Sequence[Known]) -> list[Known]:
    x = states[0]
    if x is None:
        return [None]
    shape, lengths = step.out_shapes[0], _lengths(x)
    axes: list[Axis] = [(Part(n, None, True),) for n in shape]
    for a, dim in enumerate(step.params["broadcast_dimensions"]):
        if lengths[a] == shape[dim]:
            axes[dim] = x.axes[a]
    return [dataclasses.replace(x, axes=tuple(axes))]


def _kept(step: Step, x: State, cut: Iterable[int], shape: tuple[int, ...]) -> State:
    """x with some of its axes cut to other lengths."""
    axes = list(x.axes)
    for a in cut:
        whole = fix_all(parts(axes[a]), step.reason(f"{step.name!r} takes some of its channels"))
        axes[a] = (Part(shape[a], None, all(part.equal for part in whole)),)
    return State(tuple(axes))


def _sliced(step: Step, states: Sequence[Known]) -> list[Known]:
    """Slices, also at places that are not known, and splits."""
    x = states[0]
    if x is None:
        return [None for _ in step.out_shapes]
    lengths = _lengths(x)
    return [
        _kept(step, x, [a for a, n in enumerate(lengths) if n != shape[a]], shape)
        for shape in step.out_shapes
    ]


def _pad(step: Step, states: Sequence[Known]) -> list[Known]:
    (x, fill), shape = states, step.out_shapes[0]
    if x is None:
        return [fill and plain(shape)]
    if fill is not None:
        fix(x, step.reason("it is padded"))
    longer = [a for a, added in enumerate(step.params["padding_config"]) if any(added)]
    axes = list(_kept(step, x, longer, shape).axes)
    for a in longer:
        axes[a] = (Part(shape[a]),)
    return [State(tuple(axes))]


def _reverse(step: Step, states: Sequence[Known]) -> list[Known]:
    x = states[0]
    return [x and _kept(step, x, step.params["dimensions"], step.out_shapes[0])]


def _concatenate(step: Step, states: Sequence[Known]) -> list[Known]:
    if all(x is None for x in states):
        return [None]
    shape, dim = step.out_shapes[0], step.params["dimension"]
    held = [x for x in states if x is not None]
    what = step.reason("it is joined to what has a basis of its own")
    axes: list[Axis] = []
    for a, n in enumerate(shape):
        if a == dim:
            for x in held:
                fix_all(parts(x.axes[a]), step.reason("its channels are joined to others"))
            axes.append((Part(n),))
        else:
            axes.append(join([x.axes[a] for x in held], "sum", what))
    return [State(tuple(axes))]


def _gather(step: Step, states: Sequence[Known]) -> list[Known]:
    x, dims, shape = states[0], step.params["dimension_numbers"], step.out_shapes[0]
    if x is None:
        return [None]
    sizes, lengths = step.params["slice_sizes"], _lengths(x)
    gone = (*dims.collapsed_slice_dims, *getattr(dims, "operand_batching_dims", ()))
    axes: list[Axis] = [(Part(n),) for n in shape]
    kept = [a for a in range(len(lengths)) if a not in gone]
    for a in range(len(lengths)):
        if a in gone or sizes[a] != lengths[a]:
            fix_all(parts(x.axes[a]), step.reason("rows are taken by number"))
    for dim, a in zip(dims.offset_dims, kept, strict=True):
        if sizes[a] == lengths[a]:
            axes[dim] = x.axes[a]
    return [State(tuple(axes))]


RULES: dict[str, Rule] = {
    "transpose": _transpose,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("slice", "dynamic_slice", "split"), _sliced),
    "pad": _pad,
    "rev": _reverse,
    "concatenate": _concatenate,
    GATHER: _gather,
}
