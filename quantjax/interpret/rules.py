"""What becomes of a parameter in one operation? Views keep it quantized, products use it.

A rule gets the machine, the equation, its inputs and its place, and returns the outputs, or None
where it does not apply; the parameter then becomes a float array, which is recorded."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives as p

from quantjax.affine import dequantize_array
from quantjax.blocks import sizes
from quantjax.interpret import jax_compat as compat
from quantjax.interpret.param import Param, as_qtensor, cast, reshaped, transposed
from quantjax.interpret.record import Place, Site, product
from quantjax.interpret.registry import registered
from quantjax.qtensor import QTensor

DOT, CONV, GATHER = p.dot_general_p.name, p.conv_general_dilated_p.name, p.gather_p.name
RAGGED_DOT = "ragged_dot_general"
PRODUCTS = frozenset({DOT, CONV, RAGGED_DOT})

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


def _originals(x: Param, dims: Sequence[int]) -> tuple[int, ...]:
    """Axes of the view as axes of the leaf."""
    return tuple(a for d in dims for a in x.axes[d])


def _note_site(
    machine: Any,
    eqn: Any,
    x: Param,
    other: Any,
    place: Place,
    *,
    contracting: Sequence[int],
    batch: Sequence[int],
    flops: int,
    groups: int = 1,
    lowering: str = "dequantized at the product",
) -> None:
    summed, shared = _originals(x, contracting), _originals(x, batch)
    machine.record.site(
        place,
        Site(
            path=x.path,
            primitive=eqn.primitive.name,
            module=place.module,
            contracting=summed,
            batch=shared,
            output=tuple(a for a in range(x.value.ndim) if a not in (*summed, *shared)),
            param_shape=tuple(x.value.shape),
            input_shape=tuple(other.shape),
            output_shape=tuple(eqn.outvars[0].aval.shape),
            flops=flops * place.calls,
            calls=place.calls,
            groups=groups,
            layers=x.layers,
            format=str(x.value.format if isinstance(x.value, QTensor) else x.value.dtype),
            lowering=lowering if x.quantized else "float",
        ),
    )


def _bound(machine: Any, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """The original operation on float arrays. Sites are expected to read their parameter, so
    nothing is remarked."""
    return compat.rebind(eqn, [x.array() if isinstance(x, Param) else x for x in inputs])


def _dot(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any]:
    sides = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    for i, x in enumerate(inputs):
        if isinstance(x, Param):
            contracting, batch = sides[0][i], sides[1][i]
            flops = 2 * int(np.prod(out.shape)) * product(x.shape, tuple(contracting))
            _note_site(
                machine, eqn, x, inputs[1 - i], place,
                contracting=contracting, batch=batch, flops=flops,
            )  # fmt: skip
    return _bound(machine, eqn, inputs)


def _conv(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    image, kernel = inputs
    if isinstance(image, Param) or not isinstance(kernel, Param):
        return None
    spec = eqn.params["dimension_numbers"].rhs_spec  # (output, input, *window)
    out = eqn.outvars[0].aval
    summed = spec[1:]
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    flops = 2 * int(np.prod(out.shape)) * product(kernel.shape, tuple(summed))
    _note_site(
        machine, eqn, kernel, image, place, contracting=summed, batch=(), flops=flops, groups=groups
    )
    return _bound(machine, eqn, inputs)


def _gather(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    """Rows of a table: the axes that are indexed one entry at a time are its batch."""
    table, index = inputs
    if not isinstance(table, Param) or isinstance(index, Param):
        return None
    rows = _rows(eqn, table, index)
    lowering = "dequantized at the product" if rows is None else "rows dequantized"
    batch = eqn.params["dimension_numbers"].collapsed_slice_dims
    _note_site(
        machine, eqn, table, index, place,
        contracting=(), batch=batch, flops=0, lowering=lowering,
    )  # fmt: skip
    return _bound(machine, eqn, inputs) if rows is None else [rows]


def _rows(eqn: Any, table: Param, index: Any) -> jax.Array | None:
    """Whole rows of a quantized table, gathered as codes; None where scales span rows, or where
    something else is gathered. Out of bounds the scale is NaN wherever the value would be."""
    q, params = as_qtensor(table), eqn.params
    if q is None or q.codebook is not None or not isinstance(q.scale, jax.Array):
        return None
    dims, rank, out = params["dimension_numbers"], q.ndim, eqn.outvars[0].aval.ndim
    whole = params["slice_sizes"] == (1, *q.shape[1:]) and dims.collapsed_slice_dims == (0,)
    trailing = tuple(dims.offset_dims) == tuple(range(out - rank + 1, out))
    alone = len(q.block) < rank or sizes(q.shape, q.block)[0] == 1
    if not (whole and trailing and alone) or (q.packed is not None and q.packed[0] == -rank):
        return None

    def rows(child: jax.Array) -> jax.Array:
        own: dict[str, Any] = {"slice_sizes": (1, *child.shape[1:])}
        if not jax.numpy.issubdtype(child.dtype, np.floating):
            own["fill_value"] = 0  # NaN, which the scale has there, is no integer
        return eqn.primitive.bind(child, index, **{**params, **own})

    zero = None if q.zero_point is None else rows(q.zero_point)
    found = dataclasses.replace(q, qvalue=rows(q.qvalue), scale=rows(q.scale), zero_point=zero)
    return dequantize_array(dataclasses.replace(found, block=q.block[-(rank - 1) :]))


def _ragged_dot(machine: Any, eqn: Any, inputs: Sequence[Any], place: Place) -> list[Any] | None:
    tokens, experts, *rest = inputs
    if not isinstance(experts, Param) or any(isinstance(x, Param) for x in (tokens, *rest)):
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, summed), (_, shared) = numbers.dot_dimension_numbers
    batch = (*shared, *numbers.rhs_group_dimensions)
    flops = 2 * int(np.prod(eqn.outvars[0].aval.shape)) * product(experts.shape, tuple(summed))
    _note_site(machine, eqn, experts, tokens, place, contracting=summed, batch=batch, flops=flops)
    return _bound(machine, eqn, inputs)


_RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    DOT: _dot,
    CONV: _conv,
    GATHER: _gather,
    RAGGED_DOT: _ragged_dot,
}
