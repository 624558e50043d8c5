"""What does a block of a network compute while its weights are between two levels each?

The loss that block reconstruction minimises, and a step of it: Li et al., "BRECQ", 2021,
arXiv:2102.05426, equation 10; Wei et al., "QDrop", 2022, arXiv:2203.05740."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import Scales, dequantize_array
from quantjax.formats import ExponentFormat
from quantjax.interpret.evaluate import Machine
from quantjax.interpret.param import Param
from quantjax.interpret.program import Constant, Value
from quantjax.interpret.record import Record
from quantjax.interpret.segments import Segment
from quantjax.interpret.trained import Trained
from quantjax.ptq.learned_activation import LearnedActivation
from quantjax.ptq.matrix import MatrixForm
from quantjax.ptq.soft_rounding import (
    Adam,
    Anneal,
    Neighbours,
    adam,
    indecision,
    neighbours,
    softened,
)
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec

SCALE_RATE = 1e-3  # of the logarithm of an activation's scale


@dataclasses.dataclass(frozen=True)
class Place:
    """A parameter that a block learns: which leaf of the segment, and how it is quantized."""

    leaf: int
    form: MatrixForm
    spec: QuantSpec

    def between(self, w: Float[Array, "*w"], scales: Scales) -> Neighbours:
        """The two levels of every weight, in the shape of the leaf."""
        cells, w_BOI = self.form.cells(scales, self.spec, w.shape), self.form.matrices(w)
        each = jax.vmap(lambda w, cells: neighbours(w, cells, self.spec.format))
        return Neighbours(*(self.form.leaf(x, w.shape) for x in each(w_BOI, cells)))


@dataclasses.dataclass(frozen=True)
class How:
    """What is fixed while a block learns. drop: the share of activations that stay as they are."""

    places: tuple[Place, ...]
    anneal: Anneal
    drop: float


class Learned(NamedTuple):
    """For every place: v, where the weights are between their levels; steps, the logarithm of what
    the activation's static scale is multiplied by, or None."""

    v: list[jax.Array]
    steps: list[jax.Array | None]


class Given(NamedTuple):
    """For every place: the neighbours of its weights, and the activation's scale and zero point to
    start from, or None."""

    between: list[Neighbours]
    act_scale: list[jax.Array | None]
    act_zero_point: list[jax.Array | None]


class Sample(NamedTuple):
    """One batch at a block. inputs: in the quantized network; float_inputs and targets, what is
    compared: in the float one; weights: of the squared errors, 1 where None."""

    inputs: list[jax.Array]
    float_inputs: list[jax.Array]
    targets: list[jax.Array]
    weights: list[jax.Array | None]


POOLING = frozenset({"reduce_sum", "reduce_max"})
BETWEEN = frozenset({"mul", "div", "reshape", "squeeze", "transpose", "convert_element_type"})


def compared(segment: Segment) -> tuple[int, ...]:
    """The values by which the block is judged: its outputs; in place of one that is pooled at the
    end, what it is pooled from. A mean of all places says so little of each that weights which
    have it right on the samples are wrong elsewhere."""
    made = {id: step for step in segment.instructions for id in step.outputs}

    def before(id: int) -> int:
        at = unpooled = id
        while at in made and made[at].primitive in POOLING | BETWEEN:
            step = made[at]
            moving = [x for x in step.inputs if not isinstance(x, Constant)]
            if len(moving) != 1 or not isinstance(moving[0], Value):
                break
            at = moving[0].id
            unpooled = at if step.primitive in POOLING else unpooled
        return unpooled if unpooled in made else id

    return tuple(map(before, segment.outputs))


def found(segment: Segment, leaves: Any, constants: Any, inputs: Any) -> list[jax.Array]:
    """What is compared, with these parameters."""
    env = segment.values(Machine(Record()), leaves, constants, inputs, segment.instructions)
    values = [env[id] for id in compared(segment)]
    return [x.array() if isinstance(x, Param) else x for x in values]


