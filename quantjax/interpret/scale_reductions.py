"""Which scales pass an operation that goes over axes, all at once, in windows, or step by step? One
that is the same along them; a positive one, unless they are summed."""

from collections.abc import Sequence

import numpy as np

from quantjax.interpret.scale_context import Context, Rule, State, each


def _axes(c: Context) -> tuple[int, ...]:
    """The axes that it goes over."""
    p = c.step.params
    if "window_dimensions" in p:
        return tuple(a for a, n in enumerate(p["window_dimensions"]) if n > 1)
    axes = next(p[name] for name in ("axes", "axis", "dimension") if name in p)
    return axes if isinstance(axes, tuple) else (axes,)


def _along(c: Context, states: Sequence[State]) -> State:
    if states[0] is None:
        return None
    x = c.along(c.single(states[0], 0), _axes(c))
    if not c.step.name.endswith("sum"):
        c.unknowns.keep_sign(x)
    return (x,)


def _over(c: Context, states: Sequence[State]) -> list[State]:
    return [_along(c, states)]


def _reduce(c: Context, states: Sequence[State]) -> list[State]:
    return [each(_along(c, states), lambda x: x.map(lambda a: np.squeeze(a, _axes(c))))]


def _ranked(c: Context, states: Sequence[State]) -> list[State]:
    """Where the largest or smallest stands."""
    _along(c, states)
    return c.free()


def _sort(c: Context, states: Sequence[State]) -> list[State] | None:
    return None if len(states) > 1 else _over(c, states)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _ranked),
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min", "cumsum", "cummax",
         "cummin"),
        _over,
    ),
    "sort": _sort,
}  # fmt: skip
