"""How do few images show more? Moved by some pixels and mirrored, otherwise at every step.
He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, section 4.2."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

PAD = 4  # pixels


def crop_and_flip(key: Array, images: UInt8[Array, "n h w c"]) -> UInt8[Array, "n h w c"]:
    """Each image, padded by four black pixels on all sides, is cut back to its size at a place of
    its own, 9 x 9 of them equally likely, and mirrored in half of the cases.

    Pixels are copied as they are, so it comes before the normalization.

    >>> images = jnp.full((2, 8, 8, 1), 7, jnp.uint8)
    >>> sorted(set(crop_and_flip(jax.random.key(0), images).ravel().tolist()))
    [0, 7]
    """
    n, h, w, _ = images.shape
    places, mirrors = jax.random.split(key)
    down, right = jax.random.randint(places, (2, n), 0, 2 * PAD + 1)
    mirrored = jax.random.bernoulli(mirrors, shape=(n, 1))
    rows = down[:, None] + jnp.arange(h)
    columns = right[:, None] + jnp.where(mirrored, jnp.arange(w)[::-1], jnp.arange(w))
    padded = jnp.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    return padded[jnp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