def outputs(
    how: How,
    segment: Segment,
    held: Sequence[Any],
    constants: Any,
    inputs: Any,
    values: Sequence[jax.Array],
    act_scales: Sequence[jax.Array | None],
    given: Given,
    key: jax.Array | None,
) -> list[jax.Array]:
    """What is compared of the block with these values of its weights, not rounded again, and
    activations rounded by these scales; with a key some stay as they are."""
    rule = LearnedActivation(how.drop)
    leaves = [_fixed(x, rule) for x in held]
    for i, place in enumerate(how.places):
        value = values[i].astype(held[place.leaf].dtype)
        own = None
        if key is not None and how.drop:
            own = jax.random.fold_in(key, i)
            layers = value.shape[: place.spec.stacked]
            own = jax.random.split(own, layers) if layers else own
        asks = Trained(
            act_scales[i], given.act_zero_point[i], own,
            place.spec.format, place.spec.act, None, rule,
        )  # fmt: skip
        leaves[place.leaf] = (value, asks)
    return found(segment, leaves, constants, inputs)


def settled(q: QTensor, rule: LearnedActivation | None = None) -> Any:
    """A quantized parameter in floats, with how its activation is rounded beside it: gradients pass
    its products. To be made outside the programs that use it, see `layerwise`."""
    assert not isinstance(q.format, ExponentFormat)  # which is for scales alone
    asks = Trained(q.act_scale, q.act_zero_point, None, q.format, q.act, None, rule)
    return dequantize_array(q), asks


def _fixed(leaf: Any, rule: LearnedActivation) -> Any:
    """A parameter that does not learn, as a block that does sees it."""
    if isinstance(leaf, QTensor):
        return settled(leaf, rule)
    if isinstance(leaf, tuple):
        return leaf[0], dataclasses.replace(leaf[1], rule=rule)
    return leaf


def squared_error(ours: Sequence[jax.Array], sample: Sample) -> Float[Array, ""]:
    """The weighted squared error of all that is compared, a mean over the first axis of each."""
    total = jnp.float32(0)
    for y, target, weight in zip(ours, sample.targets, sample.weights, strict=True):
        if not jnp.issubdtype(y.dtype, jnp.floating):
            continue
        error = jnp.square(y.astype(jnp.float32) - target.astype(jnp.float32))
        total += jnp.sum(error if weight is None else error * weight) / max(len(y), 1)
    return total


def judged(
    how: How, segment: Segment, held: Any, constants: Any,
    values: list[jax.Array], act_scales: list[Any], given: Given, sample: Sample,
) -> Float[Array, ""]:  # fmt: skip
    """The error of the block on one batch with these weights, all activations rounded."""
    rest = (values, act_scales, given, None)
    return squared_error(outputs(how, segment, held, constants, sample.inputs, *rest), sample)


def scaled(learned: Learned, given: Given) -> list[jax.Array | None]:
    """The scales of the activations."""
    pairs = zip(given.act_scale, learned.steps, strict=True)
    return [None if s is None or r is None else s * jnp.exp(r) for s, r in pairs]


def step(
    how: How, segment: Segment, held: Any, constants: Any,
    learned: Learned, moving: Adam, given: Given, sample: Sample,
    unit: jax.Array, i: jax.Array, key: jax.Array,
) -> tuple[Learned, Adam]:  # fmt: skip
    """One step on one batch: down the error in units of plain rounding's, and towards levels."""
    weight, beta = how.anneal.push(i)
    key = jax.random.fold_in(key, i)
    inputs = sample.inputs
    if how.drop:
        inputs = _mixed(jax.random.fold_in(key, len(how.places)), how.drop, sample)

    def loss(learned: Learned) -> jax.Array:
        values = [softened(v, b) for v, b in zip(learned.v, given.between, strict=True)]
        ours = outputs(
            how, segment, held, constants, inputs, values, scaled(learned, given), given, key
        )
        push = sum((indecision(v, beta) for v in learned.v), jnp.float32(0))
        return unit * squared_error(ours, sample) + weight * push

    gradient = jax.grad(loss)(learned)
    steps = [None if s is None else SCALE_RATE for s in learned.steps]
    rates = Learned([how.anneal.rate] * len(learned.v), steps)  # type: ignore[list-item, arg-type]
    return adam(learned, gradient, moving, rates)


def _mixed(key: jax.Array, drop: float, sample: Sample) -> list[jax.Array]:
    """The inputs, a share `drop` of their elements as the float network has them."""
    mixed = []
    for i, (x, f) in enumerate(zip(sample.inputs, sample.float_inputs, strict=True)):
        if jnp.issubdtype(x.dtype, jnp.floating):
            u = jax.random.uniform(jax.random.fold_in(key, i), x.shape, jnp.float32)
            x = jnp.where(u < np.float32(drop), f, x)
        mixed.append(x)
    return mixed
