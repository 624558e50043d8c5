"""How does the sign of a weight keep information and still learn? Balanced, by a gradient that
sharpens as training goes on.

Qin et al., "Forward and Backward Information Retention for Accurate Binary Neural Networks", CVPR
2020, arXiv:1909.10788, equations 5 to 9."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import Scales, scale_values
from quantjax.blocks import block_mean, spread
from quantjax.qat.estimator import Estimator, Learned, asks_for, several, signed, standardized
from quantjax.scales import TINY
from quantjax.spec import QuantSpec

LOW, HIGH = 0.1, 10.0  # of the temperature t


@dataclasses.dataclass(frozen=True)
class IRNetWeights:
    """See `ir_net`."""

    rounds_the_weight: ClassVar[bool] = False

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """Nothing is learned. Raises ValueError for grids of other than one bit, and blocks of one
        weight."""
        asks_for("ir_net", spec.format, bits=1, signed=True)
        several("ir_net", w.shape, spec)
        return {}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """The standardized weights, and a power of two near their mean magnitude."""
        v, _ = standardized(w, spec.block_shape)
        size = jnp.maximum(block_mean(jnp.abs(v), spec.block_shape), TINY)
        return v, Scales(2 * lax.stop_gradient(_power_of_two(size)))

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """2^s sign(v), with the derivative k t (1 - tanh(t v)^2) of eq. 8."""
        v, scales = self.settled(w, learned, spec)
        progress = learned.get("progress", jnp.float32(0))
        progress = progress.reshape(progress.shape + (1,) * (w.ndim - progress.ndim))
        t = LOW * jnp.exp(progress * np.float32(np.log(HIGH / LOW)))
        alpha = scale_values(scales.scale) / 2
        # A block of equal weights is stored as zeros, and leaves them by the slope of any other.
        size = spread(jnp.where(alpha <= 2 * TINY, 1, alpha), w.shape, spec.block_shape)
        slope = size * jnp.maximum(1 / t, 1) * t * (1 - jnp.tanh(t * v) ** 2)
        return signed(v, alpha, lax.stop_gradient(slope), w, spec)


def _power_of_two(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The power of two nearest to x on a logarithmic scale, by its bits: no logarithm, which
    rounds in its own way in every program."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    floor = lax.bitcast_convert_type(bits & np.int32(0x7F800000), jnp.float32)
    return jnp.where(x * x < 2 * floor * floor, floor, 2 * floor)


def ir_net() -> Estimator:
    """Weights of one bit, with balanced signs and a gradient that becomes exact:

    v = (w - E w) / sd(w), w_b = 2^round(log2 E|v|) sign(v);
    dw_b / dv = 2^s k t (1 - tanh(t v)^2), t = 0.1 * 100^progress, k = max(1 / t, 1).

    progress, from 0 to 1 over the training, is set by `qat.at(tree, progress)` in every step; it is
    0 until then. Means and deviations are those of the block that shares a scale. For the preset
    "binary" and networks with normalization. Source: Qin et al. 2020, arXiv:1909.10788.

    >>> from quantjax import dequantize, qat
    >>> tree = qat.prepare({"kernel": jnp.array([[5.0], [4.0]])}, "binary", estimator=ir_net())
    >>> dequantize(qat.finalize(tree))["kernel"].tolist()
    [[1.0], [-1.0]]
    """
    return Estimator(IRNetWeights())
