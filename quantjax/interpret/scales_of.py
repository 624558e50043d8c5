"""Which scales can move through an operation, and which does it fix? One rule an operation.

A scale passes what commutes with it: sums of values that have the same one, products with values
that keep theirs, relu and pools if it is positive, powers as a power. A product of two values sums
over an axis only if the scales of the two sides cancel there. Everything else fixes its inputs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax.interpret import jax_compat as compat
from quantjax.interpret import moves
from quantjax.interpret.products import CONV, DOT, GATHER, RAGGED_DOT
from quantjax.interpret.unknowns import Scale, Unknowns, ones

# The scales of a value: factors, more than one for the weights of a product; None for zeros and
# infinities, which have any scale.
State = tuple[Scale, ...] | None
Rule = Callable[["Context", Sequence[State]], list[State]]


class Context:
    """One equation while it is looked at: the unknowns, its parameters and shapes, and where it
    stands."""

    def __init__(self, unknowns: Unknowns, eqn: Any, module: str) -> None:
        self.unknowns, self.name = unknowns, eqn.primitive.name
        self.params = {name: _plain(x) for name, x in eqn.params.items()}
        self.eqn, self.module = eqn, module
        self.shapes = [tuple(map(int, getattr(v.aval, "shape", ()))) for v in eqn.invars]
        self.out_shapes = [tuple(map(int, getattr(v.aval, "shape", ()))) for v in eqn.outvars]

    def reason(self, what: str) -> str:
        """What happens, and where."""
        return f"{what} ({self.module})" if self.module else what

    def single(self, state: State, i: int) -> Scale:
        """The scales of input i as one factor; a parameter with more keeps its scales."""
        rank = len(self.shapes[i])
        if state is None:
            return ones(rank)
        state = tuple(self.unknowns.solved(x) for x in state)
        held = [x for x in state if x.node.any()]
        if len(held) == 1:
            return held[0]._replace(role="")
        for x in held:
            self.unknowns.keep(x, self.reason(f"a parameter enters {self.name!r}"))
        return ones(rank, _why(state))

    def keep(self, states: Sequence[State], what: str) -> None:
        """These values keep their scales."""
        for x in (x for state in states if state is not None for x in state):
            self.unknowns.keep(x, self.reason(what))

    def equal(self, states: Sequence[State], first: int = 0) -> State:
        """The scale of inputs from `first` on, made equal; zeros and infinities have any that is
        positive."""
        held = [self.single(x, i) for i, x in enumerate(states, first) if x is not None]
        if not held:
            return None
        rank = max(len(x.shape) for x in held)
        wide = [x if len(x.shape) == rank else _widened(x, rank) for x in held]
        what = self.reason(f"a scaled and an unscaled value meet in {self.name!r}")
        x = functools.reduce(lambda a, b: self.unknowns.unify(a, b, what), wide)
        if len(held) < len(states):
            self.unknowns.keep_sign(x)
        return (x,)

    def along(self, x: Scale, axes: Sequence[int]) -> Scale:
        """One scale along these axes."""
        return self.unknowns.along(x, axes, self.reason(f"{self.name!r} goes over the channels"))


def _plain(x: Any) -> Any:
    """A parameter with NumPy's integers as Python's."""
    if type(x) in (tuple, list):
        return tuple(map(_plain, x))
    return int(x) if isinstance(x, np.integer) else x


def scales_of(unknowns: Unknowns, eqn: Any, module: str, states: Sequence[State]) -> list[State]:
    """The scales of an equation's outputs by those of its inputs."""
    context = Context(unknowns, eqn, module)
    rule = _RULES.get(context.name, _fixed)
    return rule(context, states)


def body(unknowns: Unknowns, jaxpr: Any, states: Sequence[State], module: str) -> list[State]:
    """The scales of a jaxpr's outputs."""
    jaxpr, consts = compat.open_jaxpr(jaxpr)
    env: dict[Any, State] = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, states, strict=True))

    def read(v: Any) -> State:
        return constant(v.val) if isinstance(v, compat.Literal) else env[v]

    for eqn in jaxpr.eqns:
        outputs = scales_of(unknowns, eqn, module, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def constant(value: Any) -> State:
    """The scales of an array that the model holds itself."""
    if hasattr(value, "dtype") and not jnp.issubdtype(value.dtype, jnp.number):
        return (ones(np.ndim(value)),)  # keys, masks
    array = np.asarray(value)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float64)
        if not (np.isfinite(array) & (array != 0)).any():
            return None
    return (ones(array.ndim),)


