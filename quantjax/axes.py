"""Which axes of a parameter are summed over, and so may share a scale?

Known from the sites, the products of a traced model; else decided by its name. Without a trace
the name is all there is. `kernel`, `w` (Flax, Haiku): the last axis is the output. `weight`
(Equinox, PyTorch): the first is. `embedding(s)`: a row is an entry. The choice is reported as
assumed where the name or the shape does not settle it."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from quantjax.blocks import Block
from quantjax.spec import Granularity, QuantSpec

LAST = frozenset({"kernel", "w"})
FIRST = frozenset({"weight", "embedding", "embeddings"})
WINDOW = 11  # the widest convolution window that a kernel of rank 4 or 5 is taken to have


def _convolution_shaped(shape: tuple[int, ...]) -> bool:
    """Rank 4 or 5 with small window axes in front; rank 3 might as well be attention or layers."""
    return len(shape) in (4, 5) and max(shape[:-2]) <= WINDOW


def resolve_block(name: str, shape: tuple[int, ...], spec: QuantSpec) -> tuple[Block, str]:
    """The block shape of one parameter and a remark, empty if nothing was assumed.

    A group of g counts the weights of one output: it fills the input axis first, then the
    convolution window from its last axis; what it leaves of an axis is a shorter last block.
    Raises ValueError, naming the parameter, where the block does not fit its rank.
    """
    if spec.stacked >= len(shape):
        raise ValueError(
            f"{name}: stacked={spec.stacked} leaves no axis of shape {shape} to quantize."
        )
    shape = shape[spec.stacked :]
    rank = len(shape)
    if not isinstance(spec.block, Granularity):
        if len(spec.block) != rank:
            raise ValueError(
                f"{name}: block {spec.block} does not fit shape {shape}: "
                f"rank {len(spec.block)} != {rank}."
            )
        return spec.block, ""
    if spec.block is Granularity.ROW:
        raise ValueError(f"{name}: Granularity.ROW is for activations, not for parameters.")
    if spec.block is Granularity.TENSOR:
        return (None,) * rank, ""
    if rank == 1:
        return (spec.group,), ""

    last_part = name.rsplit("/", 1)[-1]
    output = 0 if last_part in FIRST else rank - 1
    remark = ""
    if last_part not in LAST | FIRST:
        remark = f"axes assumed: output is the last axis of {shape}, by no known name"
    elif rank > 2 and last_part in LAST and not _convolution_shaped(shape):
        remark = f"axes assumed: output is the last axis of {shape}; mark layers with stacked="
    # Inputs first, then the window from its last axis: [H, W, I, O] and [O, I, H, W] agree.
    inner = range(rank - 2, -1, -1) if output else (1, *range(rank - 1, 1, -1))
    return _along(shape, inner, spec.group), remark


def _along(shape: tuple[int, ...], inner: Iterable[int], group: int | None) -> Block:
    """One scale for all of the axes `inner`, or for so many elements of them, in that order."""
    block: list[int | None] = [1] * len(shape)
    left = group or 0
    for axis in inner:
        share = min(shape[axis], left)
        block[axis] = share if group else None
        left //= max(share, 1)
    return tuple(block)


def block_of_sites(
    name: str, shape: tuple[int, ...], spec: QuantSpec, sites: Sequence[Any]
) -> QuantSpec:
    """The spec with the block and the layers that the uses of a parameter ask for.

    A scale covers what a product sums over; a table that is only read has one a row. Axes that a
    scan takes off are layers. Raises ValueError, naming the parameter, where two products sum
    over different axes, or where the spec and the scans disagree on the layers.
    """
    layers = {site.layers for site in sites}
    if len(layers) > 1 or (spec.stacked and spec.stacked not in layers):
        raise ValueError(
            f"{name}: scans take {sorted(layers)} leading axes off, the spec has "
            f"stacked={spec.stacked}."
        )
    spec = dataclasses.replace(spec, stacked=layers.pop())
    if spec.block is not Granularity.CHANNEL:
        return spec.with_block(resolve_block(name, shape, spec)[0])
    shape = shape[spec.stacked :]
    products = [site for site in sites if site.contracting]
    if len({frozenset(site.contracting) for site in products}) > 1:
        uses = ", ".join(f"{site.module or site.primitive} {site.contracting}" for site in products)
        raise ValueError(
            f"{name}: products sum over different axes of {shape}: {uses}. Give its block as a "
            f"shape, or keep it in float."
        )
    if products:
        first, *rest = products[0].contracting
        if products[0].primitive == "conv_general_dilated":  # the input, then the window
            inner = [first, *reversed(rest)]
        else:
            inner = [*reversed(rest), first]
    else:
        shared = {axis for site in sites for axis in site.batch}
        inner = [axis for axis in reversed(range(len(shape))) if axis not in shared]
    return spec.with_block(_along(shape, inner, spec.group))
