"""Which levels and which first step suit which number of bits, from 1 to 4?

Liu et al., "ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization", 2025, arXiv:2502.02631,
equations 5 to 8: an elastic sign at 1 bit, stretched balanced levels (SEQ) at 1.58 and 2 bits,
learned steps above."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import Scales
from quantjax.blocks import block_mean, split
from quantjax.formats import IntFormat, Levels
from quantjax.qat.estimator import Estimator, Learned, asks_for, through
from quantjax.qat.lsq import LSQWeights
from quantjax.scales import TINY
from quantjax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class ParetoQWeights(LSQWeights):
    """See `paretoq`."""

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """The step of the first alpha. Raises ValueError for levels that are not the paper's."""
        asks_for("paretoq", spec.format, signed=True)
        format = spec.format
        assert isinstance(format, IntFormat)
        if format.bits <= 2 and format.levels is Levels.FULL:
            raise ValueError(f"paretoq has balanced levels in so few bits, not those of {format}.")
        size = jnp.abs(w.astype(jnp.float32))
        if format.bits == 1:
            alpha = block_mean(size, spec.block_shape)
        else:
            parts = split(size, spec.block_shape)
            alpha = parts.values.max(parts.axes)
        # At 2 bits and less alpha is the end of the outermost cell, above the highest level.
        ends = {1: 0.5, 2: format.max_level + 0.5}.get(format.bits, format.max_level)
        return {"scale": jnp.maximum(alpha * np.float32(1 / ends), TINY)}

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """D(Q(w)); at 2 bits and less the gradient is cut at alpha, where the cells end."""
        levels = spec.format.bits > 2
        return through(w, *self.settled(w, learned, spec), spec, to_levels=levels)


def paretoq() -> Estimator:
    """Weights of 1 to 4 bits with the grid and the first step that suit their number:

    1 bit: alpha sign(w), alpha = E|w| at first; 1.58 and 2 bits, k = 3 and 4 levels:
    alpha (round(clip(w / alpha, -1, 1) k / 2 - 1/2) + 1/2) 2 / k, alpha = max|w| at first;
    above: LSQ from absmax. alpha is trained as `lsq` trains its step, which it is a multiple of.

    For the presets "binary", "ternary", "w2", "w3", "w4". Source: Liu et al. 2025,
    arXiv:2502.02631.

    >>> from quantjax import dequantize, qat
    >>> tree = qat.prepare({"kernel": jnp.array([[1.0], [-0.3]])}, "w2", estimator=paretoq())
    >>> dequantize(qat.finalize(tree))["kernel"].tolist()
    [[0.75], [-0.25]]
    """
    return Estimator(ParetoQWeights())
