"""What is said of one leaf, of all leaves together, and of bad scales."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One leaf. None stands for what is not known, as values behind a ShapeDtypeStruct.

    shape: of the array it stands for; None for a leaf that is no array. format: of the codes, or
    the dtype of a leaf that is not quantized. scale: how scales are stored; act: the format of
    the activation that meets this weight. input_scale: whether there is one; rank: of the low-rank
    term, 0 without one. block: the block shape, counted from the last axis;
    granularity: the same in words. dtype: of the (dequantized) array. bytes: codes, scales and
    whatever else the leaf holds. sqnr_db: 10 log10(sum x^2 / sum (x - xhat)^2), infinite where both
    are equal. nan_blocks, infinite_blocks, zero_blocks: how many blocks have such a scale. matched:
    the pattern or preset that decided. note: why it is not quantized, or what was assumed.
    """

    path: str
    shape: tuple[int, ...] | None = None
    format: str = ""
    scale: str = ""
    act: str = ""
    input_scale: bool = False
    rank: int = 0
    block: tuple[int | None, ...] | None = None
    granularity: str = ""
    dtype: str = ""
    quantized: bool = False
    bytes: int = 0
    float_bytes: int = 0
    sqnr_db: float | None = None
    nan_blocks: int | None = None
    infinite_blocks: int | None = None
    zero_blocks: int | None = None
    matched: str = ""
    note: str = ""

    @property
    def size(self) -> int:
        """The number of elements; 0 for a leaf that is no array."""
        return 0 if self.shape is None else math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float | None:
        """8 * bytes / size: scales count. None where there are no elements."""
        return 8 * self.bytes / self.size if self.size else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all leaves.

    parameters: elements of all arrays. float_bytes: bytes if nothing were quantized. kept_bytes:
    bytes in leaves that are not quantized.
    """

    leaves: int
    quantized_leaves: int
    parameters: int
    bytes: int
    float_bytes: int
    kept_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller than the float tree; 1 for an empty one."""
        return self.float_bytes / self.bytes if self.bytes else 1.0

    @property
    def bits_per_weight(self) -> float | None:
        """Mean over all elements, scales and float leaves counted; None without elements."""
        return 8 * self.bytes / self.parameters if self.parameters else None


def totals(rows: Sequence[Row]) -> Totals:
    """Sums over the rows."""
    return Totals(
        leaves=len(rows),
        quantized_leaves=sum(row.quantized for row in rows),
        parameters=sum(row.size for row in rows),
        bytes=sum(row.bytes for row in rows),
        float_bytes=sum(row.float_bytes for row in rows),
        kept_bytes=sum(row.bytes for row in rows if not row.quantized),
    )


def warnings(rows: Sequence[Row]) -> tuple[str, ...]:
    """One line per leaf and kind of bad scale: NaN, infinite, zero."""
    kinds = (
        ("NaN", "nan_blocks", "reads as NaN"),
        ("infinite", "infinite_blocks", "reads as infinity or NaN"),
        ("zero", "zero_blocks", "reads as 0"),
    )
    lines = []
    for kind, field, effect in kinds:
        for row in rows:
            if n := getattr(row, field):
                blocks = "1 block" if n == 1 else f"{n:,} blocks"
                lines.append(f"{kind} scale in {blocks}: {row.path} ({effect})")
    return tuple(lines)
