"""How do weights and activations of few bits train without a learned scale? On a fixed range.

Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients", 2016, arXiv:1606.06160, equations 5 to 10; its gradients are `Backward`."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import Scales
from quantjax.blocks import block_mean, counts, split, spread
from quantjax.formats import IntFormat
from quantjax.qat.estimator import (
    Estimator,
    Learned,
    asks_for,
    rounded_activation,
    straight,
    through,
)
from quantjax.scales import TINY, inverse
from quantjax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class DoReFaWeights:
    """See `dorefa`."""

    rounds_the_weight: ClassVar[bool] = False

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """Nothing is learned. Raises ValueError for grids that are not of signed integers."""
        asks_for("dorefa", spec.format, signed=True)
        return {}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """tanh(w) over its largest magnitude in a block, by the scale that takes 1 to the highest
        level; of one bit w itself, by its mean magnitude."""
        w = w.astype(jnp.float32)
        if spec.format.bits == 1:
            return w, Scales(2 * jnp.maximum(block_mean(jnp.abs(w), spec.block_shape), TINY))
        v = jnp.tanh(w)
        parts = split(jnp.abs(v), spec.block_shape)
        largest = parts.values.max(parts.axes)
        largest = jnp.where(largest < TINY, 1, largest)  # a block of zeros stays one, and can grow
        v = v * spread(inverse(largest), w.shape, spec.block_shape)
        assert isinstance(spec.format, IntFormat)
        step = np.float32(1.0 / spec.format.max_level)
        return v, Scales(jnp.full(counts(w.shape, spec.block_shape), step))

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """D(Q(v)); of one bit the gradient goes to w as it is (eq. 8)."""
        v, scales = self.settled(w, learned, spec)
        if spec.format.bits == 1:
            return straight(w, v, scales, spec)
        return through(w, v, scales, spec)


@dataclasses.dataclass(frozen=True)
class DoReFaActivations:
    """See `dorefa`."""

    def start(self, scales: Scales | None, act: QuantSpec) -> Learned:
        """Nothing is learned. Raises ValueError for signed grids and dynamic scales."""
        asks_for("dorefa", act.format, signed=False)
        if not act.static or not act.symmetric:
            raise ValueError("dorefa rounds activations on [0, 1]: static, without a zero point.")
        return {}

    def settled(self, learned: Learned, act: QuantSpec) -> Scales:
        """The scale that takes 1 to the highest code."""
        assert isinstance(act.format, IntFormat)
        return Scales(jnp.float32(1.0 / act.format.qmax))

    def __call__(
        self,
        x: Float[Array, "*x"],
        learned: Learned,
        act: QuantSpec,
        summed: Sequence[int],
        key: jax.Array | None,
    ) -> Float[Array, "*x"]:
        """D(Q(x)), straight-through on [0, 1], and nothing beyond."""
        # What the product sees of x beyond 1 is 1 in both; `clip` would halve the slope at zeros.
        clipped = jnp.where(x < 0, 0, jnp.where(x > 1, 1, x))
        return rounded_activation(clipped, self.settled(learned, act), act, summed)


def dorefa() -> Estimator:
    """Weights of k bits in [-1, 1], activations of k bits in [0, 1]:

    w_q = Q(tanh(w) / max|tanh(w)|), x_q = Q(clip(x, 0, 1)), straight-through;

    weights of one bit are E|w| sign(w). The maximum and the mean are those of a block that shares a
    scale, the layer for `Granularity.TENSOR` as in the paper. Weights change their size, so it is
    for networks with normalization, trained from the start. Activations ask for an unsigned static
    format, which is not calibrated. Source: Zhou et al. 2016, arXiv:1606.06160.

    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.array([[3.0], [-0.2]])}, "w2", estimator=dorefa())
    >>> qat.finalize(tree)["kernel"].scale.tolist()  # 2 / (2^k - 1)
    [[0.666...]]
    """
    return Estimator(DoReFaWeights(), DoReFaActivations())