def _why(state: Sequence[Scale]) -> int:
    """Why a value keeps its scale."""
    return next((x.why for x in state if x.why), 0)


def _widened(x: Scale, rank: int) -> Scale:
    """The scale of a scalar beside arrays."""
    return x.map(lambda a: a.reshape((1,) * rank))


def _fixed(c: Context, states: Sequence[State]) -> list[State]:
    what = f"it goes through {c.name!r}"
    c.keep(states, what)
    why = c.unknowns.reason(c.reason(f"it comes from {c.name!r}"))
    return [(ones(len(shape), why),) for shape in c.out_shapes]


def _free(c: Context, states: Sequence[State]) -> list[State]:
    """Whatever the scales, the output is the same."""
    return [(ones(len(shape)),) for shape in c.out_shapes]


def _moved(move: Callable[[Context, Scale], Scale]) -> Rule:
    """A rule that moves elements of one value."""

    def rule(c: Context, states: Sequence[State]) -> list[State]:
        return [None if states[0] is None else tuple(move(c, x) for x in states[0])]

    return rule


def _same(c: Context, x: Scale) -> Scale:
    return x


def _convert(c: Context, states: Sequence[State]) -> list[State]:
    if np.dtype(c.eqn.outvars[0].aval.dtype).kind in "biu":
        return _fixed(c, states)
    return [states[0]]


def _reshape(c: Context, x: Scale) -> Scale:
    return moves.reshape(x, c.shapes[0], c.out_shapes[0])


def _pad(c: Context, states: Sequence[State]) -> list[State]:
    if states[0] is None and states[1] is None:
        return [None]

    def fill(shape: tuple[int, ...]) -> Scale:
        if states[1] is None:  # zeros take the scale that is asked of them
            return c.unknowns.fresh(shape)
        return Scale(np.zeros(shape, np.int64), np.zeros(shape))

    config = c.params["padding_config"]
    if states[0] is None or not any(x.node.any() for x in states[0]):
        return [(ones(len(config)),)]
    x = c.single(states[0], 0)
    if states[1] is None:
        c.unknowns.keep_sign(x)
    return [(moves.padded(x, fill, c.shapes[0], config),)]


def _concatenate(c: Context, states: Sequence[State]) -> list[State]:
    if all(x is None for x in states):
        return [None]
    axis, lengths = c.params["dimension"], [shape[c.params["dimension"]] for shape in c.shapes]
    made = []
    for i, state in enumerate(states):
        if state is None:  # zeros take the scale that is asked of them
            shape = [n if a == axis else 1 for a, n in enumerate(c.shapes[i])]
            made.append(c.unknowns.fresh(shape))
        else:
            made.append(c.single(state, i))
    return [(moves.concatenated(made, lengths, axis),)]


def _split(c: Context, states: Sequence[State]) -> list[State]:
    axis, start, outputs = c.params["axis"], 0, []
    for n in c.params["sizes"]:
        low = tuple(start if a == axis else 0 for a in range(len(c.shapes[0])))
        high = tuple(start + n if a == axis else m for a, m in enumerate(c.shapes[0]))
        state = states[0]
        outputs.append(state and tuple(moves.sliced(x, low, high, None) for x in state))
        start += n
    return outputs


def _unstack(c: Context, states: Sequence[State]) -> list[State]:
    axis, state = c.params["axis"], states[0]

    def at(x: Scale, i: int) -> Scale:
        return x.map(lambda a: a.take(min(i, a.shape[axis] - 1), axis))

    return [state and tuple(at(x, i) for x in state) for i in range(c.shapes[0][axis])]


