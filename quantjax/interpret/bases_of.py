"""Which bases can a value have, if parameters may be turned? Free ones, that operations make one,
hand on or fix: an interpretation of the program (`abstract`).

What has no rule acts on channels one by one, or on who knows what, and fixes them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax.interpret.abstract import Shape, Step
from quantjax.interpret.bases import (
    Axis,
    Basis,
    Known,
    Part,
    State,
    fix,
    fix_all,
    join,
    parts,
    plain,
)
from quantjax.interpret.basis_moves import RULES, Rule
from quantjax.interpret.products import CONV, DOT
from quantjax.interpret.program import Leaf

# Where all inputs are equal along an axis, so is what these give.
_ELEMENTWISE = frozenset(
    {"sqrt", "rsqrt", "exp", "exp2", "log", "log1p", "tanh", "logistic", "erf", "abs", "max", "min",
     "pow", "integer_pow", "square", "sign", "sin", "cos", "lt", "le", "gt", "ge", "eq", "ne",
     "and", "or", "not", "clamp", "is_finite", "convert_element_type", "mul", "div"}
)  # fmt: skip
# What squares of channels pass, on the way to their sum.
_SQUARES = frozenset(
    {"mul", "div", "convert_element_type", "reduce_sum", "transpose", "reshape", "broadcast_in_dim",
     "copy", "copy_p", "optimization_barrier"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Bases:
    """The bases of values. tree: the parameters, by path. made: all bases there are; a list that
    grows."""

    tree: dict[str, Any]
    made: list[Basis]

    def leaf(self, leaf: Leaf) -> Known:
        """Each axis has a basis of its own; one along which entries are equal, as of a gain of
        ones, has none, and zeros take any."""
        value = np.asarray(self.tree[leaf.path][leaf.layer])
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return plain(value.shape)
        if not (value != 0).any():
            return None
        return State(tuple((self._part(value, a),) for a in range(value.ndim)))

    def _part(self, value: np.ndarray, axis: int) -> Part:
        n = value.shape[axis]
        if (value == value.take([0], axis)).all():
            return Part(n, None, True)
        self.made.append(Basis(n))
        return Part(n, self.made[-1])

    def constant(self, value: np.ndarray) -> Known:
        """It has no basis that could be turned; zeros take any."""
        if not (value != 0).any():
            return None
        return plain(value.shape, equal=bool((value == value.flat[0]).all()))

    def plain(self, shape: Shape, reason: str) -> Known:
        """It has no basis that could be turned."""
        return plain(shape)

    def taken(self, state: Known, i: int) -> Known:
        """The bases of entry i of the first axis."""
        return state and dataclasses.replace(state, axes=state.axes[1:])

    def keep(self, state: Known, reason: str) -> None:
        """All its bases are fixed."""
        fix(state, reason)

    def outputs(self, step: Step, states: Sequence[Known]) -> list[Known]:
        """By the rule of the operation; without one, its channels go one by one through it, or
        through who knows what. Squares pass only what leads to their sum."""
        rule = _RULES.get(step.name)
        if step.name not in _SQUARES and any(x is not None and x.squares for x in states):
            rule = None
        made = None if rule is None else rule(step, states)
        if made is not None:
            return made
        for x in states:
            fix(x, step.reason(f"its channels go one by one through {step.name!r}"))
        if step.name in _ELEMENTWISE and len(step.out_shapes) == 1:
            return [_axiswise(step, states, "scale", "")]
        return [plain(shape) for shape in step.out_shapes]


def _axiswise(step: Step, states: Sequence[Known], kind: str, reason: str) -> State:
    """Values joined axis by axis; zeros, a scalar and one of length one there are equal along
    it."""
    held = [x for x in states if x is not None]
    axes = []
    for a, n in enumerate(step.out_shapes[0]):
        own = [x.axes[a] if len(x.axes) else () for x in held]
        whole = (Part(n, None, True),)
        met = [axis if parts(axis) else whole for axis in own]
        axes.append(join(met or [whole], kind, reason))
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


def _scale(step: Step, states: Sequence[Known]) -> list[Known] | None:
    if any(x is None for x in states):
        return [None] if step.name == "mul" or states[0] is None else None
    if step.same and step.name == "mul":
        return _square(step, states[:1])
    x, y = (state for state in states if state is not None)
    if step.name == "mul" and y.squares and not x.squares:
        x, y = y, x
    if step.name == "div" or y.squares:
        fix(y, step.reason("its channels divide, one by one"))
    what = step.reason("its channels are multiplied one by one, as by a gain")
    return [dataclasses.replace(_axiswise(step, states, "scale", what), squares=x.squares)]


def _square(step: Step, states: Sequence[Known]) -> list[Known] | None:
    x = states[0]
    if x is None or x.squares or step.params.get("y", 2) != 2:
        return None
    turned = any(part.basis for axis in x.axes for part in parts(axis))
    return [dataclasses.replace(x, squares=turned)] if turned else None


def _same(step: Step, states: Sequence[Known]) -> list[Known]:
    return list(states)


def _convert(step: Step, states: Sequence[Known]) -> list[Known] | None:
    whole = np.dtype(step.eqn.outvars[0].aval.dtype).kind in "biu"
    return None if whole else list(states)


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


def _conv(step: Step, states: Sequence[Known]) -> list[Known] | None:
    """Its output channels can be turned; its inputs are not looked at here."""
    image, kernel = states
    numbers, p = step.params["dimension_numbers"], step.params
    if kernel is None or p["feature_group_count"] * p["batch_group_count"] > 1:
        return None
    fix(image, step.reason("a convolution reads it"))
    out, *rest = numbers.rhs_spec
    for a in rest:
        fix_all(parts(kernel.axes[a]), step.reason("a convolution sums over it"))
    axes: list[Axis] = [(Part(n),) for n in step.out_shapes[0]]
    axes[numbers.out_spec[1]] = kernel.axes[out]
    return [State(tuple(axes))]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "add_any"), _sum),
    "select_n": _select,
    **dict.fromkeys(("mul", "div"), _scale),
    **dict.fromkeys(("square", "integer_pow"), _square),
    **dict.fromkeys(
        ("neg", "copy", "copy_p", "reduce_precision", "sharding_constraint",
         "optimization_barrier"),
        _same,
    ),
    "convert_element_type": _convert,
    **RULES,
    "reduce_sum": _reduce_sum,
    DOT: _dot,
    CONV: _conv,
}  # fmt: skip
