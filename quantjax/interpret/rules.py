"""What becomes of a parameter in one operation? Views keep it quantized, products use it.

A rule gets the machine, the equation, its inputs and its place, and returns the outputs, or None
where it does not apply; the parameter then becomes a float array, which is recorded."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from quantjax.interpret import products
from quantjax.interpret.layouts import laid_out
from quantjax.interpret.param import Param, cast, reshaped, transposed
from quantjax.interpret.parts import (
    Cut,
    backwards,
    cut,
    dynamic,
    gathered_layer,
    neighbours,
    strided,
)
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


def _cut(x: Any, cuts: Sequence[Cut | None]) -> Param | None:
    """A parameter after cuts of its axes; None where one of them would cut a block or a byte."""
    for dim, what in enumerate(cuts):
        x = x if x is None or what is None else cut(x, dim, what)
    return x


def _slice(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    x, p = inputs[0], eqn.params
    start, limit = p["start_indices"], p["limit_indices"]
    strides = p["strides"] or (1,) * len(start)
    wanted = zip(start, limit, strides, x.shape, strict=True)
    cuts = [None if (a, b, s) == (0, n, 1) else (a, b, s) for a, b, s, n in wanted]
    view = _cut(x, [c and strided(*c) for c in cuts])
    return None if view is None else [view]


def _dynamic_slice(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    x, *starts = inputs
    if any(isinstance(start, Param) for start in starts):
        return None
    wanted = zip(starts, eqn.params["slice_sizes"], x.shape, strict=True)
    view = _cut(x, [None if n == have else dynamic(start, n) for start, n, have in wanted])
    return None if view is None else [view]


def _split(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    x, dim, views, start = inputs[0], eqn.params["axis"], [], 0
    for n in map(int, eqn.params["sizes"]):
        views.append(cut(x, dim, neighbours(start, n)))
        start += n
    return None if any(view is None for view in views) else views


def _unstack(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    x, dim = inputs[0], eqn.params["axis"]
    views = [cut(x, dim, neighbours(i, 1)) for i in range(x.shape[dim])]
    shape = eqn.outvars[0].aval.shape
    flat = [view and reshaped(view, shape) for view in views]
    return None if any(view is None for view in flat) else flat


def _reverse(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    x, dims = inputs[0], eqn.params["dimensions"]
    view = _cut(x, [backwards(n) if d in dims else None for d, n in enumerate(x.shape)])
    return None if view is None else [view]


def _gather(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """One layer of a stack, or rows of a table."""
    table, index = inputs
    if isinstance(table, Param) and not isinstance(index, Param):
        view = gathered_layer(eqn, table, index)
        if view is not None:
            return [view]
    return products.gather(machine, eqn, inputs, place)


def _barrier(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any]:
    return list(lax.optimization_barrier(tuple(inputs)))


def _constraint(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """with_sharding_constraint on codes and scales; on the float array where they can not be cut
    alike, and where the layout in memory is asked for as well."""
    if eqn.params.get("layout") is not None:
        return None
    view = laid_out(inputs[0], eqn.params["sharding"], lax.with_sharding_constraint)
    return None if view is None else [view]


def _reshard(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """A move to another sharding, or the same one's name on a mesh with other kinds of axes."""

    def put(a: jax.Array, sharding: Any) -> jax.Array:
        return eqn.primitive.bind(a, **{**eqn.params, "dst_sharding": sharding})

    view = laid_out(inputs[0], eqn.params["dst_sharding"], put)
    return None if view is None else [view]


def _same(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any]:
    return [inputs[0]]


_RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _reverse,
    "optimization_barrier": _barrier,
    "sharding_constraint": _constraint,
    "reshard": _reshard,
    "mesh_cast": _reshard,
    "copy": _same,
    "copy_p": _same,
    products.DOT: products.dot,
    products.CONV: products.convolution,
    products.GATHER: _gather,
    products.RAGGED_DOT: products.ragged_dot,
}
