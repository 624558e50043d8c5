"""Where should the cells of a grid end, if its levels stay even? Their thresholds are learned.

Liu et al., "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized
Straight-Through Estimation", CVPR 2022, arXiv:2111.14826; what the paper leaves open is as in the
authors' code."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import Scales, fake_quantize_array, scale_values
from quantjax.blocks import block_mean, spread
from quantjax.formats import Levels
from quantjax.formats.codebook import count_below
from quantjax.qat.estimator import Estimator, Learned, asks_for, instead, kept_above
from quantjax.scales import TINY, inverse
from quantjax.spec import QuantSpec

RANGE = 2.0  # of the highest level, before it is scaled
NARROWEST = 1e-3  # cell


@dataclasses.dataclass(frozen=True)
class N2UQWeights:
    """See `n2uq`."""

    rounds_the_weight: ClassVar[bool] = True

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """Nothing is learned. Raises ValueError for levels that are not half-integers."""
        asks_for("n2uq", spec.format, signed=True, levels=Levels.HALF)
        return {}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """w, by the step at which as many weights fall to every level if they are uniform."""
        w = lax.stop_gradient(w.astype(jnp.float32))
        mean = block_mean(jnp.abs(w), spec.block_shape)
        return w, Scales(jnp.maximum(mean * np.float32(2.0 ** (2 - spec.format.bits)), TINY))

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """D(Q(w)); the gradient goes to w / gamma as it is, clipped or not."""
        v, scales = self.settled(w, learned, spec)
        step = scale_values(scales.scale)
        gamma = step * np.float32(2 ** (spec.format.bits - 1) - 0.5)
        # A block of zeros has the gradient of any other, not one over nothing.
        slope = jnp.where(step <= TINY, 1, inverse(gamma))
        soft = w.astype(jnp.float32) * spread(slope, w.shape, spec.block_shape)
        return instead(
            fake_quantize_array(v, scales, spec=spec).astype(w.dtype), soft.astype(w.dtype)
        )


@dataclasses.dataclass(frozen=True)
class N2UQActivations:
    """See `n2uq`."""

    def start(self, scales: Scales | None, act: QuantSpec) -> Learned:
        """Cells of equal widths over the calibrated range, or over [0, 2]. Raises ValueError for
        signed grids and dynamic scales."""
        asks_for("n2uq", act.format, signed=False)
        if not act.static or not act.symmetric:
            raise ValueError("n2uq learns cells from zero on: static, without a zero point.")
        cells = 2**act.format.bits - 1
        step = jnp.float32(RANGE / cells) if scales is None else scale_values(scales.scale)
        output = step * np.float32(cells / RANGE)
        return {
            "input": inverse(output),
            "start": jnp.zeros_like(step),
            "widths": jnp.full((*step.shape, cells), np.float32(RANGE / cells)),
            "output": output,
        }

    def settled(self, learned: Learned, act: QuantSpec) -> Scales:
        """The step of the levels, and the thresholds in units of x."""
        widths, low = _cells(learned)
        step = np.float32(RANGE / len(widths))
        per_input = inverse(kept_above(learned["input"]))
        ends = [(d + a / 2) * per_input for d, a in zip(low, widths, strict=True)]
        return Scales(kept_above(learned["output"]) * step, None, None, jnp.stack(ends, -1))

    def __call__(
        self,
        x: Float[Array, "*x"],
        learned: Learned,
        act: QuantSpec,
        summed: Sequence[int],
        key: jax.Array | None,
    ) -> Float[Array, "*x"]:
        """The level of the cell that holds x; NaN and infinity stay."""
        scale, *_, thresholds = self.settled(learned, act)
        assert isinstance(scale, jax.Array) and thresholds is not None
        code = count_below(x.astype(jnp.float32), lax.stop_gradient(thresholds))
        u = x.astype(jnp.float32) * kept_above(learned["input"])
        soft = jnp.zeros(u.shape, jnp.float32)
        for a, d in zip(*_cells(learned), strict=True):
            t = (u - d) / a
            soft += jnp.where(t <= 0, 0, jnp.where(t >= 1, 1, t))  # `clip` has a slope at its edges
        y = instead(code, soft) * scale
        return jnp.where(jnp.isfinite(x), y.astype(x.dtype), x)


def _cells(learned: Learned) -> tuple[list[jax.Array], list[jax.Array]]:
    """The widths of all cells, and where they begin, added up one by one: sums of arrays have no
    order of their own, and would be other bits in another program."""
    every = kept_above(learned["widths"], NARROWEST)
    widths = [every[..., i] for i in range(every.shape[-1])]
    begins = [learned["start"]]
    for width in widths[:-1]:
        begins.append(begins[-1] + width)
    return widths, begins


def n2uq() -> Estimator:
    """Activations of k bits with learned cells and even levels; weights of even levels:

    x_q = beta_2 2 / n #{i : beta_1 x > T_i}, T_i = d_{i-1} + a_i / 2, d_i = d_0 + a_1 + ... + a_i,
    with n = 2^k - 1; its gradient is that of the broken line through (d_i, i), to x and to beta_1,
    d_0 and all a_i (the expectation of rounding at random in every cell);
    w_q = D(Q(w)), 2^k half-integer levels up to gamma = (2^k - 1) / 2^(k-1) E|w|, and
    dL/dw = g / gamma, clipped or not.

    gamma keeps the entropy of weights that are uniform, the mean being that of a block that shares
    a scale, a channel in the paper. Activations ask for an unsigned static format of a few bits,
    weights for half-integer levels ("w2" has them). Cells begin with equal widths, over the
    calibrated range with `like=`, else over [0, 2]; a width is 0.001 at least. `finalize` stores
    the thresholds T_i / beta_1 beside the step, and products are those of integers.
    Source: Liu et al. 2022, arXiv:2111.14826.

    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.array([[3.0], [-1.0]])}, "w2", estimator=n2uq())
    >>> from quantjax import dequantize
    >>> dequantize(qat.finalize(tree))["kernel"].tolist()  # up to 3 / 2 of the mean, 2
    [[3.0], [-1.0]]
    """
    return Estimator(N2UQWeights(), N2UQActivations())
