"""Which scales can values have that meet in one operation? What all rules of scales ask for."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from quantjax.interpret.abstract import Step
from quantjax.interpret.unknowns import Scale, Unknowns, ones

# The scales of a value: factors, more than one for the weights of a product; None for zeros and
# infinities, which have any scale.
State = tuple[Scale, ...] | None
# The scales of an operation's outputs by those of its inputs; None where no scale passes.
Rule = Callable[["Context", Sequence[State]], list[State] | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """One equation while it is looked at, and the unknowns."""

    step: Step
    unknowns: Unknowns

    def single(self, state: State, i: int) -> Scale:
        """The scales of input i as one factor; a parameter with more keeps its scales."""
        rank = len(self.step.shapes[i])
        if state is None:
            return ones(rank)
        state = tuple(self.unknowns.solved(x) for x in state)
        held = [x for x in state if x.node.any()]
        if len(held) == 1:
            return held[0]._replace(role="")
        self.keep([tuple(held)], f"a parameter enters {self.step.name!r}")
        return ones(rank, why(state))

    def equal(self, states: Sequence[State], first: int = 0) -> State:
        """The scale of inputs from `first` on, made equal; zeros and infinities have any that is
        positive."""
        held = [self.single(x, i) for i, x in enumerate(states, first) if x is not None]
        if not held:
            return None
        rank = max(len(x.shape) for x in held)
        what = self.step.reason(f"a scaled and an unscaled value meet in {self.step.name!r}")
        wide = [widened(x, rank) for x in held]
        x = functools.reduce(lambda a, b: self.unknowns.unify(a, b, what), wide)
        if len(held) < len(states):
            self.unknowns.keep_sign(x)
        return (x,)

    def along(self, x: Scale, axes: Sequence[int]) -> Scale:
        """One scale along these axes."""
        what = self.step.reason(f"{self.step.name!r} goes over the channels")
        return self.unknowns.along(x, axes, what)

    def keep(self, states: Sequence[State], what: str) -> None:
        """These values keep their scales."""
        for x in (x for state in states if state is not None for x in state):
            self.unknowns.keep(x, self.step.reason(what))

    def free(self) -> list[State]:
        """What is the same whatever the scales."""
        return [(ones(len(shape)),) for shape in self.step.out_shapes]


def each(state: State, move: Callable[[Scale], Scale]) -> State:
    """All factors of a value, moved."""
    return None if state is None else tuple(map(move, state))


def why(state: Sequence[Scale]) -> int:
    """Why a value keeps its scale."""
    return next((x.why for x in state if x.why), 0)


def widened(x: Scale, rank: int) -> Scale:
    """The scale of a scalar beside arrays of this rank."""
    return x if len(x.shape) == rank else x.map(lambda a: a.reshape((1,) * rank))
