"""How long should a step of the grid be? As the loss wants it: the step is trained.

Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153; with a learned offset:
Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
initialization", 2020, arXiv:2004.09576."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax.affine import Scales
from quantjax.blocks import sizes, split
from quantjax.formats import Format, IntFormat
from quantjax.qat.estimator import (
    Estimator,
    Learned,
    kept_above,
    rounded_activation,
    through,
)
from quantjax.scales import TINY, inverse
from quantjax.spec import QuantSpec


def _factor(count: int, format: Format) -> float:
    """1 / sqrt(N Q_P), N values that share a step, Q_P the highest level (eq. 4)."""
    return 1.0 / math.sqrt(max(count, 1) * format.max_level)


@dataclasses.dataclass(frozen=True)
class LSQWeights:
    """One step for each block that shares a scale; see `lsq`."""

    rounds_the_weight: ClassVar[bool] = True

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """The scales of the observer; of a block of zeros the least there is, which any weight that
        leaves zero raises. Raises ValueError for a codebook without scales."""
        if not isinstance(scales.scale, jax.Array):
            raise ValueError(f"lsq learns the float scales of a grid, not of {spec.format}.")
        parts = split(jnp.abs(w.astype(jnp.float32)), spec.block_shape)
        largest = parts.values.max(parts.axes).reshape(scales.scale.shape)
        return {"scale": jnp.where(largest < TINY, TINY, scales.scale)}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """w, by the learned steps."""
        count = math.prod(sizes(w.shape, spec.block_shape))
        return w, Scales(kept_above(learned["scale"], factor=_factor(count, spec.format)))

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """D(Q(w))."""
        # Half-integer levels, which the paper does not have, are clipped where their cells end.
        levels = isinstance(spec.format, IntFormat) and spec.format.has_zero
        return through(w, *self.settled(w, learned, spec), spec, to_levels=levels)


@dataclasses.dataclass(frozen=True)
class LSQActivations:
    """One step for all of an activation; see `lsq`. offset: learned as well (LSQ+)."""

    offset: bool = False

    def start(self, scales: Scales | None, act: QuantSpec) -> Learned:
        """The calibrated step, and offset beta = -z s."""
        if scales is None or not isinstance(scales.scale, jax.Array):
            raise ValueError(
                "lsq learns a static scale: give like=, a tree that quantjax.calibrate made of a "
                "policy whose activations are static."
            )
        if scales.zero_point is not None and not self.offset:
            raise ValueError("lsq learns no zero point of an activation; lsq_plus does.")
        if not self.offset:
            return {"scale": scales.scale}
        if not isinstance(act.format, IntFormat) or not act.format.has_zero:
            raise ValueError(f"lsq_plus needs integer levels with zero, not {act.format}.")
        zero = 0.0 if scales.zero_point is None else scales.zero_point.astype(jnp.float32)
        return {"scale": scales.scale, "offset": -zero * scales.scale}

    def settled(self, learned: Learned, act: QuantSpec) -> Scales:
        """The learned step, and the code of zero next to -beta / s."""
        scale = jnp.maximum(learned["scale"], TINY)
        return Scales(scale, self._zero(scale, learned, act.format))

    def _zero(self, scale: jax.Array, learned: Learned, format: Format) -> jax.Array | None:
        """round(-beta / s), straight-through and a code: zero is then one of the levels, which
        padding and rectifiers ask for."""
        if not self.offset:
            return None
        assert isinstance(format, IntFormat)
        zero = -learned["offset"] * inverse(scale)
        code = jnp.clip(jnp.round(zero), format.qmin, format.qmax)
        return zero + jax.lax.stop_gradient(code - zero)

    def __call__(
        self,
        x: Float[Array, "*x"],
        learned: Learned,
        act: QuantSpec,
        summed: Sequence[int],
        key: jax.Array | None,
    ) -> Float[Array, "*x"]:
        """D(Q(x)); N counts the features of one example, the first axis being that of examples."""
        features = math.prod(x.shape[1:]) if x.ndim > 1 else x.size
        scale = kept_above(learned["scale"], factor=_factor(features, act.format))
        zero = self._zero(scale, learned, act.format)
        return rounded_activation(x, Scales(scale, zero), act, summed, to_levels=True)


def lsq() -> Estimator:
    """The step s of weights and of activations is trained. With v = x / s and l(v) its level,

    dL/ds = 1 / sqrt(N Q) sum dL/dy (l(v) - v, or l(v) where x is clipped),

    clipped from the outermost levels on, as dL/dx is. N values share the step, Q is the highest
    level. It begins at what the observer finds: mse() as in LSQ+, section 3.2. Activations must be
    static and calibrated (`prepare(..., like=...)`). A step that descent takes to zero or below
    counts as 2^-126 until its gradient raises it again.
    Source: Esser et al. 2020, arXiv:1902.08153.

    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.ones((4, 2))}, "w2", estimator=lsq())
    >>> list(tree["kernel"].learned)
    ['scale']
    """
    return Estimator(LSQWeights(), LSQActivations())


def lsq_plus() -> Estimator:
    """`lsq` with a learned offset of activations, x_hat = l((x - beta) / s) s + beta, for those
    that dip below zero, as after swish or GELU. beta is kept to a multiple of s, straight-through,
    so that zero stays a code. Source: Bhalgat et al. 2020, arXiv:2004.09576."""
    return Estimator(LSQWeights(), LSQActivations(offset=True))
