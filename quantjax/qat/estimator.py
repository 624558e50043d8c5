"""How does a parameter, or the activation that meets it, train through rounding? By an estimator.

An estimator says what is rounded, by which scales, and what gradient passes; one paper is one file
of this folder. What it learns are arrays on the `FakeQuantized` leaf, trained with the values."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import Scales, fake_quantize_array, fake_quantize_learned
from quantjax.blocks import Block, block_mean, block_sum, sizes, spread
from quantjax.formats import Format, IntFormat
from quantjax.ops.activation import activation_block
from quantjax.scales import TINY, inverse
from quantjax.spec import QuantSpec

Learned = Mapping[str, jax.Array]
FLAT = 1e-6  # of the root mean square: a smaller deviation is what rounding leaves of none


@runtime_checkable
class WeightEstimator(Protocol):
    """A frozen, hashable value: how a weight is rounded. A spec has an explicit block; leading axes
    of w beyond the block are layers, and every learned array has those first. Its scales are floats
    of a symmetric grid.

    rounds_the_weight: whether w itself is what is rounded, and not something made of it."""

    rounds_the_weight: ClassVar[bool]

    def start(self, w: Float[Array, "*n"], scales: Scales, spec: QuantSpec) -> Learned:
        """What is learned, before the first step. scales: those that the observer of the spec, or a
        tree calibrated before, gives."""

    def settled(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> tuple[Float[Array, "*n"], Scales]:
        """What is rounded, by which scales: `finalize` stores Q(v) of the first. Differentiable, as
        `through` rounds it."""

    def __call__(
        self, w: Float[Array, "*n"], learned: Learned, spec: QuantSpec
    ) -> Float[Array, "*n"]:
        """What products see: the value that is stored, bit for bit, with the estimator's gradient
        to w and to what is learned."""


@runtime_checkable
class ActivationEstimator(Protocol):
    """A frozen, hashable value: how an activation is rounded at a product."""

    def start(self, scales: Scales | None, act: QuantSpec) -> Learned:
        """What is learned, before the first step, in arrays that lead with the layers. scales: the
        static ones that `calibrate` found, one a layer; or None, where what all layers begin with
        is returned. Raises ValueError where it needs them."""

    def settled(self, learned: Learned, act: QuantSpec) -> Scales | None:
        """The static scales that `finalize` stores, one a layer or one for all, with thresholds
        where levels do not say where cells end; None where they are found in each call."""

    def __call__(
        self,
        x: Float[Array, "*x"],
        learned: Learned,
        act: QuantSpec,
        summed: Sequence[int],
        key: jax.Array | None,
    ) -> Float[Array, "*x"]:
        """x as the product sees it. summed: the axes that the product sums over. key: of the leaf,
        where `prepare` was given one."""


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How weights train and how activations do; None is straight-through, with the scales of the
    spec. Those of two papers can be mixed: `Estimator(dorefa().weights, pact().activations)`."""

    weights: WeightEstimator | None = None
    activations: ActivationEstimator | None = None

    def __post_init__(self) -> None:
        kinds = {"weights": WeightEstimator, "activations": ActivationEstimator}
        for field, kind in kinds.items():
            value = getattr(self, field)
            if value is not None and (not isinstance(value, kind) or isinstance(value, type)):
                raise TypeError(f"Estimator: {field} must be a {kind.__name__}, got {value!r}.")


