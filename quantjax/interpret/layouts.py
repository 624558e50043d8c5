"""How does a layout that a model asks of a parameter reach its codes and scales?

Codes lie as the array would. Scales lie so too where every shard has whole blocks, else each
device holds all of them: they are few. Packed codes are cut between bytes, or not at all."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from quantjax.blocks import sizes
from quantjax.interpret.param import BESIDE, Param
from quantjax.interpret.parts import LAYERED
from quantjax.qtensor import QTensor

Entry = Any  # one axis of a PartitionSpec: a mesh axis, several, None, or UNCONSTRAINED
Put = Callable[[jax.Array, NamedSharding], jax.Array]


def laid_out(x: Param, sharding: Any, put: Put) -> Param | None:
    """The view with every array of it put where `sharding` puts the view; None where that cuts a
    byte, a merged axis, or an axis that the leaf lacks, or is no sharding by names."""
    if not isinstance(sharding, NamedSharding):
        return None
    spec = (*sharding.spec, *(None,) * (len(x.axes) - len(sharding.spec)))
    entries: list[Entry] = [None] * x.value.ndim
    for group, entry in zip(x.axes, spec, strict=True):
        if entry is PartitionSpec.UNCONSTRAINED:
            for axis in group:
                entries[axis] = entry
        elif entry is not None:  # the first of merged axes varies slowest: shards are runs of it
            if not group or x.value.shape[group[0]] % _shards(sharding, entry):
                return None
            entries[group[0]] = entry
    value = _put(x.value, entries, sharding, put)
    return None if value is None else dataclasses.replace(x, value=value)


def _shards(sharding: NamedSharding, entry: Entry) -> int:
    names = entry if isinstance(entry, tuple) else (entry,)
    named = (name for name in names if isinstance(name, str))  # None and UNCONSTRAINED cut nothing
    return math.prod(sharding.mesh.shape[name] for name in named)


def _put(x: Any, entries: Sequence[Entry], sharding: NamedSharding, put: Put) -> Any:
    def place(a: Any, own: Sequence[Entry]) -> Any:
        spec = PartitionSpec(*own, *(None,) * (a.ndim - len(own)))
        return put(a, NamedSharding(sharding.mesh, spec))

    if not isinstance(x, QTensor):
        return place(x, entries)
    counts = [_shards(sharding, entry) for entry in entries]
    if x.packed is not None:
        axis, length = x.packed
        if counts[axis] > 1 and (
            length % counts[axis] or length // counts[axis] * x.format.bits % 8
        ):
            return None
    block = sizes(x.shape, x.block)
    whole = [n % (c * b) == 0 for n, c, b in zip(x.shape, counts, block, strict=True)]
    shared = [e if ok else None for e, ok in zip(entries, whole, strict=True)]
    scale = x.scale
    if scale is not None:
        scale = _put(scale, shared, sharding, put)
        if scale is None:
            scale = _put(x.scale, [None] * x.ndim, sharding, put)
    own = {"qvalue": place(x.qvalue, entries), "scale": scale}
    if x.zero_point is not None:
        own["zero_point"] = place(x.zero_point, shared)
    for name in BESIDE:
        a = getattr(x, name)
        cut = zip(entries, () if a is None else a.shape, strict=False)
        own[name] = None if a is None else place(a, [None if n == 1 else e for e, n in cut])
    layers = x.ndim - len(x.block)
    for name in LAYERED:
        a = getattr(x, name)
        own[name] = None if a is None else place(a, entries[: min(layers, a.ndim)])
    return dataclasses.replace(x, **own)