def _indexed(c: Context, x: Scale, sizes: Sequence[int]) -> Scale:
    """Entries at places that are not known: one scale along each axis that is cut."""
    cut = [a for a, n in enumerate(sizes) if n != c.shapes[0][a]]
    if len(cut) and x.role:  # one of several factors: nothing could compensate for it
        if any(x.shape[a] > 1 for a in cut):
            c.unknowns.keep(x, c.reason(f"{c.name!r} takes rows of it"))
        return x.map(lambda v: v[tuple(slice(0, 1) if a in cut else slice(None)
                                       for a in range(v.ndim))])  # fmt: skip
    return c.along(x, cut)


def _dynamic_slice(c: Context, states: Sequence[State]) -> list[State]:
    c.keep(states[1:], "it is an index")
    state = states[0]
    return [state and tuple(_indexed(c, x, c.params["slice_sizes"]) for x in state)]


def _gather(c: Context, states: Sequence[State]) -> list[State]:
    c.keep(states[1:], "it is an index")
    dims, state = c.params["dimension_numbers"], states[0]
    if state is None:
        return [None]
    batching = getattr(dims, "operand_batching_dims", ())
    sizes = [0 if a in batching else n for a, n in enumerate(c.params["slice_sizes"])]
    gone = (*dims.collapsed_slice_dims, *batching)

    def one(x: Scale) -> Scale:
        x = _indexed(c, x, sizes)
        x = c.along(x, gone)  # of length one: taken whole, and dropped
        kept = x.map(lambda a: a.reshape([n for i, n in enumerate(a.shape) if i not in gone]))
        return moves.broadcast(kept, len(c.out_shapes[0]), dims.offset_dims)

    return [tuple(one(x) for x in state)]


def _sum(c: Context, states: Sequence[State]) -> list[State]:
    """Values of one scale, added."""
    return [c.equal(states)]


def _largest(c: Context, states: Sequence[State]) -> list[State]:
    """Values of one scale, compared: relu, if the other is zero."""
    made = c.equal(states)
    for x in made or ():
        c.unknowns.keep_sign(x)
    return [made]


def _select(c: Context, states: Sequence[State]) -> list[State]:
    return [c.equal(states[1:], 1)]


def _compare(c: Context, states: Sequence[State]) -> list[State]:
    """The answer stays if both sides have one positive scale."""
    _largest(c, states)
    return _free(c, states)


def _sign(c: Context, states: Sequence[State]) -> list[State]:
    for x in states[0] or ():
        c.unknowns.keep_sign(x)
    return _free(c, states)


def _times(c: Context, states: Sequence[State]) -> list[State]:
    if any(x is None for x in states):
        return [None]
    sign = -1.0 if c.name == "div" else 1.0
    for i in (0, 1):  # the weights of a product, all scaled alike
        several, other = states[i], states[1 - i] or ()
        alone = several is not None and len(several) > 1 and (i == 0 or sign > 0)
        if alone and not any(x.node.any() for x in other):
            return [several]
    a, b = (c.single(x, i) for i, x in enumerate(states))
    rank = len(c.out_shapes[0])
    a, b = (x if len(x.shape) == rank else _widened(x, rank) for x in (a, b))
    return [(c.unknowns.times(a, b.to(sign), c.reason("a scaled value times another")),)]


def _power(c: Context, states: Sequence[State]) -> list[State]:
    if states[0] is None:
        return _fixed(c, states)
    power = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "abs": 1, "cbrt": 1 / 3}.get(c.name)
    x = c.single(states[0], 0)
    c.unknowns.keep_sign(x)
    return [(x.to(c.params["y"] if power is None else power),)]


def _negate(c: Context, states: Sequence[State]) -> list[State]:
    return [states[0]]


def _reduced(positive: bool) -> Rule:
    """A sum, or a maximum or minimum, over some axes."""

    def rule(c: Context, states: Sequence[State]) -> list[State]:
        if states[0] is None:
            return [None]
        axes = c.params["axes"]
        x = c.along(c.single(states[0], 0), axes)
        if positive:
            c.unknowns.keep_sign(x)
        return [(x.map(lambda a: np.squeeze(a, tuple(axes))),)]

    return rule


def _ranked(c: Context, states: Sequence[State]) -> list[State]:
    """Where the largest or smallest stands."""
    if states[0] is not None:
        c.unknowns.keep_sign(c.along(c.single(states[0], 0), c.params["axes"]))
    return _free(c, states)


