"""Which scales pass an operation on entries one by one? Sums of values that have the same one,
products with values that keep theirs, relu and the like if it is positive, powers as a power."""

from collections.abc import Sequence

import numpy as np

from quantjax.interpret.scale_context import Context, Rule, State, widened

_POWERS = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5, "abs": 1, "cbrt": 1 / 3}


def _same(c: Context, states: Sequence[State]) -> list[State]:
    return list(states)


def _convert(c: Context, states: Sequence[State]) -> list[State] | None:
    whole = np.dtype(c.step.eqn.outvars[0].aval.dtype).kind in "biu"
    return None if whole else list(states)


def _sum(c: Context, states: Sequence[State]) -> list[State]:
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
    return c.free()


def _sign(c: Context, states: Sequence[State]) -> list[State]:
    for x in states[0] or ():
        c.unknowns.keep_sign(x)
    return c.free()


def _finite(c: Context, states: Sequence[State]) -> list[State]:
    return c.free()


def _times(c: Context, states: Sequence[State]) -> list[State]:
    if any(x is None for x in states):
        return [None]
    sign = -1.0 if c.step.name == "div" else 1.0
    for i in (0, 1):  # the weights of a product, all scaled alike
        several, other = states[i], states[1 - i] or ()
        alone = several is not None and len(several) > 1 and (i == 0 or sign > 0)
        if alone and not any(x.node.any() for x in other):
            return [several]
    rank = len(c.step.out_shapes[0])
    a, b = (widened(c.single(x, i), rank) for i, x in enumerate(states))
    return [(c.unknowns.times(a, b.to(sign), c.step.reason("a scaled value times another")),)]


def _power(c: Context, states: Sequence[State]) -> list[State] | None:
    if states[0] is None:
        return None
    x = c.single(states[0], 0)
    c.unknowns.keep_sign(x)
    power = _POWERS.get(c.step.name)
    return [(x.to(c.step.params["y"] if power is None else power),)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("neg", "copy", "copy_p", "reduce_precision", "sharding_constraint", "reshard",
         "mesh_cast", "optimization_barrier"),
        _same,
    ),
    "convert_element_type": _convert,
    **dict.fromkeys(("add", "sub", "add_any"), _sum),
    **dict.fromkeys(("max", "min"), _largest),
    "select_n": _select,
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _compare),
    "sign": _sign,
    "is_finite": _finite,
    **dict.fromkeys(("mul", "div"), _times),
    **dict.fromkeys((*_POWERS, "integer_pow"), _power),
}  # fmt: skip
