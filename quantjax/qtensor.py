"""What does a quantized array look like? Codes, scales and the static facts to read them."""

import dataclasses
import math
from typing import TYPE_CHECKING, Union

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.blocks import Block
from quantjax.formats import ExponentFormat, Format

if TYPE_CHECKING:
    from quantjax.policy import QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized array: value = D + L with D = (level(qvalue) - zero_point) * scale * input_scale
    and L = left @ right, cast to `dtype` last. Most have neither input_scale nor left and right.

    qvalue: codes. int8 for signed 8-bit integers, uint8 otherwise, packed below 8 bits. A signed
    code q below 8 bits is stored as q + 2^(bits-1).
    scale: the step, in units of the array: float, of the array's rank, one per block; or itself
    a QTensor (NVFP4, double quantization); or None for 1.
    zero_point: the code of zero, per block, or None.
    codebook: the levels of a learned codebook, (*leading axes, 2^bits), or None.
    act_scale, act_zero_point: of the activation that meets this array, where they are static:
    found by `calibrate`, one for each entry of the leading axes.
    act_thresholds: where the codes of that activation change, (*leading axes, codes - 1),
    ascending, if not half way between levels: the code of x is the number of them below it
    (`qat.n2uq` learns them), or None.
    input_scale: t of the array's rank, of length one along every axis but those that a product
    sums over and the leading ones. A product multiplies its activation by t before it rounds it,
    and then is the product of the codes: AWQ and SmoothQuant, where t can not be folded.
    left, right: two factors of the array's rank and one axis more, the rank r, at the end. `left`
    has length one along the outputs, `right` along the axes summed over, and
    L = sum_r left[..., r] * right[..., r]; a product is x @ D + (x @ left) @ right, and its second
    term takes x as it is, neither scaled nor rounded.

    Static: format; block, counted from the last axis (see `quantjax.blocks`); packed, the axis
    (negative) along which codes are packed with its logical length, or None; dtype of the
    dequantized array; act, how the activation that meets this array is quantized, or None.
    The shape follows from the children, so a leading axis can be added or removed (scan, vmap,
    `jax.tree.map(lambda a: a[0], q)`) and the rest stays true.

    What stands beside the codes are children here, and not a leaf type around a QTensor, as then
    there is one leaf type for every walk over a tree, for files, summaries and shardings; and they
    have the array's own axes, with length one where they do not vary, so that what moves, cuts or
    stacks the array's axes does the same to theirs and needs no list of which axes are inputs.
    """

    qvalue: jax.Array
    scale: Union[jax.Array, "QTensor", None]
    zero_point: jax.Array | None = None
    codebook: jax.Array | None = None
    act_scale: jax.Array | None = None
    act_zero_point: jax.Array | None = None
    act_thresholds: jax.Array | None = None
    input_scale: jax.Array | None = None
    left: jax.Array | None = None
    right: jax.Array | None = None
    format: Format | ExponentFormat = dataclasses.field(metadata=dict(static=True), kw_only=True)
    block: Block = dataclasses.field(metadata=dict(static=True), kw_only=True)
    packed: tuple[int, int] | None = dataclasses.field(
        default=None, metadata=dict(static=True), kw_only=True
    )
    dtype: np.dtype = dataclasses.field(
        default=np.dtype(np.float32), metadata=dict(static=True), kw_only=True
    )
    act: "QuantSpec | None" = dataclasses.field(
        default=None, metadata=dict(static=True), kw_only=True
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""
        shape = list(self.qvalue.shape)
        if self.packed is not None:
            axis, length = self.packed
            shape[axis] = length
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The rank of the array it stands for."""
        return len(self.qvalue.shape)

    @property
    def size(self) -> int:
        """The number of elements it stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all children together: codes, scales, low-rank factors and the rest."""
        return sum(
            math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self)
        )

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / size: scales count, and so do low-rank factors."""
        return 8 * self.nbytes / max(self.size, 1)

    @property
    def rank(self) -> int:
        """The rank of the low-rank term; 0 without one."""
        return 0 if self.left is None else self.left.shape[-1]

    @property
    def is_bare(self) -> bool:
        """Whether codes and their scales are all there is: no input scale, no low-rank term."""
        return self.input_scale is None and self.left is None

    @property
    def bare(self) -> "QTensor":
        """The same without input scale and low-rank term."""
        return dataclasses.replace(self, input_scale=None, left=None, right=None)

    def __repr__(self) -> str:
        block = "x".join("all" if b is None else str(b) for b in self.block)
        # JAX prints trees whose leaves are placeholders, such as the axes of vmap.
        shape = self.shape if hasattr(self.qvalue, "shape") else "?"
        more = "" if self.input_scale is None else ", input scale"
        if self.left is not None:
            more += f", rank={self.rank}" if hasattr(self.left, "shape") else ", low rank"
        return f"QTensor({self.format}, shape={shape}, block={block}, dtype={self.dtype}{more})"


def is_qtensor(x: object) -> bool:
    """Whether x is a QTensor; the `is_leaf` of every walk over a quantized tree."""
    return isinstance(x, QTensor)
