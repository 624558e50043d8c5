"""What values can a few-bit code stand for? Integer, floating-point and codebook grids.

A format is a frozen, hashable value. It knows its codes, the level each code stands for, and
how to go from one to the other; it knows nothing of scales, blocks or shapes."""

from quantjax.formats.codebook import Codebook, apot, make_nf4
from quantjax.formats.floating import ExponentFormat, FloatFormat, ScaleRule, Specials
from quantjax.formats.integer import IntFormat, Levels

Format = IntFormat | FloatFormat | Codebook


def is_learned(format: object) -> bool:
    """Whether the levels are learned, and so lie with the array instead of in the format."""
    return isinstance(format, Codebook) and format.learned_bits is not None


int8 = IntFormat(8)
int4 = IntFormat(4)
ternary = IntFormat(2, levels=Levels.NARROW)
binary = IntFormat(1, levels=Levels.HALF)
e4m3 = FloatFormat(4, 3, Specials.NAN)
e5m2 = FloatFormat(5, 2, Specials.IEEE)
e3m2 = FloatFormat(3, 2)
e2m3 = FloatFormat(2, 3)
e2m1 = FloatFormat(2, 1)
e8m0 = ExponentFormat()
nf4 = make_nf4()

__all__ = [
    "Codebook",
    "ExponentFormat",
    "FloatFormat",
    "Format",
    "IntFormat",
    "Levels",
    "ScaleRule",
    "Specials",
    "apot",
    "binary",
    "e2m1",
    "e2m3",
    "e3m2",
    "e4m3",
    "e5m2",
    "e8m0",
    "int4",
    "int8",
    "is_learned",
    "nf4",
    "ternary",
]
