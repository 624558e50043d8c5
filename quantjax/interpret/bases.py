"""Along which axes can an orthogonal matrix turn a model's values, and what must turn with them?
Found on its flat program.

Every axis of every parameter has a basis of its own, free at first. Sums make two bases one, a
product that sums over an axis asks for one basis on both sides (x R R^T w = x w), and a sum of
squares does not see it, so that a residual stream between norms without gains stays free. Whatever
acts on channels one by one fixes the basis, with a reason. An axis that a model splits, as heads
times features, keeps a basis on its last part."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax.interpret import jax_compat as compat
from quantjax.interpret.products import CONV, DOT, GATHER


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
            _fix(x.split, reason)
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


def _fix(axis: Iterable[Part], reason: str) -> Axis:
    """The axis with every basis on it fixed."""
    for part in axis:
        if part.basis is not None:
            part.basis.fix(reason)
    return tuple(Part(p.length, None, p.equal and p.basis is None) for p in axis)


def _cut(part: Part, length: int) -> tuple[Part, Part]:
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
                first[i], rest = _cut(part, length)
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
            _fix(axis, reason)
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


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One equation while it is looked at. same: its two operands are one value."""

    eqn: Any
    module: str
    same: bool = False

    @property
    def name(self) -> str:
        """Of the operation."""
        return self.eqn.primitive.name

    @property
    def params(self) -> Any:
        """Of the operation."""
        return self.eqn.params

    def shape(self, i: int) -> tuple[int, ...]:
        """Of output i."""
        return tuple(map(int, getattr(self.eqn.outvars[i].aval, "shape", ())))

    def reason(self, what: str) -> str:
        """What happens, and where."""
        return f"{what} ({self.module})" if self.module else what


def plain(shape: Sequence[int], *, equal: bool = False) -> State:
    """A value without bases."""
    return State(tuple((Part(n, None, equal),) for n in shape))


def bases_of(step: Step, states: Sequence[Known]) -> list[Known]:
    """The bases of an equation's outputs by those of its inputs."""
    rule = _RULES.get(step.name)
    if rule is None:
        return _fixed(step, states)
    squares = [x for x in states if x is not None and x.squares]
    if squares and step.name not in _SQUARES:
        return _fixed(step, states)
    return rule(step, states)


