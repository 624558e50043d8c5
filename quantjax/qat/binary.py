"""What is left of a weight of one bit, and how does it still learn? Its sign; by its distance to 0.

Courbariaux et al., "BinaryConnect", NeurIPS 2015, arXiv:1511.00363, section 2.2 to 2.4; Rastegari
et al., "XNOR-Net", ECCV 2016, arXiv:1603.05279, equations 6 and 12."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import Scales, scale_values
from quantjax.blocks import block_mean, counts, spread
from quantjax.fake_quantized import FakeQuantized, is_quantized
from quantjax.qat.estimator import Estimator, Learned, asks_for, signed, straight
from quantjax.scales import TINY
from quantjax.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class BinaryConnectWeights:
    """See `binary_connect`."""

    rounds_the_weight: ClassVar[bool] = True

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """Nothing is learned. Raises ValueError for grids of other than one bit."""
        asks_for("binary_connect", spec.format, bits=1, signed=True)
        return {}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """w, by the scale that makes its levels -1 and 1."""
        return w.astype(jnp.float32), Scales(
            jnp.full(counts(w.shape, spec.block_shape), np.float32(2))
        )

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """sign(w); the gradient goes to w as it is."""
        return straight(w, *self.settled(w, learned, spec), spec)


@dataclasses.dataclass(frozen=True)
class XNORWeights:
    """See `xnor`."""

    rounds_the_weight: ClassVar[bool] = True

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """Nothing is learned. Raises ValueError for grids of other than one bit."""
        asks_for("xnor", spec.format, bits=1, signed=True)
        return {}

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """w, by the scale that makes its levels -E|w| and E|w|."""
        w = w.astype(jnp.float32)
        size = jnp.where(w < 0, -w, w)  # whose slope at 0 is 1, as sign(0) is: `abs` has none there
        mean = block_mean(size, spec.block_shape)
        # Zeros are stored by the least scale there is, and move as if it were theirs.
        least = jax.lax.stop_gradient(jnp.maximum(mean, TINY) - mean)
        return w, Scales(2 * (mean + least))

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """E|w| sign(w), with the gradient of both factors."""
        v, scales = self.settled(w, learned, spec)
        alpha = scale_values(scales.scale) / 2
        slope = jnp.where(jnp.abs(v) <= 1, spread(alpha, w.shape, spec.block_shape), 0)
        return signed(v, alpha, jax.lax.stop_gradient(slope), w, spec)


def binary_connect() -> Estimator:
    """w_b = sign(w) in {-1, 1}, sign(0) = 1; straight-through. The paper keeps w in [-1, 1] after
    each step, which `clip_values` does. For the preset "binary" and networks with normalization, as
    weights change their size. Source: Courbariaux et al. 2015, arXiv:1511.00363.

    >>> from quantjax import dequantize, qat
    >>> params = {"kernel": jnp.array([[0.3], [-0.2]])}
    >>> tree = qat.prepare(params, "binary", estimator=binary_connect())
    >>> dequantize(qat.finalize(tree))["kernel"].tolist()
    [[1.0], [-1.0]]
    """
    return Estimator(BinaryConnectWeights())


def xnor() -> Estimator:
    """w_b = alpha sign(w), alpha = E|w| of the block that shares a scale, a filter in the paper:

    dL/dw = g (alpha 1[|w| <= 1]) + sign(w) / n sum g sign(w), over the n weights of the block,

    which is nearest to w in the square. For the preset "binary".
    Source: Rastegari et al. 2016, arXiv:1603.05279.

    >>> from quantjax import dequantize, qat
    >>> tree = qat.prepare({"kernel": jnp.array([[0.3], [-0.1]])}, "binary", estimator=xnor())
    >>> [round(w, 4) for w in dequantize(qat.finalize(tree))["kernel"][:, 0].tolist()]
    [0.2, -0.2]
    """
    return Estimator(XNORWeights())


def clip_values(tree: Any, bound: float = 1.0) -> Any:
    """The tree with the values of its FakeQuantized leaves kept in [-bound, bound]; after a step of
    the optimizer. A sign that lies far from zero never turns again.

    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.array([[3.0], [-0.2]])}, "binary", estimator=xnor())
    >>> clip_values(tree)["kernel"].value.tolist()
    [[1.0], [-0.2...]]
    """

    def one(x: Any) -> Any:
        if not isinstance(x, FakeQuantized):
            return x
        return dataclasses.replace(x, value=jnp.clip(x.value, -bound, bound))

    return jax.tree.map(one, tree, is_leaf=is_quantized)
