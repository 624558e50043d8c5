"""Can levels that are sums of powers of two, so that a product is a few shifts, train well?

Li et al., "Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization for Neural
Networks", ICLR 2020, arXiv:1909.13144, sections 2.2 to 2.4."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax import formats
from quantjax.affine import Scales, fake_quantize_array
from quantjax.blocks import counts, spread
from quantjax.formats import Codebook, Format
from quantjax.ops.activation import activation_block
from quantjax.qat.estimator import (
    Estimator,
    Learned,
    instead,
    kept_above,
    several,
    standardized,
)
from quantjax.scales import inverse
from quantjax.spec import QuantSpec

WEIGHTS, ACTIVATIONS = 3.0, 8.0  # alpha at first, of weights in deviations


@dataclasses.dataclass(frozen=True)
class APoTWeights:
    """See `apot`."""

    rounds_the_weight: ClassVar[bool] = False

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """alpha = 3 deviations. Raises ValueError for other levels, and blocks of one weight."""
        _asks_for(spec.format, signed=True)
        several("apot", w.shape, spec)
        return {"alpha": jnp.full(counts(w.shape, spec.block_shape), np.float32(WEIGHTS))}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """The standardized weights, by the scale that takes the highest level to alpha."""
        v, _ = standardized(w, spec.block_shape)
        return v, Scales(kept_above(learned["alpha"]))

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """alpha Q(v / alpha)."""
        v, scales = self.settled(w, learned, spec)
        assert isinstance(scales.scale, jax.Array)
        hard = fake_quantize_array(v, scales, spec=spec)
        alpha = spread(scales.scale, w.shape, spec.block_shape)
        share = lax.stop_gradient(standardized(w, spec.block_shape)[1])
        soft = w.astype(jnp.float32) * share + alpha * _moves(v, alpha, hard)
        return instead(hard.astype(w.dtype), soft.astype(w.dtype))


@dataclasses.dataclass(frozen=True)
class APoTActivations:
    """See `apot`."""

    def start(self, scales: Scales | None, act: QuantSpec) -> Learned:
        """The calibrated range, or 8. Raises ValueError for other levels, and dynamic scales."""
        _asks_for(act.format, signed=False)
        if not act.static:
            raise ValueError("apot learns one bound of an activation: static=True.")
        if scales is None:
            return {"alpha": jnp.float32(ACTIVATIONS)}
        assert isinstance(scales.scale, jax.Array)
        return {"alpha": scales.scale}

    def settled(self, learned: Learned, act: QuantSpec) -> Scales:
        """The scale that takes the highest level to alpha."""
        return Scales(kept_above(learned["alpha"]))

    def __call__(
        self,
        x: Float[Array, "*x"],
        learned: Learned,
        act: QuantSpec,
        summed: Sequence[int],
        key: jax.Array | None,
    ) -> Float[Array, "*x"]:
        """alpha Q(clip(x, 0, alpha) / alpha); NaN and infinity stay."""
        scale = self.settled(learned, act).scale
        assert isinstance(scale, jax.Array)
        alpha = scale.reshape((1,) * x.ndim)
        spec = act.with_block(activation_block(x.ndim, act, summed))
        hard = fake_quantize_array(x, Scales(alpha), spec=spec)
        inside = (x > 0) & (x <= alpha)
        soft = jnp.where(inside, x, 0) + alpha * jnp.where(x > 0, _moves(x, alpha, hard), 0)
        return jnp.where(jnp.isfinite(x), instead(hard, soft.astype(x.dtype)), x)


def _moves(v: jax.Array, alpha: jax.Array, hard: jax.Array) -> jax.Array:
    """dy/dalpha (section 2.3): the sign where v is clipped, Q(v / alpha) - v / alpha elsewhere."""
    per_alpha = inverse(lax.stop_gradient(alpha))
    u, level = v.astype(jnp.float32) * per_alpha, hard.astype(jnp.float32) * per_alpha
    return lax.stop_gradient(jnp.where(jnp.abs(u) > 1, jnp.sign(u), level - u))


def _asks_for(format: Format, signed: bool) -> None:
    fits = isinstance(format, Codebook) and 2 <= format.bits <= 8
    if not fits or format != formats.apot(format.bits, signed):
        raise ValueError(f"apot is for formats.apot(bits, signed={signed}), not {format}.")


def apot() -> Estimator:
    """Weights and activations in sums of powers of two, with a trained bound alpha:

    v = (w - E w) / sd w, w_q = alpha Q(v / alpha), x_q = alpha Q(clip(x, 0, alpha) / alpha);
    dL/dalpha = sum g (Q(u) - u, or sign(u) where |u| > 1), u = v / alpha, or x / alpha;
    dL/dw = g / sd w, clipped or not; dL/dx = g in (0, alpha], else 0.

    Q takes the nearest level of `formats.apot(bits)`, or of `apot(bits, signed=False)` for
    activations, static ones. Mean and deviation are those of the block that shares a scale, the
    layer for `Granularity.TENSOR` as in the paper, and are constants to the gradient, as in the
    authors' code. alpha begins at 3 deviations, of activations at the calibrated range with
    `like=`, else at 8; the paper decays it. Weights change their size, so it is for networks with
    normalization. Source: Li et al. 2020, arXiv:1909.13144.

    >>> from quantjax import Policy, dequantize, qat
    >>> policy = Policy([("kernel", QuantSpec(format=formats.apot(3)))])
    >>> tree = qat.prepare({"kernel": jnp.array([[5.0], [3.0], [1.0]])}, policy, estimator=apot())
    >>> dequantize(qat.finalize(tree))["kernel"][:, 0].tolist()  # of 1.22, 0, -1.22
    [1.5, 0.0, -1.5]
    """
    return Estimator(APoTWeights(), APoTActivations())
