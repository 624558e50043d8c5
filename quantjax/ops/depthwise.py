"""The convolution of each channel by itself: sums of shifted images, without a product to speak of.

Each output sums as many terms as the window has elements, so patches and matrices are all overhead.
XLA makes one loop of this, 8 to 16 times faster on CPU than its own depthwise convolution."""

import itertools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8, Int32, UInt8

from quantjax.ops.patches import Window, seen


def depthwise(
    x: Int8[Array, "N *S C"] | UInt8[Array, "N *S C"], w: Int8[Array, "*K 1 O"], window: Window
) -> Int32[Array, "N *T O"]:
    """The convolution of a padded input, channels last, in C groups of one channel: exact."""
    x = lax.optimization_barrier(x)  # else what makes x is fused, and done for each element of w
    axes, channels = range(1, x.ndim - 1), x.shape[-1]
    w = w.reshape(*window.size, channels, -1).astype(jnp.int32)
    shape = (x.shape[0], *window.places(x.shape[1:-1]))
    y = jnp.zeros((*shape, channels, w.shape[-1]), jnp.int32)
    if 0 in y.shape:
        return y.reshape(*shape, w.shape[-1] * channels)
    for place in itertools.product(*map(range, window.size)):
        y += seen(x, place, axes, window).astype(np.int32)[..., None] * w[place]
    return y.reshape(*shape, -1)
