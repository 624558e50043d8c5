"""Which 2^b levels fit these values best? Weighted k-means on the line.
Lloyd 1982, "Least squares quantization in PCM"; Han et al. 2016, arXiv:1510.00149."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

BINS, ITERATIONS = 16384, 300


def fit_levels(v: Float[Array, "*n"], weights: Float[Array, "*n"], bits: int) -> Float[Array, " k"]:
    """The ascending levels c that (locally) minimise sum w min_k (v - c_k)^2, v in [-1, 1].

    Lloyd's iteration on a histogram of 16384 bins that keeps each bin's true mean. It starts
    where the cumulated cube root of the density is cut in 2^bits equal parts, which is the
    optimum as the levels grow many (Panter and Dite 1951), so it ends near the best optimum.
    """
    k = 2**bits
    v, weights = v.reshape(-1), weights.reshape(-1)
    index = jnp.clip((v + 1) * np.float32(BINS / 2), 0, BINS - 1).astype(jnp.int32)
    mass = jnp.zeros(BINS, jnp.float32).at[index].add(weights)
    moment = jnp.zeros(BINS, jnp.float32).at[index].add(weights * v)
    centres = (jnp.arange(BINS, dtype=jnp.float32) + 0.5) * np.float32(2 / BINS) - 1
    mean = jnp.where(mass > 0, moment / jnp.where(mass > 0, mass, 1), centres)

    # A coarse density, or single counts would make the cube root flat; never empty, so that the
    # cumulated curve is strictly rising.
    coarse = jnp.repeat(mass.reshape(-1, BINS // 256).sum(1), BINS // 256)
    curve = jnp.cumsum(jnp.cbrt(coarse) + np.float32(1e-6) * jnp.cbrt(coarse.max()))
    start = centres[jnp.searchsorted(curve, (jnp.arange(k) + 0.5) / k * curve[-1])]

    def step(_: Array, levels: Float[Array, " k"]) -> Float[Array, " k"]:
        nearest = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, mean)
        total = jnp.zeros(k, jnp.float32).at[nearest].add(mass)
        sums = jnp.zeros(k, jnp.float32).at[nearest].add(moment)
        return jnp.where(total > 0, sums / jnp.where(total > 0, total, 1), levels)

    return lax.fori_loop(0, ITERATIONS, step, start)
