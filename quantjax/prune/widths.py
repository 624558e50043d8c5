"""Which positions of which arrays are one channel, that can be cut out of a model only together?
Found on its flat program, for every parameter at once: an interpretation of it (`abstract`).

Every axis of a value has a label at each position: positions with one label are one channel. What
an operation sums, compares or multiplies entry by entry has one label on both sides, and so have
the two sides of a product's sum, so labels go through norms, biases, residual sums and heads. A
label is fixed where a channel can not go: at the model's inputs and outputs, where an operation
goes over the channels (a mean over them counts them), and where none is known."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from quantjax.interpret import moves
from quantjax.interpret.abstract import Shape, Step
from quantjax.interpret.products import CONV, DOT, GATHER
from quantjax.interpret.program import Leaf
from quantjax.prune.ties import FIXED, Labels, Ties


@dataclasses.dataclass(frozen=True, eq=False)
class Axes:
    """The labels of a value's axes. weight: it is made of parameters and constants alone."""

    labels: tuple[Labels, ...]
    weight: bool = False


def fixed(n: int) -> np.ndarray:
    """Labels of an axis that keeps its length."""
    return np.broadcast_to(np.int64(FIXED), (n,))


_ENTRIES = frozenset(
    {"neg", "sign", "floor", "ceil", "round", "is_finite", "exp", "exp2", "log", "log1p",
     "expm1", "tanh", "logistic", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh",
     "asinh", "acosh", "atanh", "erf", "erfc", "erf_inv", "lgamma", "digamma", "square",
     "sqrt", "rsqrt", "cbrt", "abs", "integer_pow", "convert_element_type",
     "reduce_precision", "copy", "copy_p", "sharding_constraint", "stop_gradient",
     "optimization_barrier", "not", "population_count", "real", "imag", "conj", "add", "sub",
     "mul", "div", "rem", "max", "min", "pow", "atan2", "nextafter", "add_any", "and", "or",
     "xor", "eq", "ne", "lt", "le", "gt", "ge", "select_n", "clamp", "shift_left",
     "shift_right_logical", "shift_right_arithmetic"}
)  # fmt: skip
_REDUCE = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
     "argmax", "argmin"}
)  # fmt: skip
_OVER = frozenset(
    {"reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window", "cumsum",
     "cummax", "cummin", "cumprod", "cumlogsumexp", "sort", "rev"}
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Widths:
    """The domain. shapes: of every parameter, by path."""

    ties: Ties
    shapes: dict[str, Shape]

    def leaf(self, leaf: Leaf) -> Axes:
        """A label for every position of every axis."""
        shape = self.shapes[leaf.path][len(leaf.layer) :]
        return Axes(tuple(self.ties.fresh(n) for n in shape), weight=True)

    def constant(self, value: np.ndarray) -> Axes:
        """Fixed along the axes that its numbers vary along."""
        labels: list[Labels] = []
        for axis, n in enumerate(value.shape):
            same = n == 0 or bool((value == value.take([0], axis)).all())
            labels.append(None if same else self._new(n, "it meets numbers of the model's own"))
        return Axes(tuple(labels), weight=True)

    def plain(self, shape: Shape, reason: str) -> Axes:
        """All axes stay."""
        return Axes(tuple(self._new(n, reason) for n in shape))

    def taken(self, state: Axes, i: int) -> Axes:
        """An entry of the first axis."""
        self.ties.fix(state.labels[0], "a scan takes it apart")
        return Axes(state.labels[1:], state.weight)

    def keep(self, state: Axes, reason: str) -> None:
        """All its axes stay."""
        for labels in state.labels:
            self.ties.fix(labels, reason)

    def outputs(self, step: Step, states: Sequence[Axes]) -> list[Axes]:
        """By the rule of the operation; without one, everything that meets in it stays."""
        made = self._made(step, states)
        if made is None:
            for state in states:
                self.keep(state, step.reason(f"it goes through {step.name!r}"))
            why = step.reason(f"it comes from {step.name!r}")
            return [self.plain(shape, why) for shape in step.out_shapes]
        weight = all(state.weight for state in states)
        return [Axes(tuple(labels), weight) for labels in made]

    def _new(self, n: int, why: str) -> np.ndarray:
        """Labels of an axis that stays for this reason."""
        if not why:
            return fixed(n)
        label = self.ties.fresh(1)
        self.ties.fix(label, why)
        return np.broadcast_to(label, (n,))

    def _made(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]] | None:
        name = step.name
        if name in _ENTRIES:
            return [self._entries(step, states)] * len(step.out_shapes)
        if name in _REDUCE:
            self._over(step, states[0], step.params["axes"])
            gone = step.params["axes"]
            return [[x for a, x in enumerate(states[0].labels) if a not in gone]]
        if name in _OVER:
            self._over(step, states[0], _axes(step))
            return [states[0].labels] if len(step.out_shapes) == 1 and len(states) == 1 else None
        rule = _RULES.get(name)
        return None if rule is None else rule(self, step, states)

    def _over(self, step: Step, state: Axes, axes: Sequence[int]) -> None:
        for a in axes:
            why = step.reason(f"{step.name!r} goes over the channels, and counts them")
            self.ties.fix(state.labels[a], why)

    def _entries(self, step: Step, states: Sequence[Axes]) -> list[Labels]:
        made: list[Labels] = [None] * len(step.out_shapes[0])
        for state in states:
            if state.labels:  # a scalar has none
                why = step.reason(f"it meets in {step.name!r} what stays")
                made = [self.ties.tie(a, b, why) for a, b in zip(made, state.labels, strict=True)]
        return made

    def _iota(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        shape, axis = step.out_shapes[0], step.params["dimension"]
        own = self._new(shape[axis], step.reason("it meets positions that are counted"))
        return [[own if a == axis else None for a in range(len(shape))]]

    def _transpose(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        return [[states[0].labels[a] for a in step.params["permutation"]]]

    def _squeeze(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        gone = step.params["dimensions"]
        for a in gone:
            self.ties.fix(states[0].labels[a], step.reason("it is the one channel of its axis"))
        return [[x for a, x in enumerate(states[0].labels) if a not in gone]]

    def _broadcast_in_dim(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        made: list[Labels] = [None] * len(step.out_shapes[0])
        for a, dim in enumerate(step.params["broadcast_dimensions"]):
            if step.shapes[0][a] == step.out_shapes[0][dim]:
                made[dim] = states[0].labels[a]
            else:
                self.ties.fix(states[0].labels[a], step.reason("it is one for a whole axis"))
        return [made]

    def _slice(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        p = step.params
        steps = p["strides"] or (1,) * len(step.shapes[0])
        cuts = map(slice, p["start_indices"], p["limit_indices"], steps)
        return [[_cut(x, cut) for x, cut in zip(states[0].labels, cuts, strict=True)]]

    def _split(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        axis, ends = step.params["axis"], np.cumsum([0, *step.params["sizes"]]).tolist()
        return [
            [_cut(x, slice(*cut)) if a == axis else x for a, x in enumerate(states[0].labels)]
            for cut in zip(ends[:-1], ends[1:], strict=True)
        ]

    def _concatenate(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        axis, made = step.params["dimension"], self._entries_but(step, states)
        parts = [
            fixed(shape[axis]) if state.labels[axis] is None else state.labels[axis]
            for state, shape in zip(states, step.shapes, strict=True)
        ]
        made[axis] = np.concatenate([np.asarray(x) for x in parts])
        return [made]

    def _entries_but(self, step: Step, states: Sequence[Axes]) -> list[Labels]:
        """The axes that a concatenation does not go along."""
        axis, why = step.params["dimension"], step.reason("it is joined with what stays")
        made: list[Labels] = [None] * len(step.out_shapes[0])
        for state in states:
            for a, x in enumerate(state.labels):
                made[a] = None if a == axis else self.ties.tie(made[a], x, why)
        return made

    def _pad(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        made: list[Labels] = []
        for x, config, n in zip(
            states[0].labels, step.params["padding_config"], step.out_shapes[0], strict=True
        ):
            if config == (0, 0, 0):
                made.append(x)
                continue
            # The model says how many are added, whatever is left of the others.
            why = step.reason("a fixed number of channels is padded to it")
            self.ties.fix(x, why)
            made.append(self._new(n, why))
        return [made]

    def _reshape(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]] | None:
        old, new = step.shapes[0], step.out_shapes[0]
        made: list[Labels] = [None] * len(new)
        if 0 in old:
            return None
        for before, after in moves.groups(old, new):
            labels = [states[0].labels[a] for a in before]
            if all(x is None for x in labels):
                continue
            flat = self._merged(step, labels, [old[a] for a in before])
            for a, x in zip(after, self._divided(flat, [new[a] for a in after]), strict=True):
                made[a] = x
        return [made]

    def _merged(self, step: Step, labels: list[Labels], shape: list[int]) -> np.ndarray:
        """Of several axes one, with the labels of the one whose channels can go."""
        free = [a for a, x in enumerate(labels) if x is not None and self.ties.roots(x).any()]
        if len(free) > 1:
            for a in free[:-1]:
                why = step.reason("it is joined with another axis of channels")
                self.ties.fix(labels[a], why)
        axis = free[-1] if free else next(a for a, x in enumerate(labels) if x is not None)
        whole = np.asarray(labels[axis]).reshape(
            [n if a == axis else 1 for a, n in enumerate(shape)]
        )
        return np.broadcast_to(whole, shape).reshape(-1)

    def _divided(self, flat: np.ndarray, shape: list[int]) -> list[Labels]:
        """Of one axis several. Neighbours become one channel, as in heads and groups of norms, but
        not what is repeated as a whole, as the channels of many pixels are."""
        x = flat.reshape(shape)
        roots = self.ties.roots(x)
        varies = [a for a in range(len(shape)) if (roots != roots.take([0], a)).any()]
        made: list[Labels] = [fixed(n) for n in shape]
        if not varies:  # one channel only, which must stay
            self.ties.fix(flat, "it is the one channel of its axis")
            return made
        if len(varies) > 1:
            self.ties.all_one(np.moveaxis(x, varies[0], 0).reshape(shape[varies[0]], -1))
        made[varies[0]] = x[tuple(slice(None) if a == varies[0] else 0 for a in range(x.ndim))]
        return made

    def _dot(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        summed, shared = step.params["dimension_numbers"]
        active = not any(state.weight for state in states)
        for a, b in zip(*summed, strict=True):
            self._summed(step, states[0].labels[a], states[1].labels[b], active)
        made = [
            self.ties.tie(
                states[0].labels[a], states[1].labels[b], step.reason("it meets what stays")
            )
            for a, b in zip(*shared, strict=True)
        ]
        if active:
            self.ties.heads.update(
                x for labels in made if labels is not None for x in labels.tolist()
            )
        for i, state in enumerate(states):
            for a, x in enumerate(state.labels):
                if a not in (*shared[i], *summed[i]):
                    if active and shared[0]:
                        self.ties.fix(
                            x, step.reason("it is the width of what activations multiply")
                        )
                    made.append(x)
        return [made]

    def _summed(self, step: Step, a: Labels, b: Labels, active: bool = False) -> None:
        """The two sides of what a product sums over."""
        if active:
            why = step.reason("two activations are multiplied over it, and a factor may count it")
        elif a is None or b is None:
            why = step.reason("a product sums it with what is the same for all")
        else:
            self.ties.tie(a, b, step.reason("a product sums it with what stays"))
            return
        self.ties.fix(a, why)
        self.ties.fix(b, why)

    def _conv(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]] | None:
        p = step.params
        if p["batch_group_count"] > 1:
            return None
        numbers, parts = p["dimension_numbers"], p["feature_group_count"]
        batch, feature, *space = (states[0].labels[a] for a in numbers.lhs_spec)
        out, into, *window = (states[1].labels[a] for a in numbers.rhs_spec)
        for x in (*space, *window):
            self.ties.fix(x, step.reason("a window goes over it"))
        if parts == 1:
            self._summed(step, feature, into)
        elif feature is None or out is None:
            return None
        else:  # a group goes as a whole
            self.ties.fix(into, step.reason("it is inside a group of a convolution"))
            rows = [np.asarray(x).reshape(parts, -1) for x in (feature, out)]
            self.ties.all_one(np.concatenate(rows, 1))
        shape = step.out_shapes[0]
        made: list[Labels] = [fixed(n) for n in shape]
        made[numbers.out_spec[0]], made[numbers.out_spec[1]] = batch, out
        return [made]

    def _gather(self, step: Step, states: Sequence[Axes]) -> list[Sequence[Labels]]:
        dims, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
        gone = (*dims.collapsed_slice_dims, *getattr(dims, "operand_batching_dims", ()))
        kept = []
        for a, x in enumerate(states[0].labels):
            if a in gone or sizes[a] != step.shapes[0][a]:
                self.ties.fix(x, step.reason("entries of it are looked up"))
            if a not in gone:
                kept.append(x if sizes[a] == step.shapes[0][a] else fixed(sizes[a]))
        self.keep(states[1], "it is an index")
        made: list[Labels] = [fixed(n) for n in step.out_shapes[0]]
        for a, x in zip(dims.offset_dims, kept, strict=True):
            made[a] = x
        return [made]


def _cut(x: Labels, part: slice) -> Labels:
    return x if x is None else x[part]


def _axes(step: Step) -> tuple[int, ...]:
    """The axes that an operation goes over."""
    p = step.params
    if "window_dimensions" in p:
        return tuple(a for a, n in enumerate(p["window_dimensions"]) if n > 1)
    axes = next(p[name] for name in ("axis", "dimension", "dimensions") if name in p)
    return axes if isinstance(axes, tuple) else (axes,)


_RULES = {
    "iota": Widths._iota,
    "transpose": Widths._transpose,
    "squeeze": Widths._squeeze,
    "broadcast_in_dim": Widths._broadcast_in_dim,
    "reshape": Widths._reshape,
    "slice": Widths._slice,
    "split": Widths._split,
    "concatenate": Widths._concatenate,
    "pad": Widths._pad,
    DOT: Widths._dot,
    CONV: Widths._conv,
    GATHER: Widths._gather,
}
