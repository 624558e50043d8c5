"""Which inputs does one parameter see in one piece of a model? Their moments, over all batches."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.interpret.evaluate import Machine
from quantjax.interpret.pieces import Leaves, Pieces, Stream
from quantjax.interpret.program import Leaf
from quantjax.interpret.record import Record
from quantjax.interpret.rows import Rows, rows_of
from quantjax.interpret.segments import Segment
from quantjax.interpret.statistics import Met, State, Statistics
from quantjax.ptq.moments import Moments, add_rows, no_moments


@dataclasses.dataclass(frozen=True, eq=False)
class _Gather:
    """Adds the rows of every product, at most so many, to the moments of its layer. floats: the
    rows of the same products in the float model, in order, if they are known."""

    layers: tuple[int, ...]
    most: int | None
    floats: list[Rows] | None = None

    def update(self, state: State, slot: jax.Array, met: Met) -> State:
        rows = rows_of(met.eqn, met.inputs, met.side, self.most)
        if rows is None:
            return state
        other = None if self.floats is None else self.floats.pop(0).x_BTI
        old = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, slot, keepdims=False), state)
        new = add_rows(Moments(**old), rows, other)._asdict()
        return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, slot, 0), state, new)


@dataclasses.dataclass(frozen=True, eq=False)
class _Collect:
    """Keeps rows of every product, in order; for products that no inner call holds."""

    rows: list[Rows]
    most: int | None
    layers: tuple[int, ...] = ()

    def update(self, state: State, slot: jax.Array, met: Met) -> State:
        rows = rows_of(met.eqn, met.inputs, met.side, self.most)
        if rows is not None:
            self.rows.append(rows)
        return state


def start(sizes: tuple[int, int, int], layers: tuple[int, ...], *, cross: bool) -> State:
    """The moments of no rows, apart for each of the layers that sizes (B, O, I) count in B."""
    n = math.prod(layers)
    none = no_moments(sizes[0] // n, sizes[2], cross=cross)._asdict()
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *a.shape)), none)


def observed(
    pieces: Pieces,
    k: int,
    leaf: Leaf,
    state: State,
    layers: tuple[int, ...],
    most: int | None,
    leaves: tuple[Leaves, Leaves],
    stream: Stream,
    float_stream: Stream | None,
) -> State:
    """`state` with what the parameter sees in piece k: with the values `stream` and the parameters
    leaves[0]; and, where that can be told product by product, what it sees beside them in the float
    model, with `float_stream` and leaves[1].

    most: how many rows of each batch are looked at. Raises ValueError, naming the parameter and the
    batch, for NaN or infinity.
    """
    at = pieces.segment(k).leaves.index(leaf)
    extra: list[Any]
    for batch in range(pieces.batches):
        if float_stream is None:
            step, streams, extra = functools.partial(_step, at, layers, most), [stream], [state]
        else:
            floats = [leaves[1](x) for x in pieces.segment(k, batch).leaves]
            step = functools.partial(_paired_step, at, most)
            streams, extra = [stream, float_stream], [state, floats]
        kind = (step.func.__name__, at, layers, most)
        state = pieces.call(kind, k, batch, step, leaves[0], *streams, extra=extra)
        if not jax.device_get(state["finite"]).all():
            raise ValueError(
                f"{leaf.name}: batch {batch}: the activation holds NaN or infinity; nothing can be "
                f"fitted to that."
            )
    return state


def _step(
    at: int, layers: tuple[int, ...], most: int | None, segment: Segment, leaves: Any,
    constants: Any, inputs: Any, state: State,
) -> State:  # fmt: skip
    return _watched(_Gather(layers, most), at, segment, leaves, constants, inputs, state)


def _paired_step(
    at: int, most: int | None, segment: Segment, leaves: Any, constants: Any, inputs: Any,
    float_inputs: Any, state: State, floats: Any,
) -> State:  # fmt: skip
    rows: list[Rows] = []
    _watched(_Collect(rows, most), at, segment, floats, constants, float_inputs, state)
    return _watched(_Gather((), most, rows), at, segment, leaves, constants, inputs, state)


def _watched(
    watch: _Gather | _Collect, at: int, segment: Segment, leaves: Any, constants: Any, inputs: Any,
    state: State,
) -> State:  # fmt: skip
    """The state after the segment; what does not lead to it is not computed."""
    name = segment.leaves[at].name
    statistics = Statistics({name: watch}, {name: state})
    segment.run(Machine(Record(), statistics=statistics), leaves, constants, inputs)
    return statistics.state[name]
