"""How does a matrix product compute a convolution? As the product of patches with the kernel.

Chellapilla, Puri, Simard, "High Performance Convolutional Neural Networks for Document
Processing", 2006; here in blocks that stay in the cache, and without a copy for every row of the
window where its rows are long."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8, Int32, UInt8

from quantjax.ops.integer import integer_dot_general

# The least length of a sum that is worth a product of its own. A window whose rows are at least as
# long gives one product for each of its rows, added up, on patches that are smaller by its height:
# at 3x3 and 64 channels 1.1 to 1.5 times faster, at 16 channels 1.4 times slower. It cuts the
# kernel too, which costs more where places are fewer than outputs.
ROW = 128


class Window(NamedTuple):
    """How a window moves over an input that is already padded, by spatial axis."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]

    def places(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """How many it has along each axis of an input of this spatial shape."""
        reach = [(k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True)]
        steps = zip(shape, reach, self.strides, strict=True)
        return tuple(
            max(0, (n - r) // s + 1) if isinstance(n, int) else (n - r) // s + 1
            for n, r, s in steps  # not numbers: symbols of jax.export
        )


def convolve(
    x: Int8[Array, "N *S C"] | UInt8[Array, "N *S C"],
    w: Int8[Array, "*K C O"],
    *,
    window: Window,
    limit: int | None,
) -> Int32[Array, "N *T O"]:
    """The convolution of a padded input, channels last, by exact products of matrices.

    A few examples at a time, or a few rows of one, so that the patches take up to `limit` bytes.
    The last block overlaps the one before it if they do not divide: what is computed twice is
    equal.
    """
    places = window.places(x.shape[1:-1])
    shape = (x.shape[0], *places, w.shape[-1])
    if 0 in shape or 0 in w.shape:
        return jnp.zeros(shape, jnp.int32)
    piece = functools.partial(_piece, window=window)
    if limit is None or math.prod(window.size) == 1:  # the latter is a product, without copies
        return piece(x, w)
    if is_known(shape):
        row = math.prod(places[1:]) * math.prod(w.shape[:-1])
        examples = min(shape[0], max(1, limit // (row * places[0])))
        rows = places[0] if examples > 1 else min(places[0], max(1, limit // row))
        examples, rows = _even(shape[0], examples), _even(places[0], rows)
    else:
        examples, rows = 1, places[0]
    counts = (-(-shape[0] // examples), -(-places[0] // rows))
    if (examples, rows) == shape[:2]:
        return piece(x, w)
    stride = window.strides[0]
    rest = [0] * (x.ndim - 2)
    height = (rows - 1) * stride + (window.size[0] - 1) * window.dilation[0] + 1

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        example = jnp.minimum(i // counts[1] * examples, shape[0] - examples)
        first = jnp.minimum(i % counts[1] * rows, places[0] - rows)
        start: list[Any] = [example, first * stride, *rest]
        block = lax.dynamic_slice(x, start, (examples, height, *x.shape[2:]))
        return lax.dynamic_update_slice(y, piece(block, w), [example, first, *rest])

    return lax.fori_loop(0, math.prod(counts), step, jnp.zeros(shape, jnp.int32))


def output_sums(w: Int8[Array, "*w"], numbers: lax.ConvDimensionNumbers) -> Int32[Array, " O"]:
    """The sum of the weights of each output: a product with ones, as XLA sums int8 up to ten times
    slower."""
    o = numbers.rhs_spec[0]
    w = lax.transpose(w, (*(a for a in range(w.ndim) if a != o), o)).reshape(-1, w.shape[o])
    ones = jnp.ones((1, w.shape[0]), jnp.int8)
    return integer_dot_general(ones, w, (((1,), (0,)), ((), ())))[0]


def is_known(shape: Sequence[Any]) -> bool:
    """Whether lengths are numbers, not symbols of jax.export."""
    return all(isinstance(n, int) for n in shape)


def _even(n: int, most: int) -> int:
    """The size of the fewest blocks of at most `most`, all as equal as can be."""
    return -(-n // -(-n // most))


def _piece(x: jax.Array, w: jax.Array, *, window: Window) -> jax.Array:
    *size, c, o = w.shape
    tiles = window.strides == window.size and set(window.dilation) == {1}
    places = window.places(x.shape[1:-1])
    long = len(size) > 1 and math.prod(size[1:]) * c >= ROW
    many = not is_known(x.shape) or x.shape[0] * math.prod(places) >= o
    apart = 1 if long and many and not tiles else 0  # axes that are not in a patch
    # Fused with what makes x, the slices would make it again for each element of the window.
    x = lax.optimization_barrier(x)
    x = _tiles(x, window) if tiles else _patches(x, window, apart)
    w = w.reshape(*size[:apart], -1, o)
    total: Any = 0
    for place in itertools.product(*map(range, size[:apart])):
        part = seen(x, place, range(1, 1 + apart), window)
        rows = part.reshape(-1, part.shape[-1])
        total += integer_dot_general(rows, w[place], (((1,), (0,)), ((), ())))
    return total.reshape(x.shape[0], *places, o)


def _tiles(x: jax.Array, window: Window) -> jax.Array:
    """The patches of a window that meets each element once: an order of what there is."""
    places = window.places(x.shape[1:-1])
    whole = [p * k for p, k in zip(places, window.size, strict=True)]
    x = lax.slice(x, [0] * x.ndim, [x.shape[0], *whole, x.shape[-1]])
    pairs = [n for pair in zip(places, window.size, strict=True) for n in pair]
    x = x.reshape(x.shape[0], *pairs, x.shape[-1])
    order = [0, *range(1, x.ndim - 1, 2), *range(2, x.ndim, 2), x.ndim - 1]
    return lax.transpose(x, order).reshape(x.shape[0], *places, -1)


def _patches(x: jax.Array, window: Window, apart: int) -> jax.Array:
    """What the window sees along all spatial axes but the first `apart`, in the last axis."""
    places = itertools.product(*map(range, window.size[apart:]))
    parts = [seen(x, place, range(1 + apart, x.ndim - 1), window) for place in places]
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, x.ndim - 1)


def seen(x: jax.Array, place: Sequence[int], axes: Sequence[int], window: Window) -> jax.Array:
    """What one element of the window sees in turn, along `axes`."""
    start, stop, strides = [0] * x.ndim, list(x.shape), [1] * x.ndim
    places = window.places(x.shape[1:-1])
    for k, a in zip(place, axes, strict=True):
        start[a], strides[a] = k * window.dilation[a - 1], window.strides[a - 1]
        stop[a] = start[a] + (places[a - 1] - 1) * strides[a] + 1
    return lax.slice(x, start, stop, strides)