def body(jaxpr: Any, states: Sequence[Known], module: str) -> list[Known]:
    """The bases of a jaxpr's outputs."""
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    env: dict[Any, Known] = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, states, strict=True))

    def read(v: Any) -> Known:
        return constant(v.val) if isinstance(v, compat.Literal) else env[v]

    for eqn in jaxpr.eqns:
        same = len(eqn.invars) == 2 and eqn.invars[0] is eqn.invars[1]
        outputs = bases_of(Step(eqn, module, same), [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def constant(value: Any) -> Known:
    """An array that the model holds itself."""
    if hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.number):
        return plain(np.shape(value))  # keys, masks
    array = np.asarray(value)
    if not (array != 0).any():
        return None
    return plain(array.shape, equal=bool((array == array.flat[0]).all()))


def fixed(state: Known, reason: str) -> None:
    """Fixes every basis of a value."""
    for axis in () if state is None else state.axes:
        _fix(axis, reason)


def _fixed(step: Step, states: Sequence[Known]) -> list[Known]:
    """An operation on entries one by one, or on who knows what."""
    for x in states:
        fixed(x, step.reason(f"its channels go one by one through {step.name!r}"))
    if step.name in _ELEMENTWISE and len(step.eqn.outvars) == 1:
        return [_axiswise(step, states, "scale", "")]
    return [plain(step.shape(i)) for i in range(len(step.eqn.outvars))]


def _lengths(x: State) -> tuple[int, ...]:
    return tuple(int(np.prod([part.length for part in axis])) for axis in x.axes)


def _axiswise(step: Step, states: Sequence[Known], kind: str, reason: str) -> State:
    """Values joined axis by axis; one of length one there, or a scalar, is equal along it."""
    held = [x for x in states if x is not None]
    axes = []
    for a, n in enumerate(step.shape(0)):
        own = [x.axes[a] if len(x.axes) else () for x in held]
        whole = (Part(n, None, True),)
        axes.append(join([axis if parts(axis) else whole for axis in own], kind, reason))
    return State(tuple(axes))


def _sum(step: Step, states: Sequence[Known]) -> list[Known]:
    if all(x is None for x in states):
        return [None]
    what = step.reason("it is added to what has a basis of its own")
    return [_axiswise(step, states, "sum", what)]


def _select(step: Step, states: Sequence[Known]) -> list[Known]:
    (out,) = _sum(step, states[1:])
    if out is None:
        return [None]
    return [_axiswise(step, [out, states[0]], "scale", step.reason("channels are chosen"))]


def _scale(step: Step, states: Sequence[Known]) -> list[Known]:
    if any(x is None for x in states):
        return [None] if step.name == "mul" or states[0] is None else _fixed(step, states)
    if step.same and step.name == "mul":
        return _square(step, states[:1])
    x, y = (state for state in states if state is not None)
    if step.name == "mul" and y.squares and not x.squares:
        x, y = y, x
    if step.name == "div" or y.squares:
        fixed(y, step.reason("its channels divide, one by one"))
    what = step.reason("its channels are multiplied one by one, as by a gain")
    return [dataclasses.replace(_axiswise(step, states, "scale", what), squares=x.squares)]


def _square(step: Step, states: Sequence[Known]) -> list[Known]:
    x = states[0]
    if x is None or x.squares or step.params.get("y", 2) != 2:
        return _fixed(step, states)
    turned = any(part.basis for axis in x.axes for part in parts(axis))
    return [dataclasses.replace(x, squares=turned)] if turned else _fixed(step, states)


def _same(step: Step, states: Sequence[Known]) -> list[Known]:
    return [states[0]]


def _convert(step: Step, states: Sequence[Known]) -> list[Known]:
    whole = np.dtype(step.eqn.outvars[0].aval.dtype).kind in "biu"
    return _fixed(step, states) if whole else [states[0]]


def _reduce_sum(step: Step, states: Sequence[Known]) -> list[Known]:
    x = states[0]
    if x is None:
        return [None]
    gone = step.params["axes"]
    for a, axis in enumerate(x.axes):
        for part in parts(axis):
            if part.basis is None:
                continue
            if x.squares and a in gone:
                part.basis.normed = True
            elif x.squares:
                part.basis.fix(step.reason("squares of its channels are summed over other axes"))
            elif a in gone:
                part.basis.keeps_sum = True
    return [State(tuple(axis for a, axis in enumerate(x.axes) if a not in gone))]


def _transpose(step: Step, states: Sequence[Known]) -> list[Known]:
    x = states[0]
    if x is None:
        return [None]
    return [dataclasses.replace(x, axes=tuple(x.axes[a] for a in step.params["permutation"]))]


def _reshape(step: Step, states: Sequence[Known]) -> list[Known]:
    x, shape = states[0], step.shape(0)
    if x is None:
        return [None]
    left = [part for axis in x.axes for part in parts(axis)]
    axes = []
    for n in shape:
        axis, have = [], 1
        while have < n and left:
            part = left.pop(0)
            if have * part.length > n:
                if n % have or part.length % (n // have):
                    return _fixed(step, states)
                part, rest = _cut(part, n // have)
                left.insert(0, rest)
            axis.append(part)
            have *= part.length
        if have != n:
            return _fixed(step, states)
        axes.append(tuple(axis))
    return [dataclasses.replace(x, axes=tuple(axes))]


def _broadcast(step: Step, states: Sequence[Known]) -> list[Known]:
    x = states[0]
    if x is None:
        return [None]
    shape, lengths = step.shape(0), _lengths(x)
    axes: list[Axis] = [(Part(n, None, True),) for n in shape]
    for a, dim in enumerate(step.params["broadcast_dimensions"]):
        if lengths[a] == shape[dim]:
            axes[dim] = x.axes[a]
    return [dataclasses.replace(x, axes=tuple(axes))]


def _kept(step: Step, x: State, cut: Iterable[int], shape: tuple[int, ...]) -> State:
    """x with some of its axes cut to other lengths."""
    axes = list(x.axes)
    for a in cut:
        whole = _fix(parts(axes[a]), step.reason(f"{step.name!r} takes some of its channels"))
        axes[a] = (Part(shape[a], None, all(part.equal for part in whole)),)
    return State(tuple(axes))


def _sliced(step: Step, states: Sequence[Known]) -> list[Known]:
    """Slices, also at places that are not known, pads with zeros, splits."""
    out: list[Known] = []
    x = states[0]
    padded = step.name == "pad" and states[1] is not None
    for i in range(len(step.eqn.outvars)):
        if x is None:
            out.append(plain(step.shape(i)) if padded else None)
            continue
        lengths, shape = _lengths(x), step.shape(i)
        cut = [a for a, n in enumerate(lengths) if n != shape[a]]
        if step.name == "pad":
            cut = [a for a, c in enumerate(step.params["padding_config"]) if any(c)]
            if padded:
                fixed(x, step.reason("it is padded"))
        made = _kept(step, x, cut, shape)
        if step.name == "pad":
            made = State(tuple((Part(shape[a]),) if a in cut else axis
                               for a, axis in enumerate(made.axes)))  # fmt: skip
        out.append(made)
    return out


def _reverse(step: Step, states: Sequence[Known]) -> list[Known]:
    x = states[0]
    return [x and _kept(step, x, step.params["dimensions"], step.shape(0))]


def _concatenate(step: Step, states: Sequence[Known]) -> list[Known]:
    if all(x is None for x in states):
        return [None]
    shape, dim = step.shape(0), step.params["dimension"]
    held = [x for x in states if x is not None]
    what = step.reason("it is joined to what has a basis of its own")
    axes: list[Axis] = []
    for a, n in enumerate(shape):
        if a == dim:
            for x in held:
                _fix(parts(x.axes[a]), step.reason("its channels are joined to others"))
            axes.append((Part(n),))
        else:
            axes.append(join([x.axes[a] for x in held], "sum", what))
    return [State(tuple(axes))]


def _gather(step: Step, states: Sequence[Known]) -> list[Known]:
    x, dims, shape = states[0], step.params["dimension_numbers"], step.shape(0)
    if x is None:
        return [None]
    sizes, lengths = step.params["slice_sizes"], _lengths(x)
    gone = (*dims.collapsed_slice_dims, *getattr(dims, "operand_batching_dims", ()))
    axes: list[Axis] = [(Part(n),) for n in shape]
    kept = [a for a in range(len(lengths)) if a not in gone]
    for a in range(len(lengths)):
        if a in gone or sizes[a] != lengths[a]:
            _fix(parts(x.axes[a]), step.reason("rows are taken by number"))
    for dim, a in zip(dims.offset_dims, kept, strict=True):
        if sizes[a] == lengths[a]:
            axes[dim] = x.axes[a]
    return [State(tuple(axes))]


def _dot(step: Step, states: Sequence[Known]) -> list[Known]:
    if any(x is None for x in states):
        return [None]
    x, y = (state for state in states if state is not None)
    (x_sum, y_sum), (x_batch, y_batch) = step.params["dimension_numbers"]
    what = step.reason("a product sums it with what has a basis of its own")
    for a, b in zip(x_sum, y_sum, strict=True):
        join([x.axes[a], y.axes[b]], "dot", what)
    axes = []
    for a, b in zip(x_batch, y_batch, strict=True):
        for axis in (x.axes[a], y.axes[b]):
            _fix(parts(axis), step.reason("a product takes its channels apart"))
        axes.append(join([x.axes[a], y.axes[b]], "scale", ""))
    for state, used in ((x, (*x_sum, *x_batch)), (y, (*y_sum, *y_batch))):
        axes += [axis for a, axis in enumerate(state.axes) if a not in used]
    # Entries may differ along an axis along which those of one side are equal: not known here.
    return [State(tuple(axes))]


def _conv(step: Step, states: Sequence[Known]) -> list[Known]:
    """Its output channels can be turned; its inputs are not looked at here."""
    image, kernel = states
    numbers, p = step.params["dimension_numbers"], step.params
    if kernel is None or p["feature_group_count"] * p["batch_group_count"] > 1:
        return _fixed(step, states)
    fixed(image, step.reason("a convolution reads it"))
    out, *rest = numbers.rhs_spec
    for a in rest:
        _fix(parts(kernel.axes[a]), step.reason("a convolution sums over it"))
    axes: list[Axis] = [(Part(n),) for n in step.shape(0)]
    axes[numbers.out_spec[1]] = kernel.axes[out]
    return [State(tuple(axes))]


def _call(step: Step, states: Sequence[Known]) -> list[Known]:
    inner = list(compat.inner_jaxprs(step.eqn))
    if step.name in (compat.CUSTOM_VJP, compat.CUSTOM_JVP):
        inner = [step.params["call_jaxpr"]] if "call_jaxpr" in step.params else []
    return body(inner[0], states, step.module) if len(inner) == 1 else _fixed(step, states)


Rule = Callable[[Step, Sequence[Known]], list[Known]]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "add_any"), _sum),
    "select_n": _select,
    **dict.fromkeys(("mul", "div"), _scale),
    **dict.fromkeys(("square", "integer_pow"), _square),
    **dict.fromkeys(("neg", "copy", "copy_p", "reduce_precision", "sharding_constraint"), _same),
    "optimization_barrier": lambda step, states: list(states),
    "convert_element_type": _convert,
    "reduce_sum": _reduce_sum,
    "transpose": _transpose,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("slice", "dynamic_slice", "split", "pad"), _sliced),
    "rev": _reverse,
    "concatenate": _concatenate,
    GATHER: _gather,
    DOT: _dot,
    CONV: _conv,
    **dict.fromkeys(
        (compat.JIT, compat.REMAT, compat.CUSTOM_JVP, compat.CUSTOM_VJP, "closed_call"), _call
    ),
}
# Where all inputs are equal along an axis, so is what these give.
_ELEMENTWISE = frozenset(
    {"sqrt", "rsqrt", "exp", "exp2", "log", "log1p", "tanh", "logistic", "erf", "abs", "max", "min",
     "pow", "integer_pow", "square", "sign", "sin", "cos", "lt", "le", "gt", "ge", "eq", "ne",
     "and", "or", "not", "clamp", "is_finite", "convert_element_type", "mul", "div"}
)  # fmt: skip
# What squares of channels pass, on the way to their sum.
_SQUARES = frozenset(
    {"mul", "div", "convert_element_type", "reduce_sum", "transpose", "reshape", "broadcast_in_dim",
     "copy", "copy_p", "optimization_barrier", compat.JIT, compat.REMAT, compat.CUSTOM_JVP,
     compat.CUSTOM_VJP, "closed_call"}
)  # fmt: skip
