"""Which weights should be zero, and what should the others be? Ternary networks.

Li et al., "Ternary Weight Networks", 2016, arXiv:1605.04711, equations 5 and 6 (`twn`); Ma et al.,
"The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits", 2024, arXiv:2402.17764,
equations 1 to 3 (`bitnet`)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import Scales
from quantjax.blocks import block_mean, block_sum, spread
from quantjax.formats import Levels
from quantjax.qat.estimator import Estimator, Learned, asks_for, straight
from quantjax.scales import TINY, inverse
from quantjax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class TWNWeights:
    """See `twn`."""

    rounds_the_weight: ClassVar[bool] = False

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """Nothing is learned. Raises ValueError for grids other than the ternary one."""
        asks_for("twn", spec.format, bits=2, signed=True, levels=Levels.NARROW)
        return {}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """alpha sign(w) of the weights above the threshold, and alpha."""
        w = jax.lax.stop_gradient(w.astype(jnp.float32))
        size, block = jnp.abs(w), spec.block_shape
        kept = size > spread(np.float32(0.7) * block_mean(size, block), w.shape, block)
        count = jnp.maximum(block_sum(kept.astype(jnp.float32), block), 1)
        alpha = jnp.maximum(block_sum(jnp.where(kept, size, 0), block) * inverse(count), TINY)
        return jnp.where(kept, jnp.sign(w) * spread(alpha, w.shape, block), 0), Scales(alpha)

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """The ternary weights; their gradient goes to w as it is."""
        return straight(w, *self.settled(w, learned, spec), spec)


@dataclasses.dataclass(frozen=True)
class BitNetWeights:
    """See `bitnet`."""

    rounds_the_weight: ClassVar[bool] = True

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """Nothing is learned. Raises ValueError for grids other than the ternary one."""
        asks_for("bitnet", spec.format, bits=2, signed=True, levels=Levels.NARROW)
        return {}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """w, by its mean magnitude."""
        w = jax.lax.stop_gradient(w.astype(jnp.float32))
        return w, Scales(jnp.maximum(block_mean(jnp.abs(w), spec.block_shape), TINY))

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """D(Q(w)); the gradient goes to w as it is, clipped or not."""
        return straight(w, *self.settled(w, learned, spec), spec)


def twn() -> Estimator:
    """Weights in {-alpha, 0, alpha}, straight-through: with the threshold t = 0.7 E|w|,

    w_t = sign(w) 1[|w| > t], alpha = E[|w| : |w| > t],

    which is nearest to w in the square if it were uniform or normal. The means are those of a block
    that shares a scale. For the preset "ternary". Source: Li et al. 2016, arXiv:1605.04711.

    >>> from quantjax import qat
    >>> params = {"kernel": jnp.array([[1.0], [-0.5], [0.1]])}
    >>> tree = qat.prepare(params, "ternary", estimator=twn())
    >>> from quantjax import dequantize
    >>> dequantize(qat.finalize(tree))["kernel"][:, 0].tolist()  # t = 0.373
    [0.75, -0.75, 0.0]
    """
    return Estimator(TWNWeights())


def bitnet() -> Estimator:
    """BitNet b1.58: w_t = clip(round(w / gamma), -1, 1) gamma with gamma = E|w|, straight-through
    everywhere. In the paper gamma is one a matrix (`Granularity.TENSOR`), and activations have 8
    bits and one scale a token, which the spec's `act` says ("w2a8" has such a one).
    For the preset "ternary". Source: Ma et al. 2024, arXiv:2402.17764.

    >>> from quantjax import dequantize, qat
    >>> params = {"kernel": jnp.array([[1.0], [-0.5], [0.1]])}
    >>> tree = qat.prepare(params, "ternary", estimator=bitnet())
    >>> [round(w, 3) for w in dequantize(qat.finalize(tree))["kernel"][:, 0].tolist()]
    [0.533, -0.533, 0.0]
    """
    return Estimator(BitNetWeights())
