"""How is a model run in pieces, one after another? Cut where the next parameters come into play.

A segment is a pure function of its parameters and of the values that earlier segments left. Values
that depend on parameters and constants alone (casts, tables of angles) belong to every segment that
needs them. Segments of one shape, as the layers of a network are, compile once."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from quantjax.interpret import jax_compat as compat
from quantjax.interpret.evaluate import Machine, has_products
from quantjax.interpret.param import Param
from quantjax.interpret.program import (
    Constant,
    Equation,
    Instruction,
    Leaf,
    Operand,
    Program,
    Value,
    run_instructions,
)

Label = Any  # hashable


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A part of a program. labels: of the parameters it is about. fixed: its instructions that
    depend on no argument; instructions: the others, in order. leaves, constants, inputs: what it
    reads. outputs: the values it gives to later segments or as the model's output."""

    labels: frozenset[Label]
    fixed: tuple[Instruction, ...]
    instructions: tuple[Instruction, ...]
    leaves: tuple[Leaf, ...]
    constants: tuple[Constant, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    key: Hashable  # equal for segments that compute the same

    def run(
        self, machine: Machine, leaves: Sequence[Any], constants: Sequence[Any], inputs: Any
    ) -> list[Any]:
        """The values of `outputs`; arrays or QTensors for `leaves`, arrays for the others."""
        env = self.values(machine, leaves, constants, inputs, self.instructions)
        return [x.array() if isinstance(x, Param) else x for x in map(env.get, self.outputs)]

    def values(
        self,
        machine: Machine,
        leaves: Sequence[Any],
        constants: Sequence[Any],
        inputs: Sequence[Any],
        instructions: Sequence[Instruction],
    ) -> dict[int, Any]:
        """By id, the values after some of its instructions."""
        held = dict(zip(self.leaves, leaves, strict=True))
        numbers = {id(c.value): x for c, x in zip(self.constants, constants, strict=True)}
        env: dict[int, Any] = dict(zip(self.inputs, inputs, strict=True))
        for part in (self.fixed, instructions):
            run_instructions(machine, [_given(s, numbers) for s in part], _Bare(held), env)
        return env

    def is_plain(self, leaf: Leaf) -> bool:
        """Whether the products of a parameter are steps of their own, none in an inner call."""
        views: set[Operand] = {leaf}
        for step in self.fixed:
            if any(_bare(x) in views for x in step.inputs if not isinstance(x, Constant)):
                views.update(map(Value, step.outputs))
        users = [
            step.run.eqn
            for step in self.instructions
            if isinstance(step.run, Equation)
            and any(_bare(x) in views for x in step.inputs if not isinstance(x, Constant))
        ]
        return not any(has_products(eqn) for eqn in users)


def _bare(x: Operand) -> Operand:
    return x._replace(casts=()) if isinstance(x, Leaf) else x


class _Bare(dict):
    """Leaves by path and layer, whatever their casts."""

    def __call__(self, x: Leaf) -> Any:
        return self[x._replace(casts=())]


def _given(step: Instruction, numbers: Mapping[int, Any]) -> Instruction:
    """The instruction with arrays that the model holds as they were passed."""
    inputs = tuple(
        Constant(numbers[id(x.value)]) if isinstance(x, Constant) and _is_array(x) else x
        for x in step.inputs
    )
    return dataclasses.replace(step, inputs=inputs)


def _is_array(x: Constant) -> bool:
    return np.ndim(x.value) > 0


def cut(program: Program, label: Callable[[Leaf], Label | None]) -> tuple[Segment, ...]:
    """The segments of a program, in order; run one after another they are the program.

    `label` names the block of a parameter, None for one that starts no block (it belongs to
    whatever segment uses it). A segment begins where a parameter of another block than those before
    it is used; one instruction that uses parameters of several blocks has them all.
    """
    fixed, found = _fixed(program)
    parts: list[tuple[set[Label], list[Instruction]]] = [(set(), [])]
    for step in program.instructions:
        if step.outputs and step.outputs[0] in fixed:
            continue
        own = {label(leaf) for leaf in found(step)} - {None}
        if own and parts[-1][0] and not own <= parts[-1][0]:
            parts.append((set(), []))
        parts[-1][0].update(own)
        parts[-1][1].append(step)
    return tuple(_segments(program, fixed, parts))


def _fixed(program: Program) -> tuple[dict[int, Instruction], Callable[..., set[Leaf]]]:
    """The instructions that depend on no argument, by the values they give; and what finds the
    parameters that an instruction uses, through those too."""
    fixed: dict[int, Instruction] = {}
    moving = set(program.arguments)
    for step in program.instructions:
        if any(isinstance(x, Value) and x.id in moving for x in step.inputs):
            moving.update(step.outputs)
        else:
            fixed.update(dict.fromkeys(step.outputs, step))

    def leaves(step: Instruction) -> set[Leaf]:
        out: set[Leaf] = set()
        for x in step.inputs:
            if isinstance(x, Leaf):
                out.add(x._replace(casts=()))
            elif isinstance(x, Value) and x.id in fixed:
                out |= leaves(fixed[x.id])
        return out

    return fixed, leaves


def _segments(
    program: Program,
    fixed: Mapping[int, Instruction],
    parts: Sequence[tuple[set[Label], list[Instruction]]],
) -> Iterator[Segment]:
    kept = [x.id for x in program.outputs if isinstance(x, Value)]
    needed = [{x.id for s in steps for x in s.inputs if isinstance(x, Value)} for _, steps in parts]
    for i, (labels, steps) in enumerate(parts):
        later = set(kept).union(*needed[i + 1 :])
        own = dict.fromkeys(id for s in steps for id in s.outputs)
        last = i == len(parts) - 1
        wanted = [id for id in kept if id in fixed] if last else []
        before = _before(steps, wanted, fixed)
        reads = [x for s in (*before, *steps) for x in s.inputs]
        leaves = dict.fromkeys(x._replace(casts=()) for x in reads if isinstance(x, Leaf))
        constants = {id(x.value): x for x in reads if isinstance(x, Constant) and _is_array(x)}
        inputs = dict.fromkeys(
            x.id
            for s in steps
            for x in s.inputs
            if isinstance(x, Value) and x.id not in own and x.id not in fixed
        )
        outputs = (*(id for id in own if id in later), *wanted)
        segment = Segment(
            frozenset(labels),
            before,
            tuple(steps),
            tuple(leaves),
            tuple(constants.values()),
            tuple(inputs),
            outputs,
            None,
        )
        yield dataclasses.replace(segment, key=_key(segment, program))


def _before(
    steps: Sequence[Instruction], wanted: Sequence[int], fixed: Mapping[int, Instruction]
) -> tuple[Instruction, ...]:
    """The fixed instructions that these steps need, in order."""
    out: dict[int, Instruction] = {}

    def add(id: int) -> None:
        step = fixed.get(id)
        if step is None or step.outputs[0] in out:
            return
        for x in step.inputs:
            if isinstance(x, Value):
                add(x.id)
        out[step.outputs[0]] = step

    for step in steps:
        for x in step.inputs:
            if isinstance(x, Value):
                add(x.id)
    for id in wanted:
        add(id)
    return tuple(out.values())


def _key(segment: Segment, program: Program) -> Hashable:
    """What the segment computes, its values and parameters numbered in order of use."""
    numbers: dict[Any, int] = {}

    def name(x: Any) -> Any:
        if isinstance(x, Constant):
            if _is_array(x):
                return ("array", numbers.setdefault(id(x.value), len(numbers)))
            return ("number", repr(x.value), str(getattr(x.value, "dtype", type(x.value))))
        casts: tuple[Any, ...] = ()
        if isinstance(x, Leaf):
            casts, x = x.casts, x._replace(casts=())
        return (numbers.setdefault(x, len(numbers)), *map(str, casts))

    steps = []
    for step in (*segment.fixed, *segment.instructions):
        inputs = tuple(name(x) for x in step.inputs)
        steps.append((_operation(step), inputs, tuple(name(Value(id)) for id in step.outputs)))
    ends = [
        tuple((name(Value(id)), str(program.avals[id])) for id in ids)
        for ids in (segment.inputs, segment.outputs)
    ]
    leaves = tuple(name(x) for x in segment.leaves)
    constants = tuple((name(x), np.shape(x.value), str(x.value.dtype)) for x in segment.constants)
    return (tuple(steps), *ends, leaves, constants)


def _operation(step: Instruction) -> Hashable:
    """An operation with its parameters, as text."""
    eqn = getattr(step.run, "eqn", None)
    if eqn is None:
        return repr(step.run)
    return (eqn.primitive.name, *((name, _text(x)) for name, x in sorted(eqn.params.items())))


def _text(x: Any) -> Hashable:
    """A parameter of an operation: a jaxpr with the identity of what it closes over, a function by
    its name (which a custom derivative's comes with, beside its jaxpr), all else as it prints."""
    if isinstance(x, ClosedJaxpr | Jaxpr):
        opened, consts = compat.open_jaxpr(x)
        inner = [_text(j) for eqn in opened.eqns for j in compat.inner_jaxprs(eqn)]
        return (str(opened), *map(id, consts), *inner)
    if isinstance(x, tuple | list):
        return tuple(map(_text, x))
    if callable(x) and not isinstance(x, type | np.dtype):
        return getattr(x, "__qualname__", type(x).__qualname__)
    return repr(x)


_MADE: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
_KEPT = 512  # programs; a network has a few for each kind of layer


def compiled(kind: Hashable, segment: Segment, make: Callable[[], Callable[..., Any]]) -> Any:
    """jit(make()) of the first segment that computes what this one does, for this kind of function.

    Kept from call to call, as one network is quantized in many ways. What a key names by identity
    lives as long as its program, so that no other object can have that identity.
    """
    key = (kind, segment.key)
    if key not in _MADE:
        _MADE[key] = jax.jit(make())
    _MADE.move_to_end(key)
    while len(_MADE) > _KEPT:
        _MADE.popitem(last=False)
    return _MADE[key]
