"""Products in low precision, each with the lowering that is fast on its platform."""

from quantjax.ops.dot import fake_rows, fits_integers, integer_dot
from quantjax.ops.u8s8 import u8s8_dot

__all__ = ["fake_rows", "fits_integers", "integer_dot", "u8s8_dot"]
