"""How is an array quantized that is spread over a mesh? Shard by shard, where it lies.

A shard can be quantized alone if it holds whole blocks and its codes fill whole bytes. Then every
shard does its own work, nothing moves, and codes and scales lie where the array lay. Anything
else raises, rather than gather an array that may not fit one device."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from quantjax.blocks import Block, counts, sizes
from quantjax.formats import ExponentFormat, Format, is_learned
from quantjax.packing import packed_axis
from quantjax.qtensor import QTensor, is_qtensor
from quantjax.spec import Granularity, QuantSpec


class Placement(NamedTuple):
    """Where an array lies: the mesh, and per axis the mesh axes that cut it and in how many."""

    mesh: Any
    entries: tuple[Any, ...]
    shards: tuple[int, ...]


def placement(x: Any) -> Placement | None:
    """How x is sharded by name over a mesh; None if it is whole, or if that is not known here.

    Inside jit it is known on an Explicit mesh alone; on an Auto mesh the compiler decides.
    """
    if not isinstance(x, jax.Array):  # NumPy's, or a shape
        return None
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    if not isinstance(sharding, NamedSharding):
        return None
    entries = tuple(sharding.spec) + (None,) * (x.ndim - len(sharding.spec))
    shards = tuple(_count(sharding.mesh, entry) for entry in entries)
    return Placement(sharding.mesh, entries, shards) if max(shards, default=1) > 1 else None


def _count(mesh: Any, entry: Any) -> int:
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return math.prod(mesh.shape[name] for name in names if isinstance(name, str))


def check_whole(name: str, x: jax.Array, placed: Placement, spec: QuantSpec) -> None:
    """Raises ValueError, naming the leaf, unless each shard holds whole blocks and bytes."""
    above = spec.scale_spec
    if above is not None and isinstance(above.block, Granularity):
        above = above.with_block((None,) * len(spec.block_shape))
    scale = None if above is None else (above.format, above.block_shape)
    why = _obstacle(x.shape, placed, spec.format, spec.block_shape, scale)
    if why:
        raise ValueError(f"{name}: {why} Reshard the array so that this axis is whole.")


def stands_alone(q: QTensor, placed: Placement) -> bool:
    """Whether every shard of a quantized array, which may have been cut after it was quantized,
    is a quantized array by itself."""
    if isinstance(q.format, ExponentFormat):
        return False
    scale = None  # floats, or E8M0's one byte each, are cut as the blocks are
    if isinstance(q.scale, QTensor) and not isinstance(q.scale.format, ExponentFormat):
        scale = (q.scale.format, q.scale.block)
    axis = None if q.packed is None else q.packed[0]
    return not _obstacle(q.shape, placed, q.format, q.block, scale, axis)


def _obstacle(
    shape: tuple[int, ...],
    placed: Placement,
    format: Format,
    block: Block,
    scale: tuple[Format, Block] | None,
    packed: int | None = None,
) -> str:
    """Why a shard is no quantized array of its own; empty if it is. `scale`: format and block of
    scales that are quantized in turn; `packed`: the packed axis, where it is given."""
    bits, lead, size = format.bits, len(shape) - len(block), sizes(shape, block)
    local = _local(shape, placed)
    for axis, (n, b, shards) in enumerate(zip(local, size, placed.shards, strict=True)):
        if shards > 1 and (n % b or shape[axis] % shards):
            return (
                f"a block of {b} on axis {axis} does not fit in shards of {n} "
                f"({shape[axis]} over {shards} devices). Use a group that divides {n}."
            )
    if is_learned(format) and max(placed.shards[lead:]) > 1:
        return f"a learned codebook is shared by all of its {placed.shards} shards."
    if scale is not None:
        why = _obstacle(counts(shape, block), placed, *scale, None)
        if why:
            return f"a scale in {scale[0]} is shared by several shards: {why}"
    if bits < 8:
        if packed is None:
            packed = packed_axis(local, lead, bits, tuple(b > 1 for b in size))
        if placed.shards[packed] > 1 and local[packed] * bits % 8:
            return (
                f"{local[packed]} codes of {bits} bits on axis {packed % len(shape)} of a shard "
                f"do not fill whole bytes."
            )
    return ""


def _local(shape: tuple[int, ...], placed: Placement) -> tuple[int, ...]:
    return tuple(n // s for n, s in zip(shape, placed.shards, strict=True))


def over_shards(function: Callable[..., Any], placed: Placement, *args: Any, **static: Any) -> Any:
    """function(*args, **static), run on every shard by itself; the results lie as the arrays do.

    Arrays of the rank of the placed one are cut alike, arguments of length one along an axis
    excepted; a learned codebook has the leading axes alone. QTensors are cut as arrays are, with
    their packed lengths made local inside and global outside. `static` values must be hashable.
    """

    def moved(leaf: Any) -> Any:  # on an Explicit mesh nothing is cut or moved unasked
        sharding = NamedSharding(placed.mesh, _argument_spec(leaf, placed))
        if isinstance(placed.mesh, jax.sharding.AbstractMesh):
            return jax.sharding.reshard(leaf, sharding)
        return jax.device_put(leaf, sharding)

    leaves, structure = jax.tree.flatten(args)
    facts = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    program = _program(function, tuple(static.items()), placed, structure, facts)
    return _with_lengths(program(*jax.tree.map(moved, args)), placed, local=False)


@functools.lru_cache(maxsize=1024)
def _program(
    function: Callable[..., Any],
    static: tuple[tuple[str, Any], ...],
    placed: Placement,
    structure: Any,
    facts: tuple[jax.ShapeDtypeStruct, ...],
) -> Callable[..., Any]:
    """The compiled function over shards; cached, as jit knows a program by the function object."""

    def inside(*local_args: Any) -> Any:
        return function(*_with_lengths(local_args, placed, local=True), **dict(static))

    def local_struct(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        counts = (_count(placed.mesh, entry) for entry in _argument_spec(leaf, placed))
        shape = tuple(n // c for n, c in zip(leaf.shape, counts, strict=True))
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    args = jax.tree.unflatten(structure, facts)
    out = jax.eval_shape(inside, *jax.tree.map(local_struct, args))
    mapped = jax.shard_map(
        inside,
        mesh=placed.mesh,
        in_specs=jax.tree.map(lambda leaf: _argument_spec(leaf, placed), args),
        out_specs=jax.tree.map(lambda leaf: PartitionSpec(*_cut(leaf, placed)), out),
        check_vma=False,
    )
    return jax.jit(mapped)


def _cut(leaf: Any, placed: Placement) -> tuple[Any, ...]:
    """The mesh axes that cut each axis of a leaf."""
    rank = len(leaf.shape)
    entries = placed.entries if rank == len(placed.entries) else placed.entries[: max(rank - 1, 0)]
    return entries + (None,) * (rank - len(entries))


def _argument_spec(leaf: Any, placed: Placement) -> PartitionSpec:
    """The same for an argument, which may be broadcast along an axis."""
    entries = zip(leaf.shape, _cut(leaf, placed), strict=True)
    return PartitionSpec(*(None if n == 1 else entry for n, entry in entries))


def _with_lengths(tree: Any, placed: Placement, *, local: bool) -> Any:
    """The packed lengths of QTensors made those of a shard, or of the whole array again."""

    def one(leaf: Any) -> Any:
        if not is_qtensor(leaf) or leaf.packed is None:
            return leaf
        axis, length = leaf.packed
        shards = placed.shards[axis]
        packed = (axis, length // shards if local else length * shards)
        return dataclasses.replace(leaf, packed=packed)

    return jax.tree.map(one, tree, is_leaf=is_qtensor)
