"""How is one array of an optimizer's state kept in a few bits? Flat, by blocks or by axes.
By blocks: Dettmers et al. 2022, arXiv:2110.02861, section 2.1. By the maxima along every axis
(rank-1 normalization): Li et al. 2023, arXiv:2309.01507, section 4.2."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax.affine import Scales, dequantize_array, find_scales, quantize_array
from quantjax.formats import Codebook
from quantjax.qtensor import QTensor
from quantjax.rounding import Rounding, noise
from quantjax.scales import inverse
from quantjax.spec import QuantSpec

FEW = 16  # elements for a float32 maximum: a quarter of a byte each, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Moment:
    """An array, as it is kept: x = D(q) in its shape, times the least of its `maxima`, if any.

    q: the elements in a row, quantized; in blocks with a scale each, or without any scale.
    maxima: of |x|, for every axis of the array those of its slices. shape: of the array, static.
    """

    q: QTensor
    maxima: tuple[jax.Array, ...] | None = None
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True), kw_only=True)

    def array(self) -> jax.Array:
        """The float array."""
        q, maxima = jax.tree.map(jnp.asarray, (self.q, self.maxima))  # as NumPy's, if loaded
        if maxima is None:
            return dequantize_array(q).reshape(self.shape)
        levels = dequantize_array(dataclasses.replace(q, dtype=jnp.dtype(jnp.float32)))
        return (levels.reshape(self.shape) * _least(maxima)).astype(q.dtype)


def by_block(
    x: Float[Array, "*n"], format: Codebook, block: int, key: jax.Array | None = None
) -> Moment:
    """One scale, max |x| over the largest level, for `block` elements of the flat array.

    With a key the rounding is stochastic. NaN or infinity makes its block NaN.
    """
    spec, row = QuantSpec(format=format, block=(block,)), x.reshape(-1)
    scales = find_scales(row, spec)
    return Moment(quantize_array(row, scales, _uniform(key, row), spec=spec), shape=x.shape)


def by_axes(x: Float[Array, "*n"], format: Codebook, key: jax.Array | None = None) -> Moment:
    """The scale of x[i, j, ...] is min(max |x[i]|, max |x[:, j]|, ...).

    A large value raises the scales of its own row and column alone where both are large, so that
    one outlier takes the levels from none of its neighbours. With a key the rounding is stochastic.
    """
    wide = jnp.abs(x.astype(jnp.float32))
    axes = range(x.ndim)
    maxima = tuple(wide.max([b for b in axes if b != a]) for a in axes)
    row = (x.astype(jnp.float32) * inverse(_least(maxima))).reshape(-1)
    spec = QuantSpec(format=format, block=(1,))
    q = quantize_array(row, Scales(None), _uniform(key, row), spec=spec)
    return Moment(dataclasses.replace(q, dtype=x.dtype), maxima, shape=x.shape)


def has_few_maxima(shape: tuple[int, ...]) -> bool:
    """Whether the maxima of an array of this shape are few beside its elements."""
    return len(shape) > 1 and FEW * sum(shape) <= math.prod(shape)


def again(x: jax.Array, old: Moment, key: jax.Array | None) -> Moment:
    """Another array of the shape of `old`, kept in the same way."""
    format = old.q.format
    assert isinstance(format, Codebook)
    if old.maxima is not None:
        return by_axes(x, format, key)
    (block,) = old.q.block
    assert block is not None
    return by_block(x, format, block, key)


def _uniform(key: jax.Array | None, row: jax.Array) -> jax.Array | None:
    return None if key is None else noise(Rounding.STOCHASTIC, key, row.shape)


def _least(maxima: tuple[jax.Array, ...]) -> Float[Array, "*n"]:
    """Element by element, the least of the maxima of the slices that it is in."""
    rank = len(maxima)
    spread = (m.reshape([-1 if b == a else 1 for b in range(rank)]) for a, m in enumerate(maxima))
    return functools.reduce(jnp.minimum, spread)
