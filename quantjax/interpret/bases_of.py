"""What does an operation do to the bases of the values that it reads? One rule an operation.

What has no rule acts on channels one by one, or on who knows what, and fixes them."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax.interpret import jax_compat as compat
from quantjax.interpret.bases import Axis, Known, Part, State, cut_part, fix_all, join, parts
from quantjax.interpret.products import CONV, DOT, GATHER


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
        fix_all(axis, reason)


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
                part, rest = cut_part(part, n // have)
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
        whole = fix_all(parts(axes[a]), step.reason(f"{step.name!r} takes some of its channels"))
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
                fix_all(parts(x.axes[a]), step.reason("its channels are joined to others"))
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
            fix_all(parts(x.axes[a]), step.reason("rows are taken by number"))
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
            fix_all(parts(axis), step.reason("a product takes its channels apart"))
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
        fix_all(parts(kernel.axes[a]), step.reason("a convolution sums over it"))
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
