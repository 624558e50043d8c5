"""Which of the two neighbouring levels does a value take?"""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt8

# 1.5 * 2^23: floats from 2^23 to 2^24 are the integers, so the low bits of a sum count up from 0.
MAGIC = np.float32(1.5 * 2**23)


class Rounding(enum.Enum):
    """NEAREST: the closer level, ties to the even code. STOCHASTIC: the upper level with the
    probability of the fraction, so that the mean over keys is the value; needs an explicit key.
    """

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


def noise(rounding: Rounding, key: jax.Array | None, shape: tuple[int, ...], *, name: str = ""):
    """Uniform noise in [0, 1) for stochastic rounding, None for nearest.

    Raises ValueError, with the name of what is rounded, if stochastic rounding has no key.
    """
    if rounding is Rounding.NEAREST:
        return None
    if key is None:
        where = f"{name}: " if name else ""
        raise ValueError(f"{where}stochastic rounding needs a key: key=jax.random.key(seed).")
    sample: Float[Array, "*n"] = jax.random.uniform(key, shape, jnp.float32)
    return sample


def low_byte(codes: Float[Array, "*n"], dtype: DTypeLike) -> Int8[Array, "*n"] | UInt8[Array, "*n"]:
    """float32 integers that fit `dtype`, int8 or uint8, in that type, by the bits of a sum.

    XLA's own cast also saturates and tests for NaN, which on CPU costs more than the rest of
    quantizing.

    >>> low_byte(jnp.array([-3.0, 0.0, 127.0]), jnp.int8).tolist()
    [-3, 0, 127]
    """
    return lax.bitcast_convert_type(codes + MAGIC, jnp.int32).astype(dtype)
