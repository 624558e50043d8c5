"""Which levels does a grid have? Bounds that arrive at run time, for many bit widths in a program.
Jacob et al. 2018, arXiv:1712.05877, equation 1; Bengio et al. 2013, arXiv:1308.3432 (the
straight-through estimator)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.scales import inverse


@jax.custom_vjp
def fake_quantize_levels(
    x: Float[Array, "*n"], scale: jax.Array, qmin: jax.Array, qmax: jax.Array
) -> Float[Array, "*n"]:
    """clip(round(x / s), qmin, qmax) * s with traced bounds: vmap it over bit widths.

    `scale`, `qmin` and `qmax` broadcast against x. Bounds that end in one half give the
    half-integer levels: clip(floor(x / s) + 1/2, qmin, qmax) * s. Gradient as in
    `affine.fake_quantize_array`: passed inside the cells, cut where x is clipped and for the bounds
    and the scale.

    >>> x = jnp.array([-2.0, 0.2, 0.6])
    >>> fake_quantize_levels(x, jnp.float32(0.5), jnp.float32(-1), jnp.float32(1)).tolist()
    [-0.5, 0.0, 0.5]
    """
    return _levels(x, scale, qmin, qmax)[0]


def _levels(x, scale, qmin, qmax):
    scale, qmin, qmax = (jnp.asarray(a, jnp.float32) for a in (scale, qmin, qmax))
    half = qmin != jnp.floor(qmin)
    v = jnp.clip(x.astype(jnp.float32) * inverse(scale), -np.float32(512), np.float32(512))
    level = jnp.where(half, jnp.floor(v) + np.float32(0.5), jnp.round(v))
    clipped = jnp.clip(level, qmin, qmax)
    clipped = jnp.where(clipped == 0, np.float32(0), clipped)  # no -0: codes are integers
    return (clipped * scale).astype(x.dtype), level != clipped


def _levels_forward(x, scale, qmin, qmax):
    y, clips = _levels(x, scale, qmin, qmax)
    return y, (clips, scale, qmin, qmax)


def _levels_backward(residuals, gradient):
    clips, *rest = residuals
    zeros = jax.tree.map(jnp.zeros_like, rest)
    return jnp.where(clips, jnp.zeros((), gradient.dtype), gradient), *zeros


fake_quantize_levels.defvjp(_levels_forward, _levels_backward)
