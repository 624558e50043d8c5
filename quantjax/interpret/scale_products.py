"""Which scales pass a product of two values? It sums over an axis only if the scales of the two
sides cancel there; those along the other axes are scales of the result."""

from collections.abc import Sequence

import numpy as np

from quantjax.interpret import moves
from quantjax.interpret.products import CONV, DOT, RAGGED_DOT
from quantjax.interpret.scale_context import Context, Rule, State, why
from quantjax.interpret.unknowns import Scale, ones


def _sides(c: Context, state: State, summed: Sequence[int]) -> tuple[Scale | None, list[Scale]]:
    """The scale along what a product sums over, and the other factors."""

    def sums(x: Scale) -> bool:
        return x.role == "in" or any(x.shape[a] > 1 for a in summed)

    held = [x for x in state or () if x.node.any()]
    into, out = [x for x in held if sums(x)], [x for x in held if not sums(x)]
    if len(into) > 1:
        c.keep([tuple(into)], "a parameter is summed over axes of different uses")
        into = []
    return (into[0] if into else None), out


def _cancel(c: Context, x: Scale, w: Scale) -> None:
    """The two sides of a product's sum have inverse scales."""
    what = c.step.reason("a product sums it with what keeps its scale")
    c.unknowns.unify(x, w.to(-1.0), what)


def _result(c: Context, scales: Sequence[Scale]) -> Scale:
    """The scales of both sides, multiplied."""
    x = ones(len(c.step.out_shapes[0]))
    for other in scales:
        x = c.unknowns.times(x, other, c.step.reason("both sides of a product are scaled"))
    return x._replace(role="")


def _axes(x: Scale, axes: Sequence[int]) -> Scale:
    """x as an array of these axes; the others have length one."""
    rest = [a for a in range(len(x.shape)) if a not in axes]
    shape = [x.shape[a] for a in axes]
    return x.map(lambda a: np.transpose(a, (*axes, *rest)).reshape(shape))


def _dot(c: Context, states: Sequence[State]) -> list[State]:
    summed, shared = c.step.params["dimension_numbers"]
    if any(x is None for x in states):
        return [None]
    rank, batch = len(c.step.out_shapes[0]), len(shared[0])
    inner, outer, start = [], [], batch
    for i, state in enumerate(states):
        n = len(c.step.shapes[i])
        rest = [a for a in range(n) if a not in (*shared[i], *summed[i])]
        into, out = _sides(c, state, summed[i])
        into = ones(n, why(state or ())) if into is None else c.along(into, rest)
        inner.append(_axes(into, (*shared[i], *summed[i])))
        dims = (*range(batch), *range(start, start + len(rest)))
        outer += [moves.broadcast(_axes(x, (*shared[i], *rest)), rank, dims) for x in out]
        start += len(rest)
    _cancel(c, *inner)
    return [(_result(c, outer),)]


def _conv(c: Context, states: Sequence[State]) -> list[State] | None:
    p = c.step.params
    if p["batch_group_count"] > 1:
        return None
    if any(x is None for x in states):
        return [None]
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    outputs, inputs, *window = (c.step.shapes[1][a] for a in numbers.rhs_spec)
    rank = 2 + len(window)
    image = c.single(states[0], 0).map(lambda a: np.transpose(a, numbers.lhs_spec))
    image = c.along(image, (0, *range(2, rank)))
    into, out = _sides(c, states[1], numbers.rhs_spec[1:])

    def grouped(a: np.ndarray) -> np.ndarray:
        """The kernel as (groups, outputs of one, inputs of one, *window)."""
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
    back = np.argsort(numbers.out_spec)
    return [(_result(c, made).map(lambda a: np.transpose(a, back)),)]


def _ragged(c: Context, states: Sequence[State]) -> list[State] | None:
    """(T, K) x (E, K, N) -> (T, N): one scale for all experts."""
    numbers = c.step.params["ragged_dot_dimension_numbers"]
    sums = tuple(map(tuple, numbers.dot_dimension_numbers[0]))
    plain = sums == ((1,), (1,)) and tuple(numbers.rhs_group_dimensions) == (0,)
    if not plain or len(c.step.shapes[0]) != 2 or any(x is None for x in states[:2]):
        return None
    x = c.along(c.single(states[0], 0), [0])
    into, out = _sides(c, states[1], (1,))
    kernel = ones(3) if into is None else c.along(into, (0, 2))
    _cancel(c, x.map(np.ravel), kernel.map(np.ravel))
    made = [c.along(y, (0, 1)).map(lambda a: a.reshape(1, -1)) for y in out]
    return [(_result(c, made),)]


RULES: dict[str, Rule] = {DOT: _dot, CONV: _conv, RAGGED_DOT: _ragged}
