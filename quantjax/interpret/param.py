"""How does a parameter travel through a traced model? With its path, seen through transposes.

A model rarely multiplies a parameter as it lies: it transposes, reshapes or casts it first. Those
views are kept beside the stored array, so that it stays quantized up to the product."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.blocks import spread
from quantjax.fake_quantized import FakeQuantized
from quantjax.interpret.trained import Trained, trained
from quantjax.qtensor import QTensor
from quantjax.transform import dequantize

Axes = tuple[tuple[int, ...], ...]
BESIDE = ("input_scale", "left", "right")  # the children that have the axes of the array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Param:
    """A leaf of the first argument and the view of it that the model holds.

    value: the leaf as stored. path: its key path. axes: for every axis of the view the axes of
    the leaf that are merged in it, in order; an axis of length one may have none. casts: the
    dtypes it was converted to, in turn. layers: how many leading axes scans have taken off.
    slot: while activations are observed, where the statistics of its layers are kept, an integer
    for each; scans take their axes off here too. trained: what a FakeQuantized asks of products;
    its `value` here is the rounded array.
    """

    value: jax.Array | QTensor
    path: str = dataclasses.field(metadata=dict(static=True))
    axes: Axes = dataclasses.field(metadata=dict(static=True))
    casts: tuple[np.dtype, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    layers: int = dataclasses.field(default=0, metadata=dict(static=True))
    slot: jax.Array | None = None
    trained: Trained | None = None

    @property
    def quantized(self) -> bool:
        """Whether the leaf is a QTensor."""
        return isinstance(self.value, QTensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the view."""
        return tuple(math.prod(self.value.shape[a] for a in group) for group in self.axes)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the view."""
        return self.casts[-1] if self.casts else np.dtype(self.value.dtype)

    def array(self) -> jax.Array:
        """The view as a float array."""
        x = dequantize(self.value)
        order = [a for group in self.axes for a in group]
        # Axes of length one may have been dropped; they lie anywhere.
        order += [a for a in range(x.ndim) if a not in order]
        x = x if order == list(range(x.ndim)) else jnp.transpose(x, order)
        x = x if x.shape == self.shape else jnp.reshape(x, self.shape)
        for dtype in self.casts:
            x = x.astype(dtype)
        return x


def param(
    value: jax.Array | QTensor | FakeQuantized | tuple[jax.Array, Trained],
    path: str,
    slot: jax.Array | None = None,
) -> Param:
    """A leaf as it lies; with what it asks of products, if its array is given as it is."""
    asks = None
    if isinstance(value, FakeQuantized):
        value = trained(value)
    if isinstance(value, tuple):
        value, asks = value
    return Param(value, path, tuple((a,) for a in range(value.ndim)), slot=slot, trained=asks)


def transposed(x: Param, permutation: Sequence[int]) -> Param:
    """The view after `lax.transpose`."""
    return dataclasses.replace(x, axes=tuple(x.axes[a] for a in permutation))


def reshaped(x: Param, shape: Sequence[int]) -> Param | None:
    """The view after `lax.reshape` where axes are merged, split again or of length one; None
    where an axis of the leaf would be cut."""
    singles = [a for group in x.axes for a in group]
    lengths = [x.value.shape[a] for a in singles]
    axes, at = [], 0
    for n in shape:
        group, have = [], 1
        if n == 1 and lengths[at : at + 1] == [1]:
            group.append(singles[at])
            at += 1
        while have < n and at < len(singles):
            if lengths[at] != 1:  # an axis of length one that is not asked for is dropped
                group.append(singles[at])
                have *= lengths[at]
            at += 1
        if have != n:
            return None
        axes.append(tuple(group))
    if any(n != 1 for n in lengths[at:]):
        return None
    return dataclasses.replace(x, axes=tuple(axes))


def cast(x: Param, dtype: np.dtype) -> Param:
    """The view after a conversion; one between equal dtypes is none."""
    dtype = np.dtype(dtype)
    return x if dtype == x.dtype else dataclasses.replace(x, casts=(*x.casts, dtype))


def as_qtensor(x: Param) -> QTensor | None:
    """The view as a QTensor of its own; None where axes were merged, a cast came on a cast, or
    codes are packed along an axis of length one that the view lacks."""
    q = x.value
    if not isinstance(q, QTensor) or len(x.casts) > 1 or any(len(g) > 1 for g in x.axes):
        return None
    order = [group[0] if group else None for group in x.axes]
    moved = q if order == list(range(q.ndim)) else _moved(q, order)
    return None if moved is None else dataclasses.replace(moved, dtype=x.dtype)


def _moved(q: QTensor, order: list[int | None]) -> QTensor | None:
    """The axes of a QTensor in another order, those of its children and static facts with them.
    None stands for a new axis of length one; axes that are not named have that length and go."""
    block, packed, scale = (1,) * (q.ndim - len(q.block)) + q.block, q.packed, q.scale
    layered = q.codebook is not None or (q.act_scale is not None and q.act_scale.ndim > 0)
    if layered and len(q.block) < q.ndim:
        return None  # there is one for each of the leading axes, which come first
    if packed is not None:
        if packed[0] % q.ndim not in order:
            return None
        packed = (order.index(packed[0] % q.ndim) - len(order), packed[1])
    if isinstance(scale, QTensor):
        scale = _moved(scale, order)
        if scale is None:
            return None
    elif scale is not None:
        scale = _reordered(scale, order)
    return dataclasses.replace(
        beside_codes(q, lambda a: _reordered(a, [*order, *range(q.ndim, a.ndim)])),
        qvalue=_reordered(q.qvalue, order),
        scale=scale,
        zero_point=None if q.zero_point is None else _reordered(q.zero_point, order),
        block=tuple(1 if a is None else block[a] for a in order),
        packed=packed,
    )


def beside_codes(
    q: QTensor, change: Callable[[jax.Array], jax.Array], axis: int | None = None
) -> QTensor:
    """q with what stands beside its codes changed; under `axis`, what varies along that axis."""
    own: dict[str, Any] = {}
    for name in BESIDE:
        a = getattr(q, name)
        if a is not None and (axis is None or a.shape[axis] == q.shape[axis]):
            own[name] = change(a)
    return dataclasses.replace(q, **own)


def _reordered(x: jax.Array, order: list[int | None]) -> jax.Array:
    kept = [a for a in order if a is not None]
    gone = [a for a in range(x.ndim) if a not in kept]
    x = jnp.transpose(x, [*gone, *kept])
    lengths = iter(x.shape[len(gone) :])
    return x.reshape([1 if a is None else next(lengths) for a in order])


def stack(x: Param) -> jax.Array | QTensor | tuple[jax.Array, Trained] | None:
    """The leaf with a leading axis on every array, for a scan over it; None if the leading axis
    of the view is not that of the leaf."""
    if x.axes[0] != (0,):
        return None
    if not isinstance(x.value, QTensor):
        return x.value if x.trained is None else (x.value, x.trained.stacked(x.value.shape[0]))
    q = x.value
    if q.packed is not None and q.packed[0] == -q.ndim:
        return None
    if len(q.block) < q.ndim:
        return q
    # The block spans the layers: give each its own copy of the scales, and the rest of the block.
    whole = (q.block[0], *(1,) * (q.ndim - 1))

    def each(a: jax.Array) -> jax.Array:
        return jnp.broadcast_to(spread(a, q.shape, whole), (q.shape[0], *a.shape[1:]))

    if isinstance(q.scale, QTensor) or q.scale is None:
        return None
    zero = None if q.zero_point is None else each(q.zero_point)
    codebook = q.codebook
    if codebook is not None:
        codebook = jnp.broadcast_to(codebook, (q.shape[0], *codebook.shape))
    scales = [
        None if a is None else jnp.broadcast_to(a, (q.shape[0], *a.shape))
        for a in (q.act_scale, q.act_zero_point, q.act_thresholds)
    ]
    return dataclasses.replace(
        beside_codes(q, lambda a: jnp.broadcast_to(a, (q.shape[0], *a.shape[1:]))),
        scale=each(q.scale),
        zero_point=zero,
        codebook=codebook,
        act_scale=scales[0],
        act_zero_point=scales[1],
        act_thresholds=scales[2],
        block=q.block[1:],
    )


def stack_slot(x: Param) -> jax.Array | None:
    """The slots with a leading axis, for a scan over the leaf."""
    if x.slot is None or x.slot.ndim:
        return x.slot
    return jnp.broadcast_to(x.slot, x.value.shape[:1])


def layer(
    x: Param,
    value: jax.Array | QTensor | tuple[jax.Array, Trained],
    slot: jax.Array | None = None,
) -> Param:
    """What one step of a scan over `stack(x)` and `stack_slot(x)` sees of it."""
    value, asks = value if isinstance(value, tuple) else (value, None)
    axes = tuple(tuple(a - 1 for a in group) for group in x.axes[1:])
    return dataclasses.replace(
        x, value=value, axes=axes, layers=x.layers + 1, slot=slot, trained=asks
    )
