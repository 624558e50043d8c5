"""How do calibration batches go through a model piece by piece? Each piece once, for all batches.

What one piece gives is kept for the next, so that a method which settles a network from front
to back costs one pass, and holds the values of one boundary, not those of the whole model."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax

from quantjax.fake_quantized import is_quantized
from quantjax.interpret.evaluate import Machine
from quantjax.interpret.intercept import is_array
from quantjax.interpret.program import Leaf, flatten
from quantjax.interpret.record import Record
from quantjax.interpret.segments import Label, Segment, compiled, cut

Stream = list[dict[int, jax.Array]]  # for each batch, by id, the values at a boundary
Leaves = Callable[[Leaf], Any]  # the array or QTensor of one layer of a parameter


def arguments(batch: Any) -> tuple[Any, ...]:
    """The arguments beside the parameters: a plain tuple is spread, anything else is one."""
    return batch if type(batch) is tuple else (batch,)


class Pieces:
    """The segments of `apply(tree, *batch)`, and the batches.

    Batches may differ in shape: each shape has a program of its own, cut alike. `label` is that of
    `segments.cut`. Raises ValueError for no batches, or where shapes give different segments.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        tree: Any,
        batches: Iterable[Any],
        label: Callable[[Leaf], Label | None],
    ) -> None:
        self._arrays: list[list[Any]] = []
        self._segments: list[tuple[Segment, ...]] = []
        self._first: list[tuple[int, ...]] = []
        made: dict[Hashable, tuple[Any, tuple[Segment, ...]]] = {}
        for batch in batches:
            args = arguments(batch)
            leaves, structure = jax.tree.flatten((args, {}), is_leaf=is_quantized)
            facts = tuple((x.shape, str(x.dtype)) if is_array(x) else repr(x) for x in leaves)
            if (structure, facts) not in made:
                program = flatten(apply, tree, *args)
                made[structure, facts] = (program, cut(program, label))
            program, segments = made[structure, facts]
            self._arrays.append([x for x in leaves if is_array(x)])
            self._segments.append(segments)
            self._first.append(program.arguments)
        if not self._segments:
            raise ValueError("calibrate: expected at least one batch, got none.")
        kinds = {tuple(s.labels for s in segments) for segments in self._segments}
        if len(kinds) > 1:
            raise ValueError(
                "calibrate: batches of different shapes take different ways through the model, so "
                "it can not be calibrated piece by piece; give them one shape."
            )

    def __len__(self) -> int:
        return len(self._segments[0])

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._segments)

    def segments(self) -> tuple[Segment, ...]:
        """All pieces, as they are for the first batch."""
        return self._segments[0]

    def segment(self, k: int, batch: int = 0) -> Segment:
        """Piece k, as it is for one batch."""
        return self._segments[batch][k]

    def start(self) -> Stream:
        """The arguments of every batch, before the first piece."""
        pairs = zip(self._first, self._arrays, strict=True)
        return [dict(zip(ids, arrays, strict=True)) for ids, arrays in pairs]

    def call(
        self,
        kind: Hashable,
        k: int,
        batch: int,
        function: Callable[..., Any],
        leaves: Leaves,
        *streams: Stream,
        extra: Sequence[Any] = (),
    ) -> Any:
        """function(segment, leaves, constants, *inputs, *extra), compiled once for equal segments.

        inputs: the values that piece k reads of each stream, for this batch. `kind` names the
        function and what it holds: two of one name are taken for the same.
        """
        segment = self.segment(k, batch)
        held = [leaves(x) for x in segment.leaves]
        constants = [x.value for x in segment.constants]
        inputs = [[stream[batch][id] for id in segment.inputs] for stream in streams]

        def make() -> Callable[..., Any]:
            return lambda *args: function(segment, *args)

        return compiled(kind, segment, make)(held, constants, *inputs, *extra)

    def advance(self, k: int, stream: Stream, leaves: Leaves) -> Stream:
        """The stream after piece k with these parameters. What no later piece reads is dropped."""
        after = []
        for batch in range(self.batches):
            out = self.call("run", k, batch, _run, leaves, stream)
            later = self._segments[batch][k + 1 :]
            needed = {id for segment in later for id in segment.inputs}
            kept = {id: x for id, x in stream[batch].items() if id in needed}
            after.append(kept | dict(zip(self.segment(k, batch).outputs, out, strict=True)))
        return after


def _run(segment: Segment, leaves: Any, constants: Any, inputs: Any) -> list[Any]:
    return segment.run(Machine(Record()), leaves, constants, inputs)
