"""What does a model do, step by step? Its trace as one flat list of instructions.

Calls are inlined (jit, remat, and functions with a custom JVP that hold products), and scans over
stacked parameters are unrolled, so that each layer of a network has instructions of its own. What
can not be opened stays one instruction. On this list one can see what comes before and after
a parameter's product, and cut the model in pieces that run one after another."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.interpret import jax_compat as compat
from quantjax.interpret.evaluate import Machine, equation, has_products
from quantjax.interpret.intercept import trace
from quantjax.interpret.param import Param, cast, param
from quantjax.interpret.record import Place

T = TypeVar("T")

Key = tuple[str, tuple[int, ...]]  # the path of a parameter, and which of its layers


class Leaf(NamedTuple):
    """An operand: the parameter at this path, one layer of it if scans took axes off, as it was
    cast on the way there."""

    path: str
    layer: tuple[int, ...] = ()
    casts: tuple[np.dtype, ...] = ()

    @property
    def name(self) -> str:
        """The path, and the layer if there are several."""
        return "/".join([self.path, *(f"[{i}]" for i in self.layer)])

    @property
    def key(self) -> Key:
        """Which parameter, and layer, however it was cast."""
        return self.path, self.layer


class Value(NamedTuple):
    """An operand: what an instruction, or an argument of the model, gave."""

    id: int


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An operand: an array or number that the model holds itself. Equal to no other, whatever its
    value; a tuple of 3 would be the `Value` 3."""

    value: Any


Operand = Leaf | Value | Constant


class Equation(NamedTuple):
    """One equation of a jaxpr, run as the evaluator runs it."""

    eqn: Any
    place: Place

    def __call__(self, machine: Machine, inputs: list[Any]) -> list[Any]:
        with compat.scope(self.place.module):
            return equation(machine, self.eqn, inputs, self.place)


class Take(NamedTuple):
    """What one step of a scan sees of an array that it runs over."""

    step: int

    def __call__(self, machine: Machine, inputs: list[Any]) -> list[Any]:
        return [lax.index_in_dim(inputs[0], self.step, keepdims=False)]


class Stack(NamedTuple):
    """What the steps of a scan give, stacked."""

    def __call__(self, machine: Machine, inputs: list[Any]) -> list[Any]:
        return [jnp.stack(inputs)]


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One step: what it runs, on which operands, and the ids of the values that it gives."""

    run: Equation | Take | Stack
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]

    @property
    def primitive(self) -> str:
        """The name of its operation."""
        eqn = getattr(self.run, "eqn", None)
        return type(self.run).__name__.lower() if eqn is None else eqn.primitive.name


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A flat model. arguments: the ids of its arrays that are no parameters, in order. outputs:
    the operands it returns, in the tree `structure`. avals: shape and dtype of every value."""

    instructions: tuple[Instruction, ...]
    arguments: tuple[int, ...]
    outputs: tuple[Operand, ...]
    structure: Any
    avals: dict[int, Any]

    def run(self, machine: Machine, leaves: Callable[[Leaf], Any], arguments: Sequence[Any]) -> Any:
        """The model's output; `leaves` gives the array or QTensor of a parameter's layer."""
        env: dict[int, Any] = dict(zip(self.arguments, arguments, strict=True))
        run_instructions(machine, self.instructions, leaves, env)
        out = [read(machine, x, leaves, env) for x in self.outputs]
        arrays = [x.array() if isinstance(x, Param) else x for x in out]
        return jax.tree.unflatten(self.structure, arrays)


def read(machine: Machine, x: Operand, leaves: Callable[[Leaf], Any], env: dict[int, Any]) -> Any:
    """The value of an operand; a parameter as the view that the evaluator knows."""
    match x:
        case Value(id=id):
            return env[id]
        case Constant(value=value):
            return value
    view = param(leaves(x), x.name, machine.statistics.slot(x.name))
    for dtype in x.casts:
        view = cast(view, dtype)
    return view


def run_instructions(
    machine: Machine,
    instructions: Sequence[Instruction],
    leaves: Callable[[Leaf], Any],
    env: dict[int, Any],
) -> None:
    """Runs them in order on the values in `env`, and adds to it what they give."""
    for step in instructions:
        outputs = step.run(machine, [read(machine, x, leaves, env) for x in step.inputs])
        env.update(zip(step.outputs, outputs, strict=True))


def layer_of(leaf: Any, layer: tuple[int, ...]) -> Any:
    """One layer of a parameter, an array or a QTensor."""
    return jax.tree.map(lambda a: a[layer], leaf) if layer else leaf


