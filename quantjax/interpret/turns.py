"""Which orthogonal matrices can be built into a model's parameters, so that it stays the same
function? One for every basis of `bases` that nothing fixes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax.interpret.bases import Basis, Known, Part, State
from quantjax.interpret.bases import parts as parts_of
from quantjax.interpret.bases_of import Step, bases_of, constant, fixed, plain
from quantjax.interpret.intercept import is_array
from quantjax.interpret.program import Constant, Equation, Leaf, Operand, Take, flatten
from quantjax.interpret.scaling import Key
from quantjax.paths import named_leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Turned:
    """An axis of a parameter, or of one layer of it, that is turned: blocks of `outer` x `size` x
    `inner` entries, along the middle."""

    path: str
    layer: tuple[int, ...]
    axis: int
    outer: int
    inner: int


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """A matrix R of `size` x `size`, any orthogonal one: all of `axes` are multiplied by it, as
    rows v -> v R, and the function stays. keeps_sum: R must leave the vector of ones as it is.
    normed: its axis is the stream between norms."""

    size: int
    axes: tuple[Turned, ...]
    keeps_sum: bool
    normed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Turns:
    """All free bases. reasons: why streams between norms are fixed, by size."""

    free: tuple[Turn, ...]
    reasons: tuple[str, ...]


def find_turns(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Turns:
    """The matrices that can be built into `params`, which hold values: a gain whose entries are all
    equal fixes nothing, others fix the stream that they scale.

    >>> apply = lambda p, x: jnp.tanh((x @ p["a"]) @ p["b"])
    >>> p = {"a": jnp.eye(3, 4), "b": jnp.eye(4, 2)}
    >>> (turn,) = find_turns(apply, p, jnp.ones((1, 3))).free
    >>> turn.size, [(t.path, t.axis) for t in turn.axes]
    (4, [('a', 1), ('b', 0)])
    """
    program = flatten(apply, params, *args, **kwargs)
    tree = {path: x for path, x in named_leaves(params)[0] if is_array(x)}
    leaves: dict[Key, Known] = {}
    values: dict[int, Known] = {}
    made: list[Basis] = []

    def new(n: int) -> Part:
        made.append(Basis(n))
        return Part(n, made[-1])

    def read(x: Operand) -> Known:
        if isinstance(x, Leaf):
            key = (x.path, x.layer)
            if key not in leaves:
                leaves[key] = _leaf(np.asarray(tree[x.path][x.layer]), new)
            return leaves[key]
        return constant(x.value) if isinstance(x, Constant) else values[x.id]

    for id in program.arguments:
        values[id] = plain(getattr(program.avals[id], "shape", ()))
    for step in program.instructions:
        states = [read(x) for x in step.inputs]
        if isinstance(step.run, Equation):
            same = len(step.inputs) == 2 and _same(step.inputs[0], step.inputs[1])
            outputs = bases_of(Step(step.run.eqn, step.run.place.module, same), states)
        elif isinstance(step.run, Take):
            x = states[0]
            outputs = [x and dataclasses.replace(x, axes=x.axes[1:])]
        else:
            for x in states:
                fixed(x, "it is stacked with other steps of a scan")
            outputs = [plain(program.avals[step.outputs[0]].shape)]
        values.update(zip(step.outputs, outputs, strict=True))
    for out in program.outputs:
        fixed(read(out), "it is the model's output")
    reasons = [b.reason for b in made if b.root() is b and b.normed and b.reason]
    return Turns(_free(leaves), tuple(dict.fromkeys(reasons)))


def _same(x: Operand, y: Operand) -> bool:
    return not isinstance(x, Constant) and x == y


def _leaf(value: np.ndarray, new: Callable[[int], Part]) -> Known:
    """Each axis of a parameter has a basis of its own; one along which entries are equal, as of a
    gain of ones, has none, and zeros take any."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return plain(value.shape)
    if not (value != 0).any():
        return None

    def axis(a: int) -> tuple[Part, ...]:
        if (value == value.take([0], a)).all():
            return (Part(value.shape[a], None, True),)
        return (new(value.shape[a]),)

    return State(tuple(map(axis, range(value.ndim))))


def _free(leaves: dict[Key, Known]) -> tuple[Turn, ...]:
    found: dict[Basis, list[Turned]] = {}
    for (path, layer), state in leaves.items():
        for axis, parts in enumerate(() if state is None else state.axes):
            resolved = parts_of(parts)
            lengths = [part.length for part in resolved]
            for i, part in enumerate(resolved):
                if part.basis is not None and part.basis.contracted:
                    outer, inner = int(np.prod(lengths[:i])), int(np.prod(lengths[i + 1 :]))
                    turned = Turned(path, layer, axis, outer, inner)
                    found.setdefault(part.basis, []).append(turned)
    return tuple(
        Turn(basis.size, tuple(axes), basis.keeps_sum, basis.normed)
        for basis, axes in found.items()
    )
