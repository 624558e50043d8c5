"""How much does each value inside a network matter to its loss? The diagonal of the Fisher matrix.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021,
arXiv:2102.05426, section 3.3: E[(dL / dz)^2] stands for the curvature at z. In place of labels
come such as the network itself finds likely, so that this is the Fisher matrix, not the empirical
one, whose gradients vanish on what was learned by heart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax.interpret.evaluate import Machine
from quantjax.interpret.pieces import Leaves, Pieces, Stream
from quantjax.interpret.record import Record
from quantjax.interpret.segments import Segment

Loss = Callable[[Any, jax.Array], Float[Array, ""]]
BATCHES = 8  # so many are enough for a mean


def own_labels(logits: Float[Array, "*n classes"], key: jax.Array) -> Float[Array, ""]:
    """-log p of labels drawn from p = softmax(logits), summed over the examples."""
    drawn = jax.random.categorical(key, logits)[..., None]
    return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), drawn, axis=-1))


def output_weights(pieces: Pieces, leaves: Leaves, loss: Loss) -> list[list[jax.Array | None]]:
    """For every piece and each of its outputs E[(dL / dz)^2], the mean over the first axis and the
    first batches; None for outputs that are no floats.

    `loss` takes what the last piece gives that is float, one array, and a key.
    """
    total: list[list[Any]] = [[] for _ in range(len(pieces))]
    batches = min(pieces.batches, BATCHES)
    start = pieces.start()
    for batch in range(batches):
        env = dict(start[batch])
        at: Stream = [env] * pieces.batches
        for k in range(len(pieces)):
            out = pieces.call("run", k, batch, _run, leaves, at)
            env.update(zip(pieces.segment(k, batch).outputs, out, strict=True))
        last = pieces.segment(len(pieces) - 1, batch).outputs
        logits = [id for id in last if jnp.issubdtype(env[id].dtype, jnp.floating)]
        if len(logits) != 1:
            raise ValueError(
                f"expected one array of logits from the model, got {len(logits)}: give loss=None "
                f"to compare the blocks' outputs as they are."
            )
        slope = {logits[0]: jax.grad(loss)(env[logits[0]], jax.random.key(batch))}
        for k in reversed(range(len(pieces))):
            segment = pieces.segment(k, batch)
            own = [slope.get(id, jnp.zeros_like(env[id])) for id in segment.outputs]
            squares = [_mean_square(g) for g in own]
            pairs = zip(total[k], squares, strict=True) if total[k] else ()
            total[k] = [s if s is None else s + t for t, s in pairs] or squares
            back = pieces.call("back", k, batch, _back, leaves, at, extra=[own])
            for id, g in zip(segment.inputs, back, strict=True):
                if g is not None:
                    slope[id] = slope[id] + g if id in slope else g
    return total


def _mean_square(g: jax.Array) -> jax.Array | None:
    if not jnp.issubdtype(g.dtype, jnp.floating):
        return None
    return jnp.mean(jnp.square(g.astype(jnp.float32)), axis=0, keepdims=True)


def _run(segment: Segment, leaves: Any, constants: Any, inputs: Any) -> list[Any]:
    return segment.run(Machine(Record()), leaves, constants, inputs)


def _back(
    segment: Segment, leaves: Any, constants: Any, inputs: list[Any], slopes: list[Any]
) -> list[Any]:
    """The gradient at each input, None at those that are no floats."""

    def is_float(x: Any) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating)

    def outputs(moving: list[Any]) -> list[Any]:
        own = iter(moving)
        given = [next(own) if is_float(x) else x for x in inputs]
        out = segment.run(Machine(Record()), leaves, constants, given)
        return [y for y in out if is_float(y)]

    _, pull = jax.vjp(outputs, [x for x in inputs if is_float(x)])
    found = iter(pull([g for g in slopes if is_float(g)])[0])
    return [next(found) if is_float(x) else None for x in inputs]
