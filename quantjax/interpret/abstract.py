"""What can be told of every value of a model without running it? An abstract interpretation of its
flat program: what is known of an operation's inputs gives what is known of its outputs.
Cousot and Cousot, "Abstract Interpretation", 1977, POPL.

A `Domain` says what is known of a value and has one rule an operation. Here is what all of them
share: the order of the program, the calls that are entered, layers of a scan, where it ends."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
import numpy as np

from quantjax.interpret import jax_compat as compat
from quantjax.interpret.program import (
    Constant,
    Equation,
    Key,
    Leaf,
    Operand,
    Program,
    Take,
    walk,
)

State = TypeVar("State")  # what is known of one value
Shape = tuple[int, ...]

_CALLS = (compat.JIT, compat.REMAT, compat.CUSTOM_JVP, compat.CUSTOM_VJP, "closed_call")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One equation while it is looked at. module: where it stands. same: its two operands are one
    value."""

    eqn: Any
    module: str
    same: bool = False

    @property
    def name(self) -> str:
        """Of the operation."""
        return self.eqn.primitive.name

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """Of the operation; NumPy's integers as Python's, which annotations ask for."""
        return {name: _plain(x) for name, x in self.eqn.params.items()}

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """Of the inputs."""
        return [_shape(v.aval) for v in self.eqn.invars]

    @functools.cached_property
    def out_shapes(self) -> list[Shape]:
        """Of the outputs."""
        return [_shape(v.aval) for v in self.eqn.outvars]

    @property
    def body(self) -> Any:
        """The jaxpr of a call that can be entered; None for all else."""
        if self.name not in _CALLS:
            return None
        if self.name in (compat.CUSTOM_JVP, compat.CUSTOM_VJP):
            return self.params.get("call_jaxpr")
        inner = list(compat.inner_jaxprs(self.eqn))
        return inner[0] if len(inner) == 1 else None

    def reason(self, what: str) -> str:
        """What happens, and where."""
        return f"{what} ({self.module})" if self.module else what


@runtime_checkable
class Domain(Protocol[State]):
    """What is known of a value, and how one operation hands it on."""

    def leaf(self, leaf: Leaf) -> State:
        """What is known of a parameter that is met for the first time."""

    def constant(self, value: np.ndarray) -> State:
        """What is known of numbers that the model holds itself."""

    def plain(self, shape: Shape, reason: str) -> State:
        """What is known of any value of this shape, for this reason."""

    def taken(self, state: State, i: int) -> State:
        """What is known of entry i of the first axis."""

    def keep(self, state: State, reason: str) -> None:
        """A value must stay as it is."""

    def outputs(self, step: Step, states: Sequence[State]) -> list[State]:
        """What is known of an equation's outputs, by its rule."""


def interpret(domain: Domain[State], program: Program) -> tuple[dict[Key, State], dict[int, State]]:
    """What is known of every parameter, by path and layer, and of every value, by its id."""
    leaves: dict[Key, State] = {}
    values: dict[int, State] = {}

    def read(x: Operand) -> State:
        if isinstance(x, Leaf):
            if x.key not in leaves:
                leaves[x.key] = domain.leaf(x)
            return leaves[x.key]
        return _constant(domain, x.value) if isinstance(x, Constant) else values[x.id]

    for id in program.arguments:
        values[id] = domain.plain(_shape(program.avals[id]), "it is the model's input")
    for instruction in program.instructions:
        states = [read(x) for x in instruction.inputs]
        match instruction.run:
            case Equation(eqn, place):
                step = Step(eqn, place.module, _same(instruction.inputs))
                outputs = _outputs(domain, step, states)
            case Take(i):
                outputs = [domain.taken(states[0], i)]
            case _:  # what the steps of a scan gave
                for state in states:
                    domain.keep(state, "it is stacked with other steps of a scan")
                (out,) = instruction.outputs
                outputs = [domain.plain(_shape(program.avals[out]), "")]
        values.update(zip(instruction.outputs, outputs, strict=True))
    for x in program.outputs:
        domain.keep(read(x), "it is the model's output")
    return leaves, values


def _outputs(domain: Domain[State], step: Step, states: Sequence[State]) -> list[State]:
    """What is known of the outputs of an equation, or of what it calls."""
    if (body := step.body) is None:
        return domain.outputs(step, states)

    def each(eqn: Any, inputs: list[State]) -> list[State]:
        return _outputs(domain, Step(eqn, step.module, _same(eqn.invars)), inputs)

    return walk(body, states, functools.partial(_constant, domain), each)


def _constant(domain: Domain[State], value: Any) -> State:
    if hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.number):
        return domain.plain(np.shape(value), "")  # keys, masks
    return domain.constant(np.asarray(value))


def _same(inputs: Sequence[Any]) -> bool:
    return len(inputs) == 2 and inputs[0] == inputs[1]


def _shape(aval: Any) -> Shape:
    return tuple(map(int, getattr(aval, "shape", ())))


def _plain(x: Any) -> Any:
    if type(x) in (tuple, list):
        return tuple(map(_plain, x))
    return int(x) if isinstance(x, np.integer) else x
