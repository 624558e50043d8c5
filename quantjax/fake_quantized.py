"""What does a parameter look like while it trains? Floats, and how they are to be rounded.
Jacob et al. 2018, arXiv:1712.05877, section 3; Bengio et al. 2013, arXiv:1308.3432."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from quantjax.affine import Scales, fake_quantize_array
from quantjax.formats import Format
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec

if TYPE_CHECKING:
    from quantjax.ops import Backward
    from quantjax.qat.estimator import Estimator


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FakeQuantized:
    """A float array that products see rounded: `fake_array(x)` equals D(Q(value)).

    value: the floats. scale, zero_point, codebook: as in a QTensor, zero points as float32.
    act_scale, act_zero_point: of the activation that meets it, where they are static, one for each
    entry of the leading axes. uniform: the noise of stochastic rounding, of the shape of `value`,
    or None for nearest. key: of the noise in the backward pass, one for each entry of the leading
    axes, or None. learned, act_learned: what the estimator trains of the weight and of the
    activation, by name; scales then are None. progress: of the training, from 0 to 1, one for each
    layer, for estimators that change with it.

    Static: spec, with an explicit block and how the activation is rounded (`act`); backward, how
    the operands of the two gradient products are rounded, or None; estimator, see
    `quantjax.qat.Estimator`, or None for straight-through.

    Made by `quantjax.qat.prepare`, used through `quantjax.intercept` alone, turned into a QTensor
    by `quantjax.qat.finalize`. Differentiable: the gradient with respect to a tree of these is such
    a tree (`allow_int=True` where it holds a key or quantized scales). As in a QTensor, a leading
    axis can be added or removed, and the rest stays true.
    """

    value: jax.Array
    scale: jax.Array | QTensor | None
    zero_point: jax.Array | None = None
    codebook: jax.Array | None = None
    act_scale: jax.Array | None = None
    act_zero_point: jax.Array | None = None
    uniform: jax.Array | None = None
    key: jax.Array | None = None
    learned: Mapping[str, jax.Array] | None = None
    act_learned: Mapping[str, jax.Array] | None = None
    progress: jax.Array | None = None
    spec: QuantSpec = dataclasses.field(metadata=dict(static=True), kw_only=True)
    backward: "Backward | None" = dataclasses.field(
        default=None, metadata=dict(static=True), kw_only=True
    )
    estimator: "Estimator | None" = dataclasses.field(
        default=None, metadata=dict(static=True), kw_only=True
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        """The rank of the array."""
        return len(self.value.shape)

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axes beyond the block, those of stacked layers."""
        return self.shape[: self.ndim - len(self.spec.block_shape)]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array."""
        return np.dtype(self.value.dtype)

    @property
    def format(self) -> Format:
        """The grid that it is rounded to."""
        return self.spec.format

    def __jax_array__(self) -> jax.Array:
        raise TypeError(
            f"{self!r} is no array. Run the model through quantjax.intercept(apply)(params, ...), "
            f"or make it a QTensor with quantjax.qat.finalize."
        )

    def __repr__(self) -> str:
        # JAX prints trees whose leaves are placeholders, such as the axes of vmap.
        known = hasattr(self.value, "shape") and hasattr(self.value, "dtype")
        facts = f"shape={self.shape}, dtype={self.dtype}" if known else "shape=?"
        act = "" if self.spec.act is None else f", act={self.spec.act.format}"
        return f"FakeQuantized({self.format}, {facts}{act})"


def _known(x: FakeQuantized, learned: Mapping[str, jax.Array] | None) -> dict[str, jax.Array]:
    """What an estimator gets: what is learned, and the progress if it is told."""
    return {**(learned or {}), **({} if x.progress is None else {"progress": x.progress})}


def rounded_value(x: FakeQuantized) -> tuple[jax.Array, Scales]:
    """What is rounded, and the scales by which it is."""
    own = None if x.estimator is None else x.estimator.weights
    if own is not None:
        return own.settled(x.value, _known(x, x.learned), x.spec)
    return x.value, Scales(x.scale, x.zero_point, x.codebook)


def fake_array(x: FakeQuantized) -> jax.Array:
    """D(Q(value)), bit for bit what `finalize` stores. Without an estimator of its own the gradient
    passes straight through, and is 0 where a value is clipped."""
    own = None if x.estimator is None else x.estimator.weights
    if own is not None:
        return own(x.value, _known(x, x.learned), x.spec)
    return fake_quantize_array(x.value, rounded_value(x)[1], x.uniform, spec=x.spec)


def is_quantized(x: Any) -> bool:
    """Whether x is a QTensor or a FakeQuantized, one leaf of a tree made of several arrays."""
    return isinstance(x, QTensor | FakeQuantized)