def through(
    w: Float[Array, "*n"],
    v: Float[Array, "*n"],
    scales: Scales,
    spec: QuantSpec,
    *,
    to_levels: bool = False,
) -> Float[Array, "*n"]:
    """D(Q(v)) as an array of w's dtype, its gradient straight-through to v and to the scales, as
    `fake_quantize_learned` has it."""
    return fake_quantize_learned(v, scales, spec=spec, to_levels=to_levels).astype(w.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def signed(
    v: Float[Array, "*n"],
    alpha: Float[Array, "*b"],
    slope: Float[Array, "*n"],
    like: Float[Array, "*n"],
    spec: QuantSpec,
) -> Float[Array, "*n"]:
    """alpha sign(v) as it is stored on the grid of one bit, sign(0) = 1, in the dtype of `like`.

    Gradient, with g = dL/dy: sum g sign(v) over a block to alpha, g slope to v."""
    return fake_quantize_array(v, Scales(alpha * 2), spec=spec).astype(like.dtype)


def _signed_forward(v, alpha, slope, like, spec):
    return signed(v, alpha, slope, like, spec), (v, slope, like)


def _signed_backward(spec, residuals, gradient):
    v, slope, like = residuals
    g = gradient.astype(jnp.float32)
    by_alpha = block_sum(g * jnp.where(v < 0, -1, 1), spec.block_shape)
    return (g * slope).astype(v.dtype), by_alpha, jnp.zeros_like(slope), jnp.zeros_like(like)


signed.defvjp(_signed_forward, _signed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def straight(
    w: Float[Array, "*n"], v: Float[Array, "*n"], scales: Scales, spec: QuantSpec
) -> Float[Array, "*n"]:
    """D(Q(v)) as an array of w's dtype; the gradient goes to w, all of it."""
    return fake_quantize_array(v, scales, spec=spec).astype(w.dtype)


def _straight_forward(w, v, scales, spec):
    return straight(w, v, scales, spec), (v, scales)


def _straight_backward(spec, residuals, gradient):
    return gradient, *jax.tree.map(jnp.zeros_like, residuals)


straight.defvjp(_straight_forward, _straight_backward)


@jax.custom_vjp
def instead(hard: Float[Array, "*n"], soft: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The value of the first, with the gradient of the second."""
    return hard


instead.defvjp(lambda hard, soft: (hard, None), lambda _, gradient: (None, gradient))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def kept_above(
    s: Float[Array, "*b"], floor: float = float(TINY), factor: float = 1.0
) -> Float[Array, "*b"]:
    """s, no less than `floor`; dL/ds times `factor`, and none that would lead further below."""
    return jnp.maximum(s, np.float32(floor))


def _kept_forward(s, floor, factor):
    return kept_above(s, floor, factor), s


def _kept_backward(floor, factor, s, gradient):
    # Below the floor is where descent overshot: it may only grow.
    moves = (s > np.float32(floor)) | (gradient < 0)
    return (jnp.where(moves, gradient * np.float32(factor), 0),)


kept_above.defvjp(_kept_forward, _kept_backward)


def standardized(
    w: Float[Array, "*n"], block: Block
) -> tuple[Float[Array, "*n"], Float[Array, "*#n"]]:
    """(w - E w) / sd w over every block, and 1 / sd w; float32, the same bits in every program.
    Where all weights of a block are one number, up to float32, its deviation counts as 1, and what
    rounding left of w - E w as 0."""
    w = w.astype(jnp.float32)
    centred = w - spread(block_mean(w, block), w.shape, block)
    variance = block_mean(centred**2, block)
    flat = variance <= np.float32(FLAT**2) * block_mean(w**2, block)
    deviation = jnp.sqrt(jnp.where(flat, 1, variance))
    share = spread(inverse(deviation), w.shape, block)
    noise = lax.stop_gradient(centred * spread(flat.astype(jnp.float32), w.shape, block))
    return (centred - noise) * share, share


def several(what: str, shape: tuple[int, ...], spec: QuantSpec) -> None:
    """Raises ValueError where a block that shares a scale holds a single weight."""
    if math.prod(sizes(shape, spec.block_shape)) == 1:
        raise ValueError(
            f"{what} divides a weight by the deviation of its block, and a block of {shape} is "
            f"one weight: give the spec a larger block, such as Granularity.TENSOR."
        )


def asks_for(what: str, format: Format, *, bits: int | None = None, **facts: Any) -> None:
    """Raises ValueError unless `format` is one of integers, of so many bits and these fields."""
    fits = isinstance(format, IntFormat) and bits in (None, format.bits)
    if not fits or any(getattr(format, name) != value for name, value in facts.items()):
        wanted = ", ".join([f"{bits} bits"] * bool(bits) + [f"{k}={v}" for k, v in facts.items()])
        raise ValueError(f"{what} is for IntFormat({wanted}), not {format}.")


def rounded_activation(
    x: Float[Array, "*x"],
    scales: Scales,
    act: QuantSpec,
    summed: Sequence[int],
    *,
    to_levels: bool = False,
) -> Float[Array, "*x"]:
    """D(Q(x)) by one scale and zero point, with gradients to both; NaN and infinity stay."""
    single = (1,) * x.ndim
    scales = jax.tree.map(lambda a: jnp.reshape(a, single), scales)
    spec = act.with_block(activation_block(x.ndim, act, summed))
    rounded = fake_quantize_learned(x, scales, spec=spec, to_levels=to_levels)
    return jnp.where(jnp.isfinite(x), rounded, x)