def flatten(apply: Callable[..., Any], *args: Any, **kwargs: Any) -> Program:
    """The flat program of `apply(params, ...)`; arguments may be ShapeDtypeStructs.

    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> p = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> [step.primitive for step in flatten(apply, p, jnp.ones((4, 2))).instructions]
    ['dot_general', 'custom_jvp_call', 'dot_general']
    """
    jaxpr, named, structure = trace(apply, args, kwargs)
    inliner = _Inliner()
    operands: list[Operand] = []
    arguments: list[int] = []
    opened, _ = compat.open_jaxpr(jaxpr)
    for (name, _), var in zip(named, opened.invars, strict=True):
        if name is None:
            argument = inliner.value(var.aval)
            operands.append(argument)
            arguments.append(argument.id)
        else:
            operands.append(Leaf(name))
    outputs = inliner.body(jaxpr, operands, Place())
    return Program(tuple(inliner.steps), tuple(arguments), tuple(outputs), structure, inliner.avals)


def walk(
    jaxpr: Any,
    inputs: Sequence[T],
    constant: Callable[[Any], T],
    outputs: Callable[[Any, list[T]], Sequence[T]],
) -> list[T]:
    """The outputs of a jaxpr, by whatever stands for a value: `constant(array)` for one that it
    holds, `outputs(equation, inputs)` for those that an equation gives."""
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    env: dict[Any, T] = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> T:
        return constant(v.val) if isinstance(v, compat.Literal) else env[v]

    for eqn in jaxpr.eqns:
        given = outputs(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, given, strict=True))
    return [read(v) for v in jaxpr.outvars]


class _Inliner:
    """Gathers the steps. Mutable; it lives as long as one call of `flatten`."""

    def __init__(self) -> None:
        self.steps: list[Instruction] = []
        self.avals: dict[int, Any] = {}
        self._ids: Iterator[int] = itertools.count()

    def value(self, aval: Any) -> Value:
        """A new value."""
        id = next(self._ids)
        self.avals[id] = aval
        return Value(id)

    def add(self, run: Any, inputs: Sequence[Operand], avals: Sequence[Any]) -> list[Operand]:
        """One more step, and its outputs."""
        made = [self.value(aval) for aval in avals]
        self.steps.append(Instruction(run, tuple(inputs), tuple(x.id for x in made)))
        return list(made)

    def body(self, jaxpr: Any, operands: Sequence[Operand], place: Place) -> list[Operand]:
        """Adds the steps of a jaxpr on these operands."""

        def each(eqn: Any, inputs: list[Operand]) -> list[Operand]:
            inside = place.inside(eqn, compat.scope_name(eqn))
            outputs = self._opened(eqn, inputs, inside)
            if outputs is None:
                avals = [v.aval for v in eqn.outvars]
                outputs = self.add(Equation(eqn, inside), inputs, avals)
            return outputs

        return walk(jaxpr, operands, Constant, each)

    def _opened(self, eqn: Any, inputs: list[Operand], place: Place) -> list[Operand] | None:
        """The outputs of an equation that is more than one step, or none; None where it is one."""
        name, first = eqn.primitive.name, inputs[0] if inputs else None
        if name == "convert_element_type" and isinstance(first, Leaf):
            dtype = np.dtype(eqn.params["new_dtype"])
            if jnp.issubdtype(dtype, jnp.floating):
                return [first._replace(casts=(*first.casts, dtype))]
        if name == compat.JIT:
            asked = compat.jit_shardings(eqn.params)
            free = asked is not None and all(s is None for side in asked for s in side)
            return self.body(eqn.params["jaxpr"], inputs, place) if free else None
        if name == compat.REMAT:
            return self.body(eqn.params["jaxpr"], inputs, place)
        if name == compat.CUSTOM_JVP and has_products(eqn):
            return self.body(eqn.params["call_jaxpr"], inputs, place)
        if name == compat.SCAN:
            return self._layers(eqn, inputs, place)
        return None

    def _layers(self, eqn: Any, inputs: list[Operand], place: Place) -> list[Operand] | None:
        """A scan over stacked parameters, unrolled."""
        scan = compat.scan_parts(eqn.params)
        first = scan.consts + scan.carry
        if not any(isinstance(x, Leaf) for x in inputs[first:]):
            return None
        carry, given = inputs[scan.consts : first], []
        steps = range(scan.length)
        for i in reversed(steps) if scan.reverse else steps:
            seen = [self._layer(x, i) for x in inputs[first:]]
            out = self.body(scan.body, [*inputs[: scan.consts], *carry, *seen], place)
            carry = out[: scan.carry]
            given.append(out[scan.carry :])
        if scan.reverse:
            given.reverse()
        stacked = [
            self.add(Stack(), column, [v.aval])[0]
            for v, column in zip(
                eqn.outvars[scan.carry :], map(list, zip(*given, strict=True)), strict=True
            )
        ]
        return [*carry, *stacked]

    def _layer(self, x: Operand, i: int) -> Operand:
        if isinstance(x, Leaf):
            return x._replace(layer=(*x.layer, i))
        aval = x.value if isinstance(x, Constant) else self.avals[x.id]
        slice = jax.eval_shape(lambda a: a[0], jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return self.add(Take(i), [x], [slice])[0]
