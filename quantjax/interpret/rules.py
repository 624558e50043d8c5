"""What becomes of a parameter in one operation? Views keep it quantized, products use it.

A rule gets the machine, the equation, its inputs and its place, and returns the outputs, or None
where it does not apply; the parameter then becomes a float array, which is recorded."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from quantjax.interpret import products
from quantjax.interpret.param import Param, cast, reshaped, transposed
from quantjax.interpret.record import Place
from quantjax.interpret.registry import registered

Rule = Callable[[Any, Any, Sequence[Any], Place], list[Any] | None]


def apply(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """The outputs by the rule of the operation, a user's before ours, or None."""
    own = registered(eqn.primitive.name, inputs)
    if own is not None:
        return own(**eqn.params)
    rule = _RULES.get(eqn.primitive.name)
    return None if rule is None else rule(machine, eqn, inputs, place)


def _transpose(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any]:
    return [transposed(inputs[0], eqn.params["permutation"])]


def _reshape(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    view = reshaped(inputs[0], eqn.outvars[0].aval.shape)
    return None if view is None else [view]


def _broadcast(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """A broadcast that only adds axes of length one, in order."""
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    x = inputs[0]
    if not isinstance(x, Param) or list(dims) != sorted(dims) or np.prod(shape) != np.prod(x.shape):
        return None
    return _reshape(machine, eqn, inputs, place)


def _convert(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    dtype = eqn.params["new_dtype"]
    if not jax.numpy.issubdtype(dtype, np.floating):
        return None
    return [cast(inputs[0], dtype)]


def _same(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any]:
    return [inputs[0]]


_RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    products.DOT: products.dot,
    products.CONV: products.convolution,
    products.GATHER: products.gather,
    products.RAGGED_DOT: products.ragged_dot,
}
