"""Floating point of 8 bits or fewer, and the power-of-two scale of the MX formats.
Micikevicius et al. 2022, arXiv:2209.05433 (e4m3, e5m2); OCP Microscaling Formats v1.0."""

import dataclasses
import enum
import math
from functools import cached_property
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Integer

from quantjax.formats.integer import check_bits


class Specials(enum.Enum):
    """Codes a float format spends on something else than a finite number.

    NONE: all codes are finite. NAN: the largest magnitude is NaN (e4m3). IEEE: the largest
    exponent is infinity and NaN (e5m2). Quantizing saturates: none of them is ever produced.
    """

    NONE = "none"
    NAN = "nan"
    IEEE = "ieee"


def _power_of_two(exponent: Integer[Array, "*n"]) -> Float[Array, "*n"]:
    """2^e by exponent bits, for -126 <= e <= 127; exp2 is not exact on every backend."""
    return lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def _exponent(x: Float[Array, "*n"]) -> Integer[Array, "*n"]:
    """floor(log2 |x|) by exponent bits; -127 for zero and subnormal numbers."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return ((bits >> 23) & 0xFF) - 127


@dataclasses.dataclass(frozen=True)
class FloatFormat:
    """Floating point of 1 + exponent + mantissa bits, bias 2^(exponent-1) - 1, with subnormals.

    Code: sign, exponent, mantissa, from the high bit down, as the hardware stores it. Rounding
    is to nearest, ties to even, and saturates. Raises ValueError above 8 bits in all.

    >>> FloatFormat(4, 3, Specials.NAN).max_level, FloatFormat(2, 1).grid.tolist()
    (448.0, [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    """

    exponent: int
    mantissa: int
    specials: Specials = Specials.NONE

    def __post_init__(self) -> None:
        check_bits("FloatFormat: exponent", self.exponent, 1, 6)
        check_bits("FloatFormat: mantissa", self.mantissa, 0, 6)
        check_bits("FloatFormat: 1 + exponent + mantissa", self.bits, 2, 8)
        if self._max_code < 1:
            raise ValueError(f"FloatFormat: no finite number but zero is left: {self!r}.")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def _bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def _max_code(self) -> int:
        codes = 2 ** (self.exponent + self.mantissa)
        reserved = {Specials.NONE: 0, Specials.NAN: 1, Specials.IEEE: 2**self.mantissa}
        return codes - 1 - reserved[self.specials]

    def _level(self, code: int) -> float:
        field, fraction = divmod(code, 2**self.mantissa)
        significand = fraction + (2**self.mantissa if field else 0)
        return significand * 2.0 ** (max(field, 1) - self._bias - self.mantissa)

    @property
    def max_level(self) -> float:
        """The largest finite number."""
        return self._level(self._max_code)

    @property
    def lowest(self) -> float:
        """The lowest finite number."""
        return -self.max_level

    has_zero = True
    code_dtype = np.dtype(np.uint8)

    @cached_property
    def grid(self) -> np.ndarray:
        """All finite levels, ascending, float32."""
        half = [self._level(c) for c in range(self._max_code + 1)]
        return np.array([-v for v in half[:0:-1]] + half, np.float32)

    def __str__(self) -> str:
        return f"e{self.exponent}m{self.mantissa}"

    def encode(
        self,
        v: Float[Array, "*n"],
        noise: Float[Array, "*n"] | None = None,
    ) -> Float[Array, "*n"]:
        """Codes of `v = x / scale`, as float32; `noise` in [0, 1) rounds stochastically."""
        magnitude = jnp.minimum(jnp.abs(v), np.float32(self.max_level))
        lowest = 1 - self._bias
        exponent = jnp.maximum(_exponent(magnitude), lowest)
        # An exact product: the step is a power of two. The codes of a magnitude are in order,
        # so a carry out of the significand lands on the next exponent's first code by itself.
        steps = magnitude * _power_of_two(self.mantissa - exponent)
        steps = jnp.round(steps) if noise is None else jnp.floor(steps + noise)
        code = (exponent - lowest).astype(jnp.float32) * np.float32(2**self.mantissa) + steps
        code = jnp.minimum(code, np.float32(self._max_code))
        sign = lax.bitcast_convert_type(v, jnp.int32) < 0
        return jnp.where(sign, code + np.float32(2 ** (self.bits - 1)), code)

    def decode(self, codes: Integer[Array, "*n"] | Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The number of each code, float32."""
        codes = codes.astype(jnp.int32)
        magnitude = codes & (2 ** (self.bits - 1) - 1)
        field, fraction = magnitude >> self.mantissa, magnitude & (2**self.mantissa - 1)
        significand = jnp.where(field > 0, fraction + 2**self.mantissa, fraction)
        exponent = jnp.maximum(field, 1) - (self._bias + self.mantissa)
        level = significand.astype(jnp.float32) * _power_of_two(exponent)
        return jnp.where(codes >= 2 ** (self.bits - 1), -level, level)

    def clips(self, v: Float[Array, "*n"]) -> jax.Array:
        """Where |v| is above the last cell: the largest number plus half its step."""
        # The step at the top is half the gap's power of two below; both ends are exact.
        top = self.max_level + (self.max_level - self._level(self._max_code - 1)) / 2
        return jnp.abs(v) > np.float32(top)


@runtime_checkable
class HasMaxLevel(Protocol):
    """What a scale rule asks of an element format."""

    @property
    def max_level(self) -> float: ...  # noqa: D102


class ScaleRule(enum.Enum):
    """How the magnitude of a block becomes a power-of-two scale (E8M0).

    With m the largest magnitude, and the element format's largest number M = 2^emax * f:
    FLOOR: 2^(floor(log2 m) - emax), as the OCP specification has it; may clip.
    CEIL: 2^ceil(log2(m / M)); never clips.
    EVEN: as FLOOR, on m rounded to the mantissa of the element.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    EVEN = "even"


@dataclasses.dataclass(frozen=True)
class ExponentFormat:
    """E8M0, the scale of the MX formats: code e stands for 2^(e - 127); 255 is NaN.

    Codes run from 1: 2^-127 is a subnormal float32, which some backends flush to zero.

    >>> ExponentFormat().decode(jnp.array([126, 127, 130], jnp.uint8)).tolist()
    [0.5, 1.0, 8.0]
    """

    rule: ScaleRule = ScaleRule.FLOOR

    bits = 8
    code_dtype = np.dtype(np.uint8)

    def __str__(self) -> str:
        return "e8m0"

    def scale(self, amax: Float[Array, "*b"], element: "HasMaxLevel"):
        """The power-of-two scale of blocks of magnitude `amax`, under the rule."""
        exponent_max = math.floor(math.log2(element.max_level))
        if self.rule is ScaleRule.CEIL:
            # log2(m / M) without a division: compare significands, which are exact.
            top = np.float32(element.max_level / 2.0**exponent_max)
            exponent = _exponent(amax)
            significand = amax * _power_of_two(jnp.clip(-exponent, -126, 127))
            exponent = exponent - exponent_max + (significand > top)
        else:
            if self.rule is ScaleRule.EVEN:
                mantissa = element.mantissa if isinstance(element, FloatFormat) else 0
                bits = lax.bitcast_convert_type(amax, jnp.int32) + (1 << (22 - mantissa))
                amax = lax.bitcast_convert_type(bits, jnp.float32)
            exponent = _exponent(amax) - exponent_max
        return _power_of_two(jnp.clip(exponent, -126, 126))

    def encode(self, scale: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The exponent byte of a power of two, as float32."""
        code = (_exponent(scale) + 127).astype(jnp.float32)
        return jnp.where(jnp.isnan(scale), np.float32(255), code)

    def decode(self, codes: Integer[Array, "*b"]) -> Float[Array, "*b"]:
        """2^(code - 127), NaN for 255."""
        codes = codes.astype(jnp.int32)
        scale = _power_of_two(jnp.clip(codes, 1, 254) - 127)
        return jnp.where(codes == 255, np.float32(np.nan), scale)