def _windows(c: Context, states: Sequence[State]) -> list[State]:
    """Sums or maxima over windows, and running ones."""
    if states[0] is None:
        return [None]
    if "axis" in c.params:
        axes = [c.params["axis"]]
    else:
        axes = [a for a, n in enumerate(c.params["window_dimensions"]) if n > 1]
    x = c.along(c.single(states[0], 0), axes)
    if not c.name.endswith("sum"):
        c.unknowns.keep_sign(x)
    return [(x,)]


def _sort(c: Context, states: Sequence[State]) -> list[State]:
    if len(states) > 1:
        return _fixed(c, states)
    x = c.along(c.single(states[0], 0), [c.params["dimension"]])
    c.unknowns.keep_sign(x)
    return [(x,)]


def _call(c: Context, states: Sequence[State]) -> list[State]:
    inner = list(compat.inner_jaxprs(c.eqn))
    if c.name == compat.CUSTOM_VJP or c.name == compat.CUSTOM_JVP:
        inner = [c.params["call_jaxpr"]] if "call_jaxpr" in c.params else []
    if len(inner) != 1:
        return _fixed(c, states)
    return body(c.unknowns, inner[0], states, c.module)


def _dot(c: Context, states: Sequence[State]) -> list[State]:
    summed, shared = c.params["dimension_numbers"]
    if any(x is None for x in states):
        return [None]
    rank, batch = len(c.out_shapes[0]), len(shared[0])
    inner, outer, start = [], [], batch
    for i, state in enumerate(states):
        n = len(c.shapes[i])
        rest = [a for a in range(n) if a not in (*shared[i], *summed[i])]
        into, out = _sides(c, state or (), summed[i])
        into = ones(n, _why(state or ())) if into is None else c.along(into, rest)
        inner.append(_axes(into, (*shared[i], *summed[i])))
        dims = (*range(batch), *range(start, start + len(rest)))
        outer += [moves.broadcast(_axes(x, (*shared[i], *rest)), rank, dims) for x in out]
        start += len(rest)
    _cancel(c, *inner)
    return [(_all_times(c, outer, rank),)]


def _axes(x: Scale, axes: Sequence[int]) -> Scale:
    """x as an array of these axes; the others have length one."""
    rest = [a for a in range(len(x.shape)) if a not in axes]
    shape = [x.shape[a] for a in axes]
    return x.map(lambda a: np.transpose(a, (*axes, *rest)).reshape(shape))


def _sides(
    c: Context, state: tuple[Scale, ...], summed: Sequence[int]
) -> tuple[Scale | None, list[Scale]]:
    """The scale along what a product sums over, and the other factors."""

    def sums(x: Scale) -> bool:
        return x.role == "in" or any(x.shape[a] > 1 for a in summed)

    into = [x for x in state if sums(x) and x.node.any()]
    out = [x for x in state if x.node.any() and not sums(x)]
    if len(into) > 1:
        for x in into:
            c.unknowns.keep(x, c.reason("a parameter is summed over axes of different uses"))
        into = []
    return (into[0] if into else None), out


def _cancel(c: Context, x: Scale, w: Scale) -> None:
    """The two sides of a product's sum have inverse scales."""
    what = c.reason("a product sums it with what keeps its scale")
    c.unknowns.unify(x, w.to(-1.0), what)


def _all_times(c: Context, scales: Sequence[Scale], rank: int) -> Scale:
    x = ones(rank)
    for other in scales:
        x = c.unknowns.times(x, other, c.reason("both sides of a product are scaled"))
    return x._replace(role="")


