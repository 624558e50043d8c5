"""From the range of a block to its scale and zero point, safely.
Jacob et al. 2018, arXiv:1712.05877, section 2; OCP Microscaling Formats v1.0, section 6.3."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.formats import ExponentFormat, Format, IntFormat

# Scales stay where they and their inverses are normal float32: no overflow, no flush to zero.
TINY, HUGE = np.float32(2.0**-126), np.float32(2.0**126)


def inverse(scale: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """S = 1 / scale, the article's factor; 0 where a quantized scale vanished.

    Codes are round(x * S), not round(x / scale): XLA rewrites divisions (by constants, of
    quotients) in one program and not in another, and never a product, so this is what is equal
    bit for bit eager, jitted and on every backend. The barrier hides the division from such
    rewriting. It stands last, as XLA would repeat what follows it for every element.
    """
    return lax.optimization_barrier(
        np.float32(1) / jnp.where(scale == 0, np.float32(np.inf), scale)
    )


def scale_of_range(
    low: Float[Array, "*b"],
    high: Float[Array, "*b"],
    format: Format,
    *,
    symmetric: bool = True,
    scale_format: object = None,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"] | None]:
    """The scale (and zero point, if asymmetric) that maps [low, high] onto the format's grid.

    symmetric: s = max(|low|, |high|) / max_level. An unsigned grid looks at `high` alone.
    asymmetric: s = (high - low) / (qmax - qmin) over the range widened to hold 0, and
    z = qmin - round(low / s), so that zero is a code.
    A block of zeros (below 2^-126) gets scale 1, or 0 where the scale itself is quantized
    (another block's 1 would swamp it); on a grid without zero 2^-126, the nearest to zero there
    is. A block with NaN or infinity gets a NaN scale.
    """
    zero_point = None
    if symmetric:
        unsigned = isinstance(format, IntFormat) and not format.signed
        amax = jnp.maximum(high, 0) if unsigned else jnp.maximum(jnp.abs(low), jnp.abs(high))
        if isinstance(scale_format, ExponentFormat):
            scale = scale_format.scale(amax, format)
        else:
            # A product with a constant: XLA would turn the quotient into one only under jit.
            scale = amax * np.float32(1.0 / format.max_level)
    else:
        if not isinstance(format, IntFormat) or not format.has_zero:
            raise ValueError(
                f"asymmetric quantization needs integer levels with zero, not {format}."
            )
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        amax = jnp.maximum(high, -low)
        # Halves, as the difference of two large numbers overflows; a product with 1/2 is exact.
        half = high * np.float32(0.5) - low * np.float32(0.5)
        scale = half * np.float32(2.0 / (format.qmax - format.qmin))
    nested = scale_format is not None and not isinstance(scale_format, ExponentFormat)
    empty = 0.0 if nested else 1.0 if getattr(format, "has_zero", True) else TINY
    scale = jnp.clip(scale, TINY, HUGE)
    scale = jnp.where(amax < TINY, np.float32(empty), scale)
    finite = jnp.isfinite(low) & jnp.isfinite(high)  # an unsigned grid's amax misses -infinity
    scale = jnp.where(finite, scale, np.float32(np.nan))
    if not symmetric and isinstance(format, IntFormat):
        shift = jnp.round(low * inverse(scale))
        shift = jnp.clip(shift, np.float32(format.qmin - format.qmax), 0)
        zero_point = np.float32(format.qmin) - shift
    return scale, zero_point
