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
    """A quantized array: value = (level(qvalue) - zero_point) * scale, cast to `dtype` last.

    qvalue: codes. int8 for signed 8-bit integers, uint8 otherwise, packed below 8 bits. A signed
    code q below 8 bits is stored as q + 2^(bits-1).
    scale: the step, in units of the array: float, of the array's rank, one per block; or itself
    a QTensor (NVFP4, double quantization); or None for 1.
    zero_point: the code of zero, per block, or None.
    codebook: the levels of a learned codebook, (*leading axes, 2^bits), or None.
    act_scale, act_zero_point: of the activation that meets this array, where they are static:
    found by `calibrate`, one for each entry of the leading axes.

    Static: format; block, counted from the last axis (see `quantjax.blocks`); packed, the axis
    (negative) along which codes are packed with its logical length, or None; dtype of the
    dequantized array; act, how the activation that meets this array is quantized, or None.
    The shape follows from the children, so a leading axis can be added or removed (scan, vmap,
    `jax.tree.map(lambda a: a[0], q)`) and the rest stays true.
    """

    qvalue: jax.Array
    scale: Union[jax.Array, "QTensor", None]
    zero_point: jax.Array | None = None
    codebook: jax.Array | None = None
    act_scale: jax.Array | None = None
    act_zero_point: jax.Array | None = None
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
        """Bytes of codes, scales, zero points and codebook together."""
        return sum(
            math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self)
        )

    @property
    def bits_per_weight(self) -> float:
        """8 * nbytes / size: scales count."""
        return 8 * self.nbytes / max(self.size, 1)

    def __repr__(self) -> str:
        block = "x".join("all" if b is None else str(b) for b in self.block)
        # JAX prints trees whose leaves are placeholders, such as the axes of vmap.
        shape = self.shape if hasattr(self.qvalue, "shape") else "?"
        return f"QTensor({self.format}, shape={shape}, block={block}, dtype={self.dtype})"


def is_qtensor(x: object) -> bool:
    """Whether x is a QTensor; the `is_leaf` of every walk over a quantized tree."""
    return isinstance(x, QTensor)
