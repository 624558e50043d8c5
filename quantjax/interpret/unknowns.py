"""Which of many unknown scales are equal, and which must be one? Solved while they are met.

Each position of a value has the scale exp(power * u) of some unknown u. Equations between such
scales are solved by union-find over arrays of unknowns: an unknown is a power of another, or it is
one (unknown 0), and then the reason is kept. A gain that takes one scale to another is two
unknowns: bound to their quotient."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ONE = 0  # the unknown whose scale is one


class Scale(NamedTuple):
    """The scales of a value: the unknown and its power at each position, with an axis of length
    one where they do not differ along it. role: of a parameter's axes in its products, "in" or
    "out". why: the number of the reason, if it keeps its scale from the start."""

    node: np.ndarray
    power: np.ndarray
    role: str = ""
    why: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of its axes; one where nothing differs."""
        return self.node.shape

    def map(self, move: Callable[[np.ndarray], np.ndarray]) -> "Scale":
        """The scales after their positions have moved."""
        return self._replace(node=move(self.node), power=move(self.power))

    def first(self, axis: int) -> "Scale":
        """The first position along an axis."""
        return self.map(lambda a: a.take([0], axis))

    def to(self, power: float) -> "Scale":
        """Raised to a power."""
        return self._replace(power=self.power * power)


def ones(rank: int, why: int = 0) -> Scale:
    """A value that keeps its scale."""
    return Scale(np.zeros((1,) * rank, np.int64), np.zeros((1,) * rank), "", why)


def compact(x: Scale) -> Scale:
    """Axes along which nothing differs cut to length one."""
    for axis, n in enumerate(x.shape):
        if n > 1:
            first = x.first(axis)
            if (x.node == first.node).all() and (x.power == first.power).all():
                x = first
    return x


