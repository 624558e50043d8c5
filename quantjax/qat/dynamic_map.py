"""Which levels suit the state of an optimizer, whose values span seven orders of magnitude?
Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022, arXiv:2110.02861, section
1.3 (the dynamic tree of signs, exponents and fractions) and 2.2 (its unsigned variant); Li et al.,
"Memory Efficient Optimizers with 4-bit States", 2023, arXiv:2309.01507, section 4.1 (the linear
map without zero)."""

import functools

import numpy as np

from quantjax.formats import Codebook
from quantjax.formats.integer import check_bits


@functools.cache
def dynamic_map(bits: int, *, signed: bool = True) -> Codebook:
    """2^bits levels in [-1, 1], or [0, 1]: an exponent of base ten in unary, then a fraction.

    Below the sign, E zeros and a one say 10^-E, and the f bits that are left the place k among 2^f
    equal parts of [0.1, 1]: level = 10^-E * (0.1 + 0.9 * (k + 1/2) / 2^f). Signed, E = 0 ... bits-2
    and f = bits - 2 - E, with both signs, and the two codes of zeros alone are 0 and 1. Unsigned,
    the sign's bit is one more of the fraction. Raises ValueError for bits outside 3..8.

    >>> [round(v, 4) for v in dynamic_map(4).grid.tolist() if v > 0]
    [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
    >>> len(dynamic_map(8).grid), len(dynamic_map(8, signed=False).grid)
    (256, 256)
    """
    check_bits("dynamic_map", bits, 3, 8)
    positive = [1.0]
    for exponent in range(bits - 1):
        parts = 2 ** (bits - 1 - signed - exponent)
        middle = 0.1 + 0.9 * (np.arange(parts) + 0.5) / parts
        positive += (10.0**-exponent * middle).tolist()
    negative = [-v for v in positive if v != 1.0] if signed else []
    return Codebook(tuple(sorted([*negative, 0.0, *positive])), _name("dynamic", bits, signed))


@functools.cache
def linear_map(bits: int) -> Codebook:
    """Equal steps that leave out zero: level_i = (i + 1) / 2^bits.

    A second moment that came out as zero would divide its first moment by nothing: the least level
    is 1 / 2^bits of the largest. Raises ValueError for bits outside 2..8.

    >>> linear_map(2).grid.tolist()
    [0.25, 0.5, 0.75, 1.0]
    """
    check_bits("linear_map", bits, 2, 8)
    levels = (np.arange(2**bits) + 1) / 2**bits
    return Codebook(tuple(levels.tolist()), _name("linear", bits, signed=False))


def _name(kind: str, bits: int, signed: bool) -> str:
    return f"{kind}{bits}" if signed else f"u{kind}{bits}"
