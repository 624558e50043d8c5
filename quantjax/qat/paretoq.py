"""Which levels and which first step suit which number of bits, from 1 to 4?

Liu et al., "ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization", 2025, arXiv:2502.02631,
equations 5 to 8: an elastic sign at 1 bit, stretched balanced levels (SEQ) at 1.58 and 2 bits,
learned steps above."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import Scales, scale_values
from quantjax.blocks import block_mean, split, spread
from quantjax.formats import Format, IntFormat, Levels
from quantjax.qat.estimator import Estimator, Learned, asks_for, signed, through
from quantjax.qat.lsq import LSQWeights
from quantjax.scales import TINY
from quantjax.spec import QuantSpec

CUT = 0.99  # of alpha


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
        return {"scale": jnp.maximum(alpha * np.float32(1 / _ends(format)), TINY)}

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """D(Q(w)). The gradient to w is cut at alpha, of 2 bits and three levels just before."""
        _, scales = self.settled(w, learned, spec)
        bits = spec.format.bits
        if bits > 2:
            return through(w, w, scales, spec, to_levels=True)
        step, v = scale_values(scales.scale), w.astype(jnp.float32)
        alpha = spread(step * np.float32(_ends(spec.format)), w.shape, spec.block_shape)
        if bits == 1:
            inside = (jnp.abs(v) <= alpha).astype(jnp.float32)
            return signed(v, step / 2, lax.stop_gradient(inside), w, spec)
        beyond = lax.stop_gradient(jnp.abs(v) > np.float32(CUT) * alpha)
        return through(w, jnp.where(beyond, 2 * lax.stop_gradient(v), v), scales, spec)


def _ends(format: Format) -> float:
    """alpha in steps: the highest level, but of 2 bits and three levels the end of its cell."""
    return format.max_level + (0.5 if format.bits == 2 else 0)


def paretoq() -> Estimator:
    """Weights of 1 to 4 bits with the grid and the first step that suit their number:

    1 bit: alpha sign(w), alpha = E|w| at first; 1.58 and 2 bits, k = 3 and 4 levels:
    alpha (round(clip(w / alpha, -1, 1) k / 2 - 1/2) + 1/2) 2 / k, alpha = max|w| at first;
    above: LSQ from absmax. alpha is trained as `lsq` trains its step, which it is a multiple of;
    at 1 bit dL/dalpha = sum g sign(w) / sqrt(n), and dL/dw = g 1[|w| <= alpha]. Of 3 and 4 levels
    w counts as clipped above 0.99 alpha, as in the authors' code: the largest weight at first.

    For the presets "binary", "ternary", "w2", "w3", "w4". Source: Liu et al. 2025,
    arXiv:2502.02631.

    >>> from quantjax import dequantize, qat
    >>> tree = qat.prepare({"kernel": jnp.array([[1.0], [-0.3]])}, "w2", estimator=paretoq())
    >>> dequantize(qat.finalize(tree))["kernel"].tolist()
    [[0.75], [-0.25]]
    """
    return Estimator(ParetoQWeights())
