"""Which axes do the two gradient products of an operation sum over? Those that share a scale."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import primitives as p

from quantjax.interpret import jax_compat as compat
from quantjax.interpret.rounded import keeps_floats
from quantjax.interpret.trained import Trained
from quantjax.ops import GradientAxes, with_rounded_gradients


def trained_product(eqn: Any, arrays: Sequence[Any], side: int, asks: Trained | None) -> jax.Array:
    """The operation on float arrays, its gradients rounded as the parameter among them asks.

    `side` is the parameter's place, the activation's the other one of the first two. Gradients stay
    float, as the activation does, where the model asks for the highest precision.
    """
    backward = None if asks is None else asks.backward
    if asks is None or backward is None or keeps_floats(eqn):
        return compat.rebind(eqn, arrays)[0]
    key = asks.key
    if key is not None and key.ndim:  # layers that one batched product takes together
        key = key.reshape(-1)[0]
    x, w, rest = arrays[1 - side], arrays[side], tuple(arrays[2:])
    product = functools.partial(_product, eqn, side)
    axes = _AXES[eqn.primitive.name](eqn, side)
    return with_rounded_gradients(product, backward, axes, x, w, rest, key)


def _product(eqn: Any, side: int, x: Any, w: Any, *rest: Any) -> Any:
    operands = (w, x) if side == 0 else (x, w)
    return compat.rebind(eqn, [*operands, *rest])[0]


def _free(rank: int, *used: Sequence[int]) -> tuple[int, ...]:
    return tuple(a for a in range(rank) if not any(a in dims for dims in used))


def _dot_axes(eqn: Any, side: int) -> GradientAxes:
    """y is (batch, free axes of the left side, free axes of the right)."""
    summed, shared = eqn.params["dimension_numbers"]
    left, right = (
        _free(v.aval.ndim, *dims) for v, *dims in zip(eqn.invars, summed, shared, strict=True)
    )
    return _of_free((left, right), side, eqn.outvars[0].aval.ndim)


def _of_free(free: tuple[Sequence[int], Sequence[int]], side: int, rank: int) -> GradientAxes:
    """dX sums over the free axes of the parameter, dW over those of x; y ends in both."""
    left, right = (len(axes) for axes in free)
    in_y = (tuple(range(rank - left - right, rank - right)), tuple(range(rank - right, rank)))
    return GradientAxes(in_y[side], tuple(free[side]), in_y[1 - side], tuple(free[1 - side]))


def _convolution_axes(eqn: Any, side: int) -> GradientAxes:
    """dX of an example sums over outputs and window, dW over examples and places."""
    numbers = eqn.params["dimension_numbers"]
    (example, _, *places), (out_channel, _, *window) = numbers.lhs_spec, numbers.rhs_spec
    y_example, y_channel, *y_places = numbers.out_spec
    return GradientAxes(
        (y_channel, *y_places), (out_channel, *window), (y_example, *y_places), (example, *places)
    )


def _ragged_axes(eqn: Any, side: int) -> GradientAxes:
    """As dot_general; the groups of the experts are apart, as a batch is."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    summed, shared = numbers.dot_dimension_numbers
    tokens, experts = (v.aval.ndim for v in eqn.invars[:2])
    left = _free(tokens, summed[0], shared[0])
    right = _free(experts, summed[1], shared[1], numbers.rhs_group_dimensions)
    return _of_free((left, right), side, eqn.outvars[0].aval.ndim)


_AXES = {
    p.dot_general_p.name: _dot_axes,
    p.conv_general_dilated_p.name: _convolution_axes,
    "ragged_dot_general": _ragged_axes,
}
