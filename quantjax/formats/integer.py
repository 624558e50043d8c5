"""Integers of 1 to 8 bits: which levels does a code stand for?
Jacob et al. 2018, "Quantization and Training of Neural Networks", arXiv:1712.05877."""

import dataclasses
import enum
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer


class Levels(enum.Enum):
    """Which levels an integer format of b bits has, in units of the step.

    FULL: -2^(b-1) ... 2^(b-1)-1, the range of the machine integer (unsigned: 0 ... 2^b-1).
    NARROW: the same without the lowest, so that the grid is symmetric and holds zero.
    HALF: the odd integers over two, -2^(b-1)+1/2 ... 2^(b-1)-1/2: symmetric, every code used,
    no zero. At 2 bits this is worth 40 to 60 % of the squared error of a normal sample.
    """

    FULL = "full"
    NARROW = "narrow"
    HALF = "half"


def check_bits(name: str, bits: object, low: int, high: int) -> None:
    """Raises ValueError unless `bits` is an integer from low to high."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not low <= bits <= high:
        raise ValueError(f"{name}: bits must be an integer from {low} to {high}, got {bits!r}.")


@dataclasses.dataclass(frozen=True)
class IntFormat:
    """Integers of `bits` bits: level = code (HALF: code + 1/2).

    Unsigned codes are always full. Raises ValueError for bits outside 1..8, and for combinations
    without a grid: unsigned half levels, one narrow bit.

    >>> IntFormat(4).grid.min(), IntFormat(2, levels=Levels.HALF).grid.tolist()
    (np.float32(-7.0), [-1.5, -0.5, 0.5, 1.5])
    """

    bits: int
    signed: bool = True
    levels: Levels = Levels.NARROW

    def __post_init__(self) -> None:
        check_bits("IntFormat", self.bits, 1, 8)
        if not isinstance(self.levels, Levels):
            raise ValueError(f"IntFormat: levels must be one of {list(Levels)}, got {self.levels}.")
        if not self.signed and self.levels is Levels.HALF:
            raise ValueError("IntFormat: half-integer levels are symmetric, so they need signed.")
        if not self.signed:  # there is no lowest level to leave out, so equal grids are equal
            object.__setattr__(self, "levels", Levels.FULL)
        if self.bits == 1 and self.levels is Levels.NARROW:
            raise ValueError("IntFormat: one narrow bit has the single level 0; use levels=HALF.")

    @property
    def qmin(self) -> int:
        """The lowest code."""
        if not self.signed:
            return 0
        return -(2 ** (self.bits - 1)) + (self.levels is Levels.NARROW)

    @property
    def qmax(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - self.signed) - 1

    @property
    def _offset(self) -> float:
        return 0.5 if self.levels is Levels.HALF else 0.0

    @property
    def lowest(self) -> float:
        """The lowest level."""
        return self.qmin + self._offset

    @property
    def highest(self) -> float:
        """The highest level."""
        return self.qmax + self._offset

    @property
    def max_level(self) -> float:
        """The level that the largest magnitude of a block is scaled to, without clipping."""
        return self.highest or float(-self.qmin)

    @property
    def has_zero(self) -> bool:
        """Whether zero is on the grid."""
        return self.levels is not Levels.HALF

    @property
    def code_dtype(self) -> np.dtype:
        """int8 for signed codes, uint8 for unsigned ones."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    @cached_property
    def grid(self) -> np.ndarray:
        """All levels, ascending, float32."""
        return np.arange(self.qmin, self.qmax + 1, dtype=np.float32) + np.float32(self._offset)

    def __str__(self) -> str:
        if (self.bits, self.levels) == (1, Levels.HALF):
            return "binary"
        if (self.bits, self.signed, self.levels) == (2, True, Levels.NARROW):
            return "ternary"
        if not self.signed:
            return f"uint{self.bits}"
        suffix = {Levels.FULL: "f", Levels.NARROW: "", Levels.HALF: "h"}[self.levels]
        return f"int{self.bits}{suffix}"

    def encode(
        self,
        v: Float[Array, "*n"],
        noise: Float[Array, "*n"] | None = None,
        zero_point: Float[Array, "*z"] | None = None,
    ) -> Float[Array, "*n"]:
        """Codes of `v = x / scale`, as float32: clip(round(v + z), qmin, qmax).

        z need not be an integer (HQQ); where it is, this is round(v) + z. `noise` in [0, 1) makes
        the rounding stochastic: floor(v + noise). HALF levels take the cell that holds v, so 0
        goes to +1/2.
        """
        if noise is not None or zero_point is not None:
            # Clip between the product that made v and the sum: XLA may contract x * inv + noise
            # into one fused multiply-add in one program and not in another.
            bound = np.float32(2 * 2**self.bits)
            v = jnp.clip(v, -bound, bound)
        if zero_point is not None:
            v = v + (zero_point - jnp.round(zero_point))
        if self.levels is Levels.HALF:
            codes = jnp.floor(v if noise is None else (v - np.float32(0.5)) + noise)
        else:
            codes = jnp.round(v) if noise is None else jnp.floor(v + noise)
        if zero_point is not None:
            codes = codes + jnp.round(zero_point)
        return jnp.clip(codes, np.float32(self.qmin), np.float32(self.qmax))

    def decode(self, codes: Integer[Array, "*n"] | Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The level of each code, float32."""
        codes = codes.astype(jnp.float32)
        return codes + np.float32(0.5) if self.levels is Levels.HALF else codes

    def clips(
        self, v: Float[Array, "*n"], zero_point: Float[Array, "*z"] | None = None
    ) -> jax.Array:
        """Where `v = x / scale` is outside every cell of the grid, so rounding alone won't do."""
        if zero_point is not None:
            v = v + (zero_point - jnp.round(zero_point))
        codes = jnp.floor(v) if self.levels is Levels.HALF else jnp.round(v)
        if zero_point is not None:
            codes = codes + jnp.round(zero_point)
        return (codes < self.qmin) | (codes > self.qmax)