class Unknowns:
    """The unknowns and what is known of them. Mutable; it lives as long as one analysis.

    tied: a gain between two scaled values stays as it is, and they have one scale."""

    def __init__(self, *, tied: bool = False) -> None:
        self._tied = tied
        self._size = 1
        self._parent = np.zeros(64, np.int64)  # u = ratio * parent
        self._ratio = np.ones(64)
        self._why = np.zeros(64, np.int64)
        self._gain = np.zeros(64, bool)  # of a parameter, no equation met yet: may be bound
        self._positive = np.zeros(64, bool)
        self._upper = np.zeros(64, np.int64)  # bound: u = factor * (upper - power * lower)
        self._lower = np.zeros(64, np.int64)
        self._lower_power = np.zeros(64)
        self._factor = np.zeros(64)
        self.reasons: list[str] = [""]

    @property
    def size(self) -> int:
        """How many there are."""
        return self._size

    def fresh(self, shape: Sequence[int], *, gain: bool = False, role: str = "") -> Scale:
        """New unknowns, of a parameter under `gain`."""
        n = int(np.prod(shape, dtype=np.int64))
        while self._size + n > len(self._parent):
            for name, x in list(vars(self).items()):
                if isinstance(x, np.ndarray):
                    setattr(self, name, np.concatenate([x, np.zeros_like(x)]))
        new = np.arange(self._size, self._size + n)
        self._size += n
        self._parent[new], self._ratio[new], self._gain[new] = new, 1.0, gain
        return Scale(new.reshape(shape), np.ones(shape), role)

    def solved(self, x: Scale) -> Scale:
        """The same scales by the unknowns that stand for all that are equal."""
        node, ratio, last = x.node, np.ones(x.shape), x.node
        while True:
            up = self._parent[node]
            if (up == node).all():
                break
            last = np.where((up == ONE) & (node != ONE), node, last)
            ratio = np.where(up == node, ratio, ratio * self._ratio[node])
            node = up
        self._why[x.node] = np.where(node == ONE, self._why[last], self._why[x.node])
        self._parent[x.node], self._ratio[x.node] = node, ratio
        why = x.why
        if not why and node.size and not node.any():
            why = int(self._why[x.node.flat[0]])
        return Scale(node, np.where(node == ONE, 0.0, x.power * ratio), x.role, why)

    def why(self, x: Scale) -> list[str]:
        """Why positions of x must keep their scale, each reason once."""
        kept = self.solved(x).node == ONE
        return [self.reasons[i] for i in dict.fromkeys(self._why[x.node[kept]].tolist()) if i]

    def parts(self, x: Scale) -> list[Scale]:
        """The scales as factors, each a power of one unknown at a position: a gain that is bound
        has two."""
        x = self.solved(x)
        bound = self._upper[x.node] != ONE
        if not bound.any():
            return [x]
        factor = x.power * self._factor[x.node]
        upper = Scale(np.where(bound, self._upper[x.node], x.node), x.power, x.role)
        upper = upper._replace(power=np.where(bound, factor, x.power))
        lower = Scale(np.where(bound, self._lower[x.node], ONE), x.power, x.role)
        lower = lower._replace(power=np.where(bound, -factor * self._lower_power[x.node], 0.0))
        return [*self.parts(upper), *self.parts(lower)]

    def is_positive(self, node: np.ndarray) -> np.ndarray:
        """Whether unknowns, already solved, met an operation that only a positive scale passes."""
        return self._positive[node]

    def keep_sign(self, x: Scale) -> None:
        """x enters an operation that only a positive scale passes."""
        for part in self.parts(x):
            self._positive[part.node] = True

    def reason(self, text: str) -> int:
        """The number of a reason."""
        if self.reasons[-1] != text:
            self.reasons.append(text)
        return len(self.reasons) - 1

    def unify(self, a: Scale, b: Scale, reason: str) -> Scale:
        """Makes two scales equal, one broadcast to the other; gives it as the smaller array."""
        result = a if a.node.size <= b.node.size else b
        if not (a.node.any() or b.node.any()):
            return result._replace(why=a.why or b.why)
        self._release(np.concatenate([self.solved(a).node.ravel(), self.solved(b).node.ravel()]))
        fields = np.broadcast_arrays(a.node, a.power, b.node, b.power)
        an, ap, bn, bp = (x.ravel() for x in fields)
        own = self.reason(reason)
        while True:
            left, right = self.solved(Scale(an, ap)), self.solved(Scale(bn, bp))
            same = left.node == right.node
            odd = same & (left.node != ONE) & ~np.isclose(left.power, right.power)
            if odd.any():
                self._fix(left.node[odd], np.full(odd.sum(), own))
                continue
            if same.all():
                break
            # What joins a fixed side is fixed for the reason of that side.
            why = np.where(
                right.node == ONE,
                np.where(self._why[bn] > 0, self._why[bn], b.why),
                np.where(self._why[an] > 0, self._why[an], a.why),
            )
            swap = left.node < right.node
            high, low = np.where(swap, right.node, left.node), np.where(swap, left.node, right.node)
            high_power = np.where(swap, right.power, left.power)
            low_power = np.where(swap, left.power, right.power)
            fixed, free = ~same & (low == ONE), ~same & (low != ONE)
            self._fix(high[fixed], np.where(why > 0, why, own)[fixed])
            self._join(high[free], low[free], low_power[free] / high_power[free])
        result = compact(self.solved(result))
        return result if result.why or result.node.any() else result._replace(why=own)

    def _fix(self, node: np.ndarray, why: np.ndarray) -> None:
        """These keep their scale."""
        node, first = np.unique(node, return_index=True)
        self._parent[node], self._ratio[node], self._gain[node] = ONE, 1.0, False
        self._why[node] = why[first]

    def _join(self, high: np.ndarray, low: np.ndarray, ratio: np.ndarray) -> None:
        """high = ratio * low for each first mention of a `high`."""
        high, first = np.unique(high, return_index=True)
        low = low[first]
        self._parent[high], self._ratio[high] = low, ratio[first]
        np.logical_or.at(self._positive, low, self._positive[high])
        self._gain[high] = self._gain[low] = False

    def keep(self, x: Scale, reason: str) -> None:
        """x keeps its scale."""
        if x.node.any():
            self.unify(x, ones(len(x.shape)), reason)

    def along(self, x: Scale, axes: Sequence[int], reason: str) -> Scale:
        """Makes x equal along axes; they have length one in what this gives."""
        first = x
        for axis in axes:
            if first.shape[axis] > 1:
                first = first.first(axis)
        if first.shape != x.shape:
            self.unify(x, first, reason)
            first = self.solved(first)
        return first

    def times(self, a: Scale, b: Scale, reason: str) -> Scale:
        """The scale of a product of two values, elementwise. Where both have one, a gain among them
        is bound, so that the product's is free; without a gain, b keeps its scale."""
        a, b = self.solved(a), self.solved(b)
        if not b.node.any() and np.broadcast_shapes(a.shape, b.shape) == a.shape:
            return a if a.why else a._replace(why=b.why)
        why = a.why or b.why
        fields = np.broadcast_arrays(a.node, a.power, b.node, b.power)
        a, b = Scale(fields[0], fields[1]), Scale(fields[2], fields[3])
        hard = (a.node != ONE) & (b.node != ONE) & (a.node != b.node)
        if hard.any():
            x, y = a.map(lambda v: v[hard]), b.map(lambda v: v[hard])
            node, power = a.node.copy(), a.power.copy()
            found = self._through(x, y) or self._through(y, x)
            if not self._tied:
                found = found or self._bind(x, y) or self._bind(y, x)
                found = found or self._led(x, y) or self._led(y, x)
            if found is None:
                gain = self._gain[x.node].all() and not self._gain[y.node].all()
                self.keep(x if gain else y, reason)
                return self.times(a, b, reason)
            node[hard], power[hard] = found.node, found.power
            rest = [s.map(lambda v: np.where(hard, ONE, v)) for s in (a, b)]
            easy = self.times(rest[0], rest[1], reason)
            easy = easy.map(lambda v: np.broadcast_to(v, hard.shape))
            node, power = np.where(hard, node, easy.node), np.where(hard, power, easy.power)
            return compact(Scale(node, power))
        power = a.power + b.power
        node = np.where(np.isclose(power, 0), ONE, np.where(a.node == ONE, b.node, a.node))
        return compact(Scale(node, np.where(node == ONE, 0.0, power), "", why))

    def _through(self, x: Scale, y: Scale) -> Scale | None:
        """x times the gain y, bound before to take what x has to another scale."""
        if (self._upper[y.node] == ONE).any():
            return None
        factor = y.power * self._factor[y.node]
        lower = self.solved(Scale(self._lower[y.node], factor * self._lower_power[y.node]))
        if (lower.node != x.node).any() or not np.isclose(lower.power, x.power).all():
            return None
        return Scale(self._upper[y.node], factor)

    def _led(self, x: Scale, y: Scale) -> Scale | None:
        """x times the gain y, bound before by a gain that no other equation holds: that one gets
        the scale of x, as a mean does in x * gain + (bias - mean * gain)."""
        lower = self._lower[y.node]
        if (self._upper[y.node] == ONE).any() or not self._gain[lower].all():
            return None
        power = y.power * self._factor[y.node] * self._lower_power[y.node]
        self.unify(Scale(lower, power), x, "a gain meets more than one scale")
        return self._through(self.solved(x), y)

    def _bind(self, x: Scale, y: Scale) -> Scale | None:
        """A new scale for x times y; y is bound to its quotient by that of x."""
        if not self._gain[y.node].all() or (self._upper[x.node] != ONE).any():
            return None
        gains, first, inverse = np.unique(y.node, return_index=True, return_inverse=True)
        same = (x.node == x.node[first][inverse]) & (x.power == x.power[first][inverse])
        if not (same & (y.power == y.power[first][inverse])).all():
            return None
        made = self.fresh(gains.shape)
        self._gain[gains] = False
        self._upper[gains], self._lower[gains] = made.node, x.node[first]
        self._lower_power[gains], self._factor[gains] = x.power[first], 1 / y.power[first]
        return made.map(lambda v: v[inverse])

    def _release(self, node: np.ndarray) -> None:
        """A bound gain that meets an equation of its own keeps its scale: what it takes to another
        scale has that of the result."""
        node = np.unique(node[self._upper[node] != ONE])
        if not node.size:
            return
        upper, lower = self._upper[node], Scale(self._lower[node], self._lower_power[node])
        self._upper[node] = self._lower[node] = ONE
        reason = "a gain meets more than one scale"
        self._fix(node, np.full(node.shape, self.reason(reason)))
        self.unify(Scale(upper, np.ones(upper.shape)), lower, reason)