def _conv(c: Context, states: Sequence[State]) -> list[State]:
    p = c.params
    if p["batch_group_count"] > 1:
        return _fixed(c, states)
    if any(x is None for x in states):
        return [None]
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    image = c.single(states[0], 0).map(lambda a: np.transpose(a, numbers.lhs_spec))
    image = c.along(image, (0, *range(2, len(image.shape))))
    into, out = _sides(c, states[1] or (), numbers.rhs_spec[1:])
    rank, inputs = len(c.out_shapes[0]), c.shapes[1][numbers.rhs_spec[1]]
    # The kernel as (groups, outputs of one, inputs of one, *window).
    outputs = c.shapes[1][numbers.rhs_spec[0]]

    def grouped(a: np.ndarray) -> np.ndarray:
        a = np.transpose(a, numbers.rhs_spec)
        if groups == 1 or a.shape[0] == 1:
            return a[None]
        return a.reshape(groups, outputs // groups, *a.shape[1:])

    kernel = ones(rank + 1) if into is None else into.map(grouped)
    kernel = c.along(kernel, (1, *range(3, rank + 1)))
    kernel = kernel.map(lambda a: a.reshape(a.shape[0], a.shape[2]))
    split = (1, 1) if image.shape[1] == 1 else (groups, inputs)
    _cancel(c, image.map(lambda a: a.reshape(split)), kernel)
    made = []
    for y in out:
        y = y.map(lambda a: np.transpose(a, numbers.rhs_spec))
        y = c.along(y, range(2, rank))
        made.append(y.map(lambda a: np.swapaxes(a, 0, 1)))
    result = _all_times(c, made, rank)
    back = np.argsort(numbers.out_spec)
    return [(result.map(lambda a: np.transpose(a, back)),)]


def _ragged(c: Context, states: Sequence[State]) -> list[State]:
    """(T, K) x (E, K, N) -> (T, N): one scale for all experts."""
    numbers = c.params["ragged_dot_dimension_numbers"]
    sums = tuple(map(tuple, numbers.dot_dimension_numbers[0]))
    plain = sums == ((1,), (1,)) and tuple(numbers.rhs_group_dimensions) == (0,)
    if not plain or len(c.shapes[0]) != 2 or any(x is None for x in states[:2]):
        return _fixed(c, states)
    x = c.along(c.single(states[0], 0), [0])
    into, out = _sides(c, states[1] or (), (1,))
    kernel = ones(3) if into is None else c.along(into, (0, 2))
    _cancel(c, x.map(lambda a: a.reshape(-1)), kernel.map(lambda a: a.reshape(-1)))
    made = [c.along(y, (0, 1)).map(lambda a: a.reshape(1, -1)) for y in out]
    return [(_all_times(c, made, 2),)]


_MOVES: dict[str, Callable[[Context, Scale], Scale]] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "transpose": lambda c, x: x.map(lambda a: np.transpose(a, c.params["permutation"])),
    "broadcast_in_dim": lambda c, x: moves.broadcast(
        x, len(c.out_shapes[0]), c.params["broadcast_dimensions"]
    ),
    "slice": lambda c, x: moves.sliced(
        x, c.params["start_indices"], c.params["limit_indices"], c.params["strides"]
    ),
    "rev": lambda c, x: moves.reversed_(x, c.params["dimensions"]),
    **dict.fromkeys(
        ("copy", "copy_p", "reduce_precision", "sharding_constraint", "reshard", "mesh_cast"), _same
    ),
}
_RULES: dict[str, Rule] = {
    **{name: _moved(move) for name, move in _MOVES.items()},
    "convert_element_type": _convert,
    "optimization_barrier": lambda c, states: list(states),
    "pad": _pad,
    "concatenate": _concatenate,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    GATHER: _gather,
    **dict.fromkeys(("add", "sub", "add_any"), _sum),
    **dict.fromkeys(("max", "min"), _largest),
    "select_n": _select,
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _compare),
    "is_finite": _free,
    "sign": _sign,
    **dict.fromkeys(("mul", "div"), _times),
    **dict.fromkeys(("square", "integer_pow", "sqrt", "rsqrt", "abs", "cbrt"), _power),
    "neg": _negate,
    "reduce_sum": _reduced(False),
    **dict.fromkeys(("reduce_max", "reduce_min"), _reduced(True)),
    **dict.fromkeys(("argmax", "argmin"), _ranked),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min", "cumsum", "cummax",
         "cummin"),
        _windows,
    ),
    "sort": _sort,
    **dict.fromkeys(
        (compat.JIT, compat.REMAT, compat.CUSTOM_JVP, compat.CUSTOM_VJP, "closed_call"), _call
    ),
    DOT: _dot,
    CONV: _conv,
    RAGGED_DOT: _ragged,
}  # fmt: skip
