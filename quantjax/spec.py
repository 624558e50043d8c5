"""How is one array quantized? Format, granularity, range, rounding and scale storage."""

import dataclasses
import enum
import functools

from quantjax.blocks import Block
from quantjax.formats import ExponentFormat, Format, IntFormat, is_learned
from quantjax.observers import Observer, absmax
from quantjax.rounding import Rounding


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)


class Granularity(enum.Enum):
    """CHANNEL: one scale per output channel. TENSOR: one per array. ROW: one per row of an
    activation that enters a dot, one per example of a convolution."""

    CHANNEL = "channel"
    TENSOR = "tensor"
    ROW = "row"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Everything that fixes how an array is quantized; a hashable value.

    format: the grid. block: which elements share a scale, either a `Granularity`, resolved from
    the parameter's axes, or a block shape counted from the last axis (`quantjax.blocks`).
    group: so many weights of one output share a scale, instead of all of them. symmetric: no zero
    point. observer: the range. rounding: nearest, or stochastic, which takes a `key`.
    scale_format: how scales are stored: None for float32, `ExponentFormat` (MX), a format with
    one float32 scale per array above it (NVFP4), or a QuantSpec (double quantization).
    act: the same for the activation that meets this weight, or None to leave it float; its block
    TENSOR means one scale, anything else one a row. static: of an activation, that its scale is
    not found anew in each call but by `calibrate`, one for the tensor. stacked: how many leading
    axes are layers, kept apart.

    Raises ValueError where the parts do not fit together.

    >>> QuantSpec(format=IntFormat(4), group=64)
    QuantSpec(int4, group=64)
    """

    format: Format
    block: Block | Granularity = Granularity.CHANNEL
    group: int | None = None
    symmetric: bool = True
    observer: Observer = absmax()
    rounding: Rounding = Rounding.NEAREST
    scale_format: "Format | ExponentFormat | QuantSpec | None" = None
    act: "QuantSpec | None" = None
    static: bool = False
    stacked: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format) or isinstance(self.format, ExponentFormat):
            raise ValueError(
                f"QuantSpec: format must be an IntFormat, FloatFormat or Codebook, got "
                f"{self.format!r}."
            )
        if not isinstance(self.block, Granularity):
            sizes = self.block
            bad = not isinstance(sizes, tuple) or any(
                b is not None and (not isinstance(b, int) or b < 1) for b in sizes
            )
            if bad:
                raise ValueError(
                    f"QuantSpec: block must be a Granularity or a tuple of positive sizes and "
                    f"None (the whole axis), got {sizes!r}."
                )
            if self.group is not None:
                raise ValueError("QuantSpec: give either block or group, not both.")
        if self.group is not None and (not _is_count(self.group) or self.group < 1):
            raise ValueError(f"QuantSpec: group must be a positive integer, got {self.group!r}.")
        if self.group is not None and self.block is not Granularity.CHANNEL:
            raise ValueError(f"QuantSpec: give either group or block={self.block}, not both.")
        self._check_kinds()
        if not isinstance(self.observer, Observer) or isinstance(self.observer, type):
            raise ValueError(
                f"QuantSpec: observer must be a value such as absmax() or percentile(99.9), got "
                f"{self.observer!r}."
            )
        if not self.symmetric:
            if not isinstance(self.format, IntFormat) or not self.format.has_zero:
                raise ValueError(
                    f"QuantSpec: a zero point needs integer levels with zero, not {self.format}."
                )
            if self.scale_format is not None:
                raise ValueError("QuantSpec: a quantized scale needs a symmetric grid.")
        if is_learned(self.format) and (self.scale_format is not None or self.observer != absmax()):
            raise ValueError("QuantSpec: a learned codebook fits absmax() and float scales.")

    def _check_kinds(self) -> None:
        if not isinstance(self.rounding, Rounding) or not isinstance(self.symmetric, bool):
            raise ValueError(
                f"QuantSpec: rounding must be a Rounding and symmetric a bool, got "
                f"{self.rounding!r} and {self.symmetric!r}."
            )
        if self.act is not None and not isinstance(self.act, QuantSpec):
            raise ValueError(f"QuantSpec: act must be a QuantSpec or None, got {self.act!r}.")
        if not isinstance(self.static, bool) or (
            self.static and self.block is not Granularity.TENSOR
        ):
            raise ValueError(
                f"QuantSpec: static must be a bool, and True asks for block=Granularity.TENSOR, as "
                f"rows to come are not known; got {self.static!r} and {self.block}."
            )
        if not _is_count(self.stacked) or self.stacked < 0:
            raise ValueError(
                f"QuantSpec: stacked must be a number of axes, 0 or more, got {self.stacked!r}."
            )
        above = self.scale_format
        if isinstance(above, QuantSpec) and (
            above.group is not None or above.rounding is not Rounding.NEAREST
        ):
            raise ValueError(
                "QuantSpec: scales are rounded to nearest, in a block given as a shape; a group "
                f"or stochastic rounding is not for them, got {above!r}."
            )

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - specs are few, small values
    def with_block(self, block: Block) -> "QuantSpec":
        """The same with an explicit block, for one array. Cached, as checking a spec anew takes a
        good part of the time of quantizing a small leaf."""
        return dataclasses.replace(self, block=block, group=None, static=False)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - as above
    def of_weights(self) -> "QuantSpec":
        """The same without activations, on which nothing depends that is found of a weight: what is
        compiled for one spec then serves others."""
        return dataclasses.replace(self, act=None)

    @property
    def block_shape(self) -> Block:
        """The block as a shape. Raises ValueError where it still depends on the parameter."""
        if isinstance(self.block, Granularity) or self.group is not None:
            raise ValueError(f"{self!r}: not resolved for a parameter; see Policy.resolve.")
        return self.block

    @property
    def scale_spec(self) -> "QuantSpec | None":
        """How the scales themselves are quantized, or None where they are not, or are E8M0."""
        if self.scale_format is None or isinstance(self.scale_format, ExponentFormat):
            return None
        if isinstance(self.scale_format, QuantSpec):
            return self.scale_format
        return QuantSpec(format=self.scale_format, block=Granularity.TENSOR)

    def __repr__(self) -> str:
        parts = [str(self.format)]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "format" and value != field.default:
                shown = value.name if isinstance(value, enum.Enum) else value
                parts.append(f"{field.name}={shown}")
        return f"QuantSpec({', '.join(parts)})"
