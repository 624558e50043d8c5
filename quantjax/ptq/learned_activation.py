"""How is an activation rounded while a block learns? By a learned step, and not everywhere.

Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, equations 1 to 3; Wei et
al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", 2022,
arXiv:2203.05740, equation 6."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import Scales
from quantjax.formats import Format, IntFormat
from quantjax.ops import fake_activation
from quantjax.scales import inverse
from quantjax.spec import QuantSpec


def learned_step(
    x: Float[Array, "*x"],
    scale: Float[Array, ""],
    zero_point: Float[Array, ""] | None,
    format: Format,
) -> Float[Array, "*x"]:
    """The level of x / s (code minus zero point) times s, to a rounding error what is stored.

    Gradient, with v = x / s: for x 1 inside the grid, 0 where x is clipped; for s level(v) - v
    inside, the outermost level where x is clipped.
    """
    v = x.astype(jnp.float32) * inverse(scale)
    if isinstance(format, IntFormat):
        zero = None if zero_point is None else zero_point.astype(jnp.float32)
        level, clipped = format.decode(format.encode(v, None, zero)), format.clips(v, zero)
        level = level if zero is None else level - zero
    else:
        level, clipped = format.decode(format.encode(v, None)), format.clips(v)
    level = jax.lax.stop_gradient(level)
    through = v + jax.lax.stop_gradient(level - v)
    return (jnp.where(clipped, level, through) * scale).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LearnedActivation:
    """The rule of a product's activation: static scales are learned, and each element stays as it
    is with probability `drop`, where there is a key."""

    drop: float = 0.0

    def __call__(
        self,
        x: Float[Array, "*x"],
        given: Scales | None,
        spec: QuantSpec,
        summed: Sequence[int],
        key: jax.Array | None,
    ) -> Float[Array, "*x"]:
        """x as the product sees it."""
        if given is None:
            rounded = fake_activation(x, spec, None, summed)
        else:
            scale = jnp.asarray(given.scale)
            rounded = learned_step(x, scale, given.zero_point, spec.format)
        if key is None or self.drop == 0:
            return rounded
        kept = jax.random.uniform(key, x.shape, jnp.float32) < np.float32(self.drop)
        return jnp.where(kept, x, rounded)
