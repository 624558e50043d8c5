"""What is the q-quantile of every block? Found bit by bit, as XLA sorts one element at a time.

The k-th smallest of a set is the largest number that at most k of its elements are below. Floats
are in the order of their bits (of negative ones, in reverse), so 32 counts find all 32 bits. On a
CPU that takes a tenth of a sort; nothing but counts crosses devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

_TOP = np.uint32(2**31)


def _ordered(x: Float[Array, "*n"]) -> jax.Array:
    """uint32 in the order of the floats."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >= _TOP, ~bits, bits | _TOP)


def _float(ordered: jax.Array) -> jax.Array:
    bits = jnp.where(ordered >= _TOP, ordered ^ _TOP, ~ordered)
    return lax.bitcast_convert_type(bits, jnp.float32)


def quantile(
    x: Float[Array, "*n"],
    q: float,
    axes: tuple[int, ...],
    valid: Bool[Array, "*n"] | None = None,
) -> Float[Array, "*b"]:
    """The q-quantile over `axes`, interpolated linearly as NumPy does: with n elements, between
    the k-th and the next smallest for k = floor(q (n - 1)). Elements that are not `valid` are
    left out; where none is left the result means nothing.

    >>> x = jnp.array([[1.0, 2.0, 4.0], [3.0, 3.0, -3.0]])
    >>> jax.jit(quantile, static_argnums=(1, 2))(x, 0.75, (1,)).tolist()
    [3.0, 3.0]
    """
    values = _ordered(x.astype(jnp.float32))
    if valid is not None:
        values = jnp.where(valid, values, np.uint32(2**32 - 1))  # above all, and not counted in n

    def count(where: jax.Array) -> jax.Array:
        return jnp.sum(where, axes, keepdims=True, dtype=jnp.int32)

    k, fraction = _position(q, x, axes, valid)

    def bit(i: jax.Array, found: jax.Array) -> jax.Array:
        higher = found | (_TOP >> i.astype(jnp.uint32))
        return jnp.where(count(values < higher) <= k, higher, found)

    # Begun from the data, so that under shard_map the loop's state varies over the mesh as they do.
    found = lax.fori_loop(0, 32, bit, jnp.min(values, axes, keepdims=True) & np.uint32(0))
    above = jnp.where(values > found, values, np.uint32(2**32 - 1))
    after = jnp.where(count(values <= found) >= k + 2, found, jnp.min(above, axes, keepdims=True))
    low, high = _float(found), _float(after)
    # No neighbour above the last one: it would be what stands for elements left out.
    between = jnp.where(fraction > 0, low * (1 - fraction) + high * fraction, low)
    return jnp.squeeze(between, axes)


def _position(q: float, x: jax.Array, axes: tuple[int, ...], valid: jax.Array | None):
    """k and what is beyond it of q (n - 1), in every block."""
    if valid is None:
        last = math.prod(x.shape[a] for a in axes) - 1
        k = math.floor(q * last)
        return np.int32(k), np.float32(q * last - k)
    lasts = jnp.sum(valid, axes, keepdims=True, dtype=jnp.int32) - 1
    place = np.float32(q) * lasts.astype(jnp.float32)
    whole = jnp.floor(place)
    return whole.astype(jnp.int32), place - whole
