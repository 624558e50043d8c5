"""How large should the two sides of a ternary weight be? Each as the loss wants it.

Zhu et al., "Trained Ternary Quantization", ICLR 2017, arXiv:1612.01064, equations 6 to 8."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import Scales, fake_quantize_array
from quantjax.formats import Codebook
from quantjax.qat.estimator import Estimator, Learned, kept_above
from quantjax.spec import QuantSpec

SHARE = 0.05  # of the largest weight: below that it is zero


@dataclasses.dataclass(frozen=True)
class TTQWeights:
    """See `ttq`."""

    rounds_the_weight: ClassVar[bool] = False

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """The mean magnitudes of both sides. Raises ValueError for other formats, and for more than
        one scale a layer."""
        if spec.format != Codebook.learned(2):
            raise ValueError(f"ttq is for Codebook.learned(2), of which it uses 3 levels, not "
                             f"{spec.format}.")  # fmt: skip
        if any(b is not None for b in spec.block_shape):
            raise ValueError("ttq has one pair of levels a layer: block=Granularity.TENSOR.")
        code = _codes(w, spec)
        lead = w.ndim - len(spec.block_shape)
        axes = tuple(range(lead, w.ndim))

        def mean(side: jax.Array) -> jax.Array:
            total = jnp.where(side, jnp.abs(w.astype(jnp.float32)), 0).sum(axes)
            return total / jnp.maximum(side.sum(axes), 1)

        return {"positive": mean(code > 0), "negative": mean(code < 0)}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """Each weight as its level, and the table of the three, with a fourth that none takes."""
        low, high = (kept_above(learned[k]) for k in ("negative", "positive"))
        table = jnp.stack([-low, jnp.zeros_like(low), high, 2 * high], -1)
        single = low.shape + (1,) * len(spec.block_shape)
        code = _codes(w, spec)
        values = jnp.where(code > 0, high.reshape(single), 0)
        values = jnp.where(code < 0, -low.reshape(single), values)
        return values, Scales(jnp.ones(single, jnp.float32), None, table)

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """The ternary weights."""
        values, scales = self.settled(w, learned, spec)
        rounded = fake_quantize_array(values, scales, spec=spec)
        # Their values are the levels already; this adds the gradient to w of equation 8.
        size = jnp.where(_codes(w, spec) == 0, np.float32(1), jnp.abs(values))
        return (rounded + _nothing(w.astype(jnp.float32), jax.lax.stop_gradient(size))).astype(
            w.dtype
        )


@jax.custom_vjp
def _nothing(w: Float[Array, "*n"], slope: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Zero, with the derivative `slope` to w."""
    return jnp.zeros_like(w)


_nothing.defvjp(
    lambda w, slope: (jnp.zeros_like(w), slope),
    lambda slope, gradient: (gradient * slope, jnp.zeros_like(slope)),
)


def _codes(w: Float[Array, "*n"], spec: QuantSpec) -> Float[Array, "*n"]:
    """-1, 0 or 1."""
    w = jax.lax.stop_gradient(w.astype(jnp.float32))
    axes = tuple(range(w.ndim - len(spec.block_shape), w.ndim))
    bound = np.float32(SHARE) * jnp.abs(w).max(axes, keepdims=True)
    return jnp.sign(w) * (jnp.abs(w) > bound)


def ttq() -> Estimator:
    """Weights in {-W_n, 0, W_p}, both trained: with the threshold t = 0.05 max|w| of a layer,

    dL/dW_p = sum g over w > t, dL/dW_n = -sum g over w < -t;
    dL/dw = W_p g for w > t, g between, W_n g for w < -t.

    For `QuantSpec(format=Codebook.learned(2), block=Granularity.TENSOR)`; stored as a table of
    three levels. Source: Zhu et al. 2017, arXiv:1612.01064.

    >>> from quantjax import Codebook, Policy, qat
    >>> from quantjax.spec import Granularity
    >>> spec = QuantSpec(format=Codebook.learned(2), block=Granularity.TENSOR)
    >>> params = {"kernel": jnp.array([[1.0, -0.5], [0.5, 0.01]])}
    >>> tree = qat.prepare(params, Policy([("kernel", spec)]), estimator=ttq())
    >>> float(tree["kernel"].learned["positive"]), float(tree["kernel"].learned["negative"])
    (0.75, 0.5)
    """
    return Estimator(TTQWeights())
