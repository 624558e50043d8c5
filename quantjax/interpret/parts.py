"""Which part of a quantized array is a quantized array itself? One of whole blocks and bytes.

Along an axis whose entries have scales of their own any entries can be taken; along one that a
single scale covers too, and the scale stays. Between lie groups: neighbours can be taken from
where a group begins. Packed codes are taken from where a byte begins."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.blocks import counts, sizes
from quantjax.interpret.param import BESIDE, Axes, Param, beside_codes, reshaped, stack
from quantjax.packing import packed_length
from quantjax.qtensor import QTensor

# The children that lead with layers alone, and how many axes they have behind those.
LAYERED = {"codebook": 1, "act_scale": 0, "act_zero_point": 0, "act_thresholds": 1}


class Cut(NamedTuple):
    """What is taken of one axis: how many entries; a function of an array and an axis that takes
    them; and where they begin, if they are neighbours and that is known while tracing."""

    length: int
    take: Callable[[jax.Array, int], jax.Array]
    first: int | None = None


def cut(x: Param, dim: int, what: Cut) -> Param | None:
    """The view with some entries of its axis `dim`; None where its codes or scales can not be cut
    there. One layer of a stack is that layer: the leaf loses its first axis, as in a scan."""
    if len(x.axes[dim]) != 1:  # merged axes; an axis of length one that the leaf lacks
        return x if what.length == x.shape[dim] == 1 else None
    if what.length == 0:
        return None  # packed codes of an empty array have no bytes
    (axis,) = x.axes[dim]
    value = part(x.value, axis, what)
    if value is None:  # a block may span layers
        layers: Any = stack(x) if axis == 0 and x.quantized else None
        value = None if layers is None else part(layers, axis, what)
    if value is None:
        return None
    slot = x.slot if x.slot is None or x.slot.ndim <= axis else what.take(x.slot, axis)
    asks = x.trained and x.trained.at(axis, lambda a: what.take(a, axis))
    taken = dataclasses.replace(x, value=value, slot=slot, trained=asks)
    layer = axis == 0 and what.length == 1 < x.shape[dim] and value.ndim > 2
    return first_layer(taken) if layer and not _packed_first(value) else taken


def _packed_first(x: Any) -> bool:
    if not isinstance(x, QTensor):
        return False
    return (x.packed is not None and x.packed[0] == -x.ndim) or _packed_first(x.scale)


def part(x: jax.Array | QTensor, axis: int, what: Cut) -> Any:
    """Some entries of an axis of an array, or of a quantized array and its scales."""
    if not isinstance(x, QTensor):
        return what.take(x, axis)
    codes = _codes(x, axis, what)
    if codes is None:
        return None
    size, count = sizes(x.shape, x.block)[axis], counts(x.shape, x.block)[axis]
    if size > 1 == count:
        return codes
    step = what
    if size > 1:
        if what.first is None or what.first % size:
            return None
        first, end = what.first // size, -(-(what.first + what.length) // size)
        step = neighbours(first, end - first)
    scale = None if x.scale is None else part(x.scale, axis, step)
    if scale is None and x.scale is not None:
        return None
    zero = None if x.zero_point is None else step.take(x.zero_point, axis)
    own: dict[str, Any] = {"scale": scale, "zero_point": zero}
    if axis < x.ndim - len(x.block):  # a layer's own
        for name, behind in LAYERED.items():
            a = getattr(x, name)
            own[name] = what.take(a, axis) if a is not None and a.ndim - behind > axis else a
    return dataclasses.replace(codes, **own)


def _codes(x: QTensor, axis: int, what: Cut) -> QTensor | None:
    """x with some of its codes, and of what stands beside them, its scales as they were."""
    x = beside_codes(x, lambda a: what.take(a, axis), axis)
    if x.packed is None or x.packed[0] % x.ndim != axis:
        return dataclasses.replace(x, qvalue=what.take(x.qvalue, axis))
    bits = x.format.bits
    if what.first is None or what.first * bits % 8:
        return None
    bytes_ = neighbours(what.first * bits // 8, packed_length(what.length, bits))
    return dataclasses.replace(
        x, qvalue=bytes_.take(x.qvalue, axis), packed=(x.packed[0], what.length)
    )


def neighbours(first: int, length: int) -> Cut:
    """Entries side by side, from one that is known."""

    def take(a: jax.Array, axis: int) -> jax.Array:
        return lax.slice_in_dim(a, first, first + length, axis=axis)

    return Cut(length, take, first)


def strided(start: int, limit: int, stride: int) -> Cut:
    """What `lax.slice` takes of an axis."""
    if stride == 1:
        return neighbours(start, limit - start)
    length = -(-(limit - start) // stride)
    return Cut(length, lambda a, axis: lax.slice_in_dim(a, start, limit, stride, axis))


def dynamic(start: Any, length: int) -> Cut:
    """What `lax.dynamic_slice` takes of an axis."""
    return Cut(length, lambda a, axis: lax.dynamic_slice_in_dim(a, start, length, axis))


def backwards(length: int) -> Cut:
    """What `lax.rev` makes of an axis."""
    return Cut(length, lambda a, axis: lax.rev(a, (axis,)))


def gathered_layer(eqn: Any, x: Param, index: Any) -> Param | None:
    """The view of one layer of a stack of matrices, by `lax.gather`; None if that gathers something
    else. Out of bounds its scales are NaN where its values would be."""
    p, q = eqn.params, x.value
    dims, rank = p["dimension_numbers"], len(x.axes)
    whole = p["slice_sizes"] == (1, *x.shape[1:]) and dims.collapsed_slice_dims == (0,)
    plain = x.axes == tuple((a,) for a in range(rank)) and index.shape == (1,)
    if not (whole and plain) or rank < 3 or dims.offset_dims != tuple(range(rank - 1)):
        return None
    filled = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if isinstance(q, QTensor):
        layers: Any = stack(x)
        if layers is None or (filled and not isinstance(layers.scale, jax.Array)):
            return None
        x = dataclasses.replace(x, value=layers)

    def take(a: jax.Array, axis: int) -> jax.Array:
        numbers = dims._replace(offset_dims=tuple(range(a.ndim - 1)))  # a may have fewer axes
        own = {**p, "slice_sizes": (1, *a.shape[1:]), "dimension_numbers": numbers}
        if filled and not jnp.issubdtype(a.dtype, jnp.floating):
            own["fill_value"] = 0  # NaN, which the scale has there, is no integer
        return eqn.primitive.bind(a, index, **own)[None]

    view = cut(x, 0, Cut(1, take))
    return None if view is None else reshaped(view, x.shape[1:])


def first_layer(x: Param) -> Param:
    """The view of a leaf whose first axis has length one, as that of the leaf without it."""
    axes: Axes = tuple(tuple(a - 1 for a in group if a) for group in x.axes)
    slot = x.slot if x.slot is None or x.slot.ndim == 0 else _without(x.slot)
    value = _without(x.value)
    asks = x.trained and x.trained.at(0, _without)
    return dataclasses.replace(
        x, value=value, axes=axes, layers=x.layers + 1, slot=slot, trained=asks
    )


def _without(x: Any) -> Any:
    """An array, or a quantized one, without its first axis, of length one."""
    if not isinstance(x, QTensor):
        return None if x is None else lax.squeeze(x, (0,))
    own = {name: _without(getattr(x, name)) for name in ("qvalue", "scale", "zero_point", *BESIDE)}
    if len(x.block) == x.ndim:
        return dataclasses.replace(x, **own, block=x.block[1:])
    for name in LAYERED:
        a = getattr(x, name)
        own[name] = _without(a) if a is not None and a.ndim else a
    return dataclasses.replace(x, **own)
