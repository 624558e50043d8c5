"""Which axes of a parameter are summed over, and so may share a scale? Decided by its name.

Without a trace of the model the name is all there is. `kernel`, `w` (Flax, Haiku): the last axis
is the output. `weight` (Equinox, PyTorch): the first is. `embedding(s)`: a row is an entry. The
choice is reported as assumed where the name or the shape does not settle it."""

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
    if spec.group is None:
        return tuple(1 if axis == output else None for axis in range(rank)), remark
    # Inputs first, then the window from its last axis: [H, W, I, O] and [O, I, H, W] agree.
    inner = range(rank - 2, -1, -1) if output else (1, *range(rank - 1, 1, -1))
    block, left = [1] * rank, spec.group
    for axis in inner:
        block[axis] = min(shape[axis], left)
        left //= block[axis]
    return tuple(block), remark
