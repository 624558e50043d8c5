"""Along which axes can an orthogonal matrix turn a model's values, and what must turn with them?
Found on its flat program.

Every axis of every parameter has a basis of its own, free at first. Sums make two bases one, a
product that sums over an axis asks for one basis on both sides (x R R^T w = x w), and a sum of
squares does not see it, so that a residual stream between norms without gains stays free. Whatever
acts on channels one by one fixes the basis, with a reason. An axis that a model splits, as heads
times features, keeps a basis on its last part."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np


class Basis:
    """The basis of an axis. Mutable: one may become another (`same`), part of it (`split`), or
    fixed, for a `reason`. keeps_sum: the matrix must leave the vector of ones as it is. contracted:
    a product sums over it. normed: a sum of squares went over it."""

    def __init__(self, size: int) -> None:
        self.size, self.reason = size, ""
        self.keeps_sum = self.contracted = self.normed = False
        self.same: Basis | None = None
        self.split: tuple[Part, ...] | None = None

    def root(self) -> "Basis":
        """The basis that stands for all that are the same."""
        x = self
        while x.same is not None:
            x = x.same
        return x

    def fix(self, reason: str) -> None:
        """It can not be turned."""
        x = self.root()
        if x.split is not None:
            fix_all(x.split, reason)
        x.reason = x.reason or reason


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A part of an axis: its length, its basis if it can be turned, else whether all entries along
    it are equal."""

    length: int
    basis: Basis | None = None
    equal: bool = False


Axis = tuple[Part, ...]  # their lengths multiply to that of the axis; the last varies fastest


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """The parts of every axis of a value. squares: it holds the squares of what has these bases."""

    axes: tuple[Axis, ...]
    squares: bool = False


Known = State | None  # None: zeros, which any matrix leaves as they are


def parts(axis: Iterable[Part]) -> Axis:
    """The axis as it is known now; parts of length one dropped."""
    out: list[Part] = []
    for part in axis:
        if part.basis is not None:
            root = part.basis.root()
            if root.split is not None:
                out += parts(root.split)
                continue
            part = Part(part.length, None if root.reason else root)
        out.append(part)
    return tuple(part for part in out if part.length != 1)


def fix_all(axis: Iterable[Part], reason: str) -> Axis:
    """The axis with every basis on it fixed."""
    for part in axis:
        if part.basis is not None:
            part.basis.fix(reason)
    return tuple(Part(p.length, None, p.equal and p.basis is None) for p in axis)


def fix(state: Known, reason: str) -> None:
    """Fixes every basis of a value."""
    for axis in () if state is None else state.axes:
        fix_all(axis, reason)


def plain(shape: Sequence[int], *, equal: bool = False) -> State:
    """A value without bases."""
    return State(tuple((Part(n, None, equal),) for n in shape))


def cut_part(part: Part, length: int) -> tuple[Part, Part]:
    """The part as two, the first of this length; a basis stays on the second."""
    rest = part.length // length
    if part.basis is None:
        return Part(length, None, part.equal), Part(rest, None, part.equal)
    made = Part(length), Part(rest, Basis(rest))
    if made[1].basis is not None:
        made[1].basis.keeps_sum = part.basis.keeps_sum
        made[1].basis.normed = part.basis.normed
        made[1].basis.contracted = part.basis.contracted
    part.basis.root().split = made
    return made


def _aligned(axes: Sequence[Axis]) -> list[tuple[Part, ...]] | None:
    """Several descriptions of one axis cut at the same places; None where that can not be."""
    left = [list(parts(axis)) for axis in axes]
    out = []
    while all(left):
        first = [axis.pop(0) for axis in left]
        length = min(part.length for part in first)
        for i, part in enumerate(first):
            if part.length % length:
                return None
            if part.length > length:
                first[i], rest = cut_part(part, length)
                left[i].insert(0, rest)
        out.append(tuple(first))
    if any(left):
        return None
    bases = [part.basis for row in out for part in row if part.basis is not None]
    # A cut may have changed what another description of the same basis says.
    return _aligned(axes) if any(basis.root().split for basis in bases) else out


def join(axes: Sequence[Axis], kind: str, reason: str) -> Axis:
    """One axis of several values that meet. kind: "sum", "dot" where a product sums over it, or
    "scale" where they are multiplied."""
    rows = _aligned(axes)
    if rows is None:
        length = int(np.prod([part.length for part in axes[0]]))
        for axis in axes:
            fix_all(axis, reason)
        return (Part(length),)
    return tuple(_met(row, kind, reason) for row in rows)


def _met(row: Sequence[Part], kind: str, reason: str) -> Part:
    length = row[0].length
    bases = [part.basis.root() for part in row if part.basis is not None]
    others = [part for part in row if part.basis is None]
    if not bases:
        return Part(length, None, all(part.equal for part in row))
    rough = not all(part.equal for part in others) or (kind == "scale" and len(bases) > 1)
    first = bases[0]
    for other in bases[1:]:
        if other is not first:
            other.same = first
            first.keeps_sum |= other.keeps_sum
            first.contracted |= other.contracted
            first.normed |= other.normed
    if rough:
        first.fix(reason)
        return Part(length)
    first.keeps_sum |= kind != "scale" and bool(others)
    first.contracted |= kind == "dot"
    return Part(length, first)
