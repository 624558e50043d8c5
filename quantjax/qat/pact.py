"""Where should an activation be clipped? Where the loss wants it: the bound is trained.

Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018,
arXiv:1805.06085, equations 1 to 4."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import Scales
from quantjax.formats import IntFormat
from quantjax.qat.dorefa import DoReFaWeights
from quantjax.qat.estimator import (
    Estimator,
    Learned,
    asks_for,
    kept_above,
    rounded_activation,
)
from quantjax.scales import TINY
from quantjax.spec import QuantSpec

START = 10.0  # of a bound that no data chose


@dataclasses.dataclass(frozen=True)
class PACTActivations:
    """See `pact`."""

    def start(self, scales: Scales | None, act: QuantSpec) -> Learned:
        """The calibrated range, or 10. Raises ValueError for signed grids and dynamic scales."""
        asks_for("pact", act.format, signed=False)
        if not act.static or not act.symmetric:
            raise ValueError("pact learns one bound of an activation: static, without zero point.")
        if scales is None:
            return {"bound": jnp.float32(START)}
        assert isinstance(act.format, IntFormat) and isinstance(scales.scale, jax.Array)
        return {"bound": scales.scale * np.float32(act.format.qmax)}

    def settled(self, learned: Learned, act: QuantSpec) -> Scales:
        """The scale that takes the bound to the highest code."""
        assert isinstance(act.format, IntFormat)
        share = np.float32(1.0 / act.format.qmax)
        return Scales(jnp.maximum(kept_above(learned["bound"]) * share, TINY))

    def __call__(
        self,
        x: Float[Array, "*x"],
        learned: Learned,
        act: QuantSpec,
        summed: Sequence[int],
        key: jax.Array | None,
    ) -> Float[Array, "*x"]:
        """D(Q(clip(x, 0, bound))): dL/dx passes below the bound, dL/dbound sums what is above."""
        bound = kept_above(learned["bound"])
        floats = x.astype(jnp.float32)  # sums of many gradients
        clipped = jnp.where(floats < bound, jnp.where(floats < 0, 0, floats), bound).astype(x.dtype)
        scales = jax.lax.stop_gradient(self.settled(learned, act))
        return rounded_activation(clipped, scales, act, summed)


def pact() -> Estimator:
    """Activations of k bits in [0, alpha], alpha trained; weights as `dorefa` has them.

    y = alpha / (2^k - 1) round(clip(x, 0, alpha) (2^k - 1) / alpha);
    dy/dalpha = 1 where x >= alpha, else 0; dy/dx = 1 in [0, alpha), else 0.

    The paper decays alpha (L2), so give "learned" a weight decay (see `labels`). alpha begins at
    the calibrated range with `like=`, else at 10. Activations ask for an unsigned static format.
    Source: Choi et al. 2018, arXiv:1805.06085.

    >>> from quantjax import QuantSpec, IntFormat, Policy, qat
    >>> from quantjax.spec import Granularity
    >>> act = QuantSpec(format=IntFormat(4, signed=False), block=Granularity.TENSOR, static=True)
    >>> policy = Policy([("kernel", QuantSpec(format=IntFormat(4), act=act))])
    >>> qat.prepare({"kernel": jnp.ones((4, 2))}, policy, estimator=pact())["kernel"].act_learned
    {'bound': Array(10., dtype=float32)}
    """
    return Estimator(DoReFaWeights(), PACTActivations())
