"""Where does a model normalize a product's output with stored statistics? By what it computes:
the product's output goes only through sums and products with values made of parameters alone.

(product(x, w) + bias - mean) * multiplier + shift, in whatever order and with whatever reshapes a
framework writes it; the multiplier holds a gain, the variance and a constant."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from quantjax.interpret.evaluate import Machine
from quantjax.interpret.param import Param
from quantjax.interpret.products import PRODUCTS
from quantjax.interpret.program import (
    Constant,
    Equation,
    Instruction,
    Leaf,
    Operand,
    Program,
    Value,
    read,
    run_instructions,
)
from quantjax.interpret.record import Record
from quantjax.interpret.scaling import Solved
from quantjax.interpret.unknowns import ONE, Scale

MOVES = frozenset(
    {"reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "convert_element_type",
     "copy", "copy_p", "sharding_constraint", "optimization_barrier"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """One normalization. weight: the parameter of the product before it. centered: the value that
    the mean is taken from, None if there is none. scale: of that value. multipliers: what the
    output is multiplied with, or divided by, and its scale there. mean, variance, gain: the
    parameters that are these, None where they can not be told."""

    weight: Leaf
    centered: int | None
    scale: Scale
    multipliers: tuple[tuple[Operand, bool, Scale], ...]
    mean: Leaf | None
    variance: Leaf | None
    gain: Leaf | None

    @property
    def name(self) -> str:
        """The path of one of its own parameters."""
        return next((x.name for x in (self.gain, self.mean, self.variance) if x), self.weight.name)


class Reader:
    """A flat program, to be asked what a value is made of and who reads it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.maker: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        self.leaves: dict[int, frozenset[Leaf] | None] = {id: None for id in program.arguments}
        for i, step in enumerate(program.instructions):
            made: set[Leaf] | None = set()
            for x in step.inputs:
                if isinstance(x, Value):
                    self.readers.setdefault(x.id, []).append(i)
                own = self.made_of(x)
                made = None if own is None or made is None else made | own
            for id in step.outputs:
                self.maker[id] = i
                self.leaves[id] = None if made is None else frozenset(made)
        for x in program.outputs:
            if isinstance(x, Value):
                self.readers.setdefault(x.id, []).append(-1)

    def made_of(self, x: Operand) -> frozenset[Leaf] | None:
        """The parameters that a value is made of; None if of an input of the model as well."""
        if isinstance(x, Leaf):
            return frozenset({x._replace(casts=())})
        return frozenset() if isinstance(x, Constant) else self.leaves[x.id]

    def evaluate(self, x: Operand, leaves: Callable[[Leaf], Any]) -> np.ndarray:
        """The value of what is made of parameters alone."""
        needed: list[Instruction] = []
        seen: set[int] = set()

        def visit(x: Operand) -> None:
            if isinstance(x, Value) and x.id not in seen:
                step = self.program.instructions[self.maker[x.id]]
                seen.update(step.outputs)
                for other in step.inputs:
                    visit(other)
                needed.append(step)

        visit(x)
        machine = Machine(Record())
        env: dict[int, Any] = {}
        run_instructions(machine, needed, leaves, env)
        value = read(machine, x, leaves, env)
        return np.asarray(value.array() if isinstance(value, Param) else value)


def find_norms(solved: Solved) -> tuple[Reader, list[Norm]]:
    """The normalizations of a model, from front to back."""
    reader = Reader(solved.program)
    norms = []
    for step in solved.program.instructions:
        if step.primitive in PRODUCTS and isinstance(step.run, Equation):
            norm = _norm_after(solved, reader, step)
            if norm is not None:
                norms.append(norm)
    return reader, norms


def _norm_after(solved: Solved, reader: Reader, step: Instruction) -> Norm | None:
    weights = [w for x in step.inputs[:2] if (w := reader.made_of(x))]
    if len(weights) != 1 or len(weights[0]) != 1 or len(step.outputs) != 1:
        return None
    (weight,) = weights[0]
    value, multipliers = step.outputs[0], []
    means: list[tuple[int, Leaf]] = []
    before = _scale(solved, value)
    while len(reader.readers.get(value, ())) == 1 and reader.readers[value][0] >= 0:
        after = solved.program.instructions[reader.readers[value][0]]
        name = after.primitive
        at = next(k for k, x in enumerate(after.inputs) if x == Value(value))
        if len(after.outputs) != 1:
            break
        if name in ("add", "add_any", "sub", "mul", "div") and len(after.inputs) == 2:
            other = after.inputs[1 - at]
            made = reader.made_of(other)
            if made is None or (at == 1 and name in ("sub", "div")):
                break
            if name in ("mul", "div"):
                scale = _scale(solved, value)
                if not _same(before, scale):  # after its gain
                    break
                multipliers.append((other, name == "div", scale))
            elif name == "sub" and not multipliers and len(made) == 1:
                means += [(value, leaf) for leaf in made]
        elif name not in MOVES:
            break
        value = after.outputs[0]
    made_of = [reader.made_of(x) or frozenset() for x, _, _ in multipliers]
    inside = functools.reduce(frozenset.union, made_of, frozenset[Leaf]())
    if not inside:
        return None
    gains = [x for x in inside if _meets(solved, x, before)]
    others = [x for x in inside if x not in gains]
    centered, mean = means[0] if len(means) == 1 else (None, None)
    return Norm(
        weight,
        centered,
        before if centered is None else _scale(solved, centered),
        tuple(multipliers),
        mean,
        others[0] if len(others) == 1 else None,
        gains[0] if len(gains) == 1 else None,
    )


def _scale(solved: Solved, value: int) -> Scale:
    (scale,) = solved.values[value] or (Scale(np.zeros(1, np.int64), np.zeros(1)),)
    return solved.unknowns.solved(scale)


def _same(a: Scale, b: Scale) -> bool:
    """Whether two values have the same unknowns, wherever they lie."""
    return set(np.unique(a.node)) == set(np.unique(b.node))


def _meets(solved: Solved, leaf: Leaf, scale: Scale) -> bool:
    """Whether the scale of a parameter holds these unknowns."""
    nodes = np.setdiff1d(scale.node, [ONE])
    return any(np.isin(part.node, nodes).any() for part in solved.parts[leaf.path, leaf.layer])


def multiplier(
    norm: Norm, reader: Reader, leaves: Callable[[Leaf], Any], node: np.ndarray
) -> np.ndarray | None:
    """What a norm multiplies with, for each of the unknowns `node`; None where positions of one
    unknown get different ones."""
    total = np.ones(len(node))
    for x, divides, scale in norm.multipliers:
        value = reader.evaluate(x, leaves).astype(np.float64)
        if value.ndim:
            first = value[tuple(slice(0, 1) if n == 1 else slice(None) for n in scale.shape)]
            if not (first == value).all():
                return None
            value = np.broadcast_to(first, scale.shape)
        else:
            value = np.full(scale.shape, value)
        own = np.full(len(node), np.nan)
        place = np.searchsorted(node, scale.node)
        inside = np.isin(scale.node, node)
        own[place[inside]] = value[inside]
        if (own[place[inside]] != value[inside]).any():
            return None
        total = total / own if divides else total * own
    return total


def layer_reader(tree: dict[str, Any]) -> Callable[[Leaf], Any]:
    """The layer of a parameter, from a tree by path."""
    return lambda x: jax.tree.map(lambda a: a[x.layer], tree[x.path]) if x.layer else tree[x.path]
