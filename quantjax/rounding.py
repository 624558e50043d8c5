"""Which of the two neighbouring levels does a value take?"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Rounding(enum.Enum):
    """NEAREST: the closer level, ties to the even code. STOCHASTIC: the upper level with the
    probability of the fraction, so that the mean over keys is the value; needs an explicit key.
    """

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


def noise(rounding: Rounding, key: jax.Array | None, shape: tuple[int, ...]):
    """Uniform noise in [0, 1) for stochastic rounding, None for nearest.

    Raises ValueError if stochastic rounding has no key.
    """
    if rounding is Rounding.NEAREST:
        return None
    if key is None:
        raise ValueError("Rounding.STOCHASTIC needs a key: pass key=jax.random.key(seed).")
    sample: Float[Array, "*n"] = jax.random.uniform(key, shape, jnp.float32)
    return sample
