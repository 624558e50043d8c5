"""How far did quantization move the mean of each output, and which bias takes it back?

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", 2019,
arXiv:1906.04721, section 4.2 and appendix D: the error of a layer has a mean, which a bias after it
absorbs. Measured on data, front to back, so that every correction is for what the corrected layers
before it leave."""

import dataclasses
import warnings
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantjax.fake_quantized import is_quantized
from quantjax.interpret.evaluate import Machine
from quantjax.interpret.method import Run
from quantjax.interpret.param import Param
from quantjax.interpret.pieces import Leaves, Pieces, Stream
from quantjax.interpret.products import PRODUCTS
from quantjax.interpret.program import Constant, Instruction, Leaf, Value, layer_of
from quantjax.interpret.record import Record
from quantjax.interpret.segments import Segment
from quantjax.paths import named_leaves
from quantjax.ptq.layerwise import running

# What may stand between a product and its bias: operations that move elements or cast them.
MOVES = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "convert_element_type"})
VIEWS = MOVES | {"broadcast_in_dim"}


class Shift(NamedTuple):
    """A bias after a product. weight, bias: their leaves. operand: the bias as it is added; output:
    the sum's id. sign: -1 where it is subtracted, as the mean of a normalization is."""

    weight: Leaf
    bias: Leaf
    operand: Value | Leaf
    output: int
    sign: int


@dataclasses.dataclass(frozen=True)
class BiasCorrection:
    """The method behind `bias_correction`."""

    def __call__(self, run: Run) -> Run:
        named, structure = named_leaves(run.tree)
        now, floats = dict(named), dict(named_leaves(run.reference)[0])
        quantized = {name for name, leaf in named if is_quantized(leaf)}
        if not quantized:
            raise ValueError(
                "bias_correction: no parameter is quantized, so no mean has moved; it goes after "
                "the methods that quantize."
            )
        label = lambda x: x if x.path in quantized else None  # noqa: E731
        pieces = Pieces(run.apply, run.tree, run.batches, label)
        biases: dict[Leaf, Any] = {}

        def in_float(x: Leaf) -> Any:
            return layer_of(floats[x.path], x.layer)

        def as_now(x: Leaf) -> Any:
            return biases[x] if x in biases else running(layer_of(now[x.path], x.layer))

        uses = _uses(pieces)
        stream = float_stream = pieces.start()
        corrected: set[str] = set()
        for k, segment in enumerate(pieces.segments()):
            for n, shift in enumerate(shifts(segment, quantized)):
                if uses[shift.bias] > 1 or is_quantized(now[shift.bias.path]):
                    continue
                found = run.done(shift.bias.name)
                if found is None:
                    at = _Place(k, n, shift, frozenset(quantized))
                    own = (pieces, at, (as_now, in_float), (stream, float_stream))
                    found = run.note(shift.bias.name, _corrected(*own))
                biases[shift.bias] = found
                corrected.add(shift.weight.path)
            float_stream = pieces.advance(k, float_stream, in_float)
            stream = pieces.advance(k, stream, as_now)
        if quantized - corrected:
            warnings.warn(
                f"{', '.join(sorted(quantized - corrected))}: no bias of its own follows the "
                f"product; left as it is.",
                stacklevel=2,
            )
        for x, value in biases.items():
            now[x.path] = jnp.asarray(now[x.path]).at[x.layer].set(value) if x.layer else value
        leaves = [now[name] for name, _ in named]
        return dataclasses.replace(run, tree=jax.tree.unflatten(structure, leaves))


def bias_correction() -> BiasCorrection:
    """The method that puts what quantization took from the mean of each output into its bias.

    b <- b + E[W x] - E[W_hat x_q], over all batches and all places that share the bias; x_q are the
    inputs after the quantized and corrected layers before. The bias is a float parameter that is
    added to the product, or subtracted from it (the running mean of a normalization), with nothing
    but moves of elements between. Where there is none, a warning names the weight. Goes after what
    quantizes: `chain(adaround("w4"), bias_correction())`.

    Raises ValueError where nothing is quantized, and, naming the parameter, for NaN or infinity.
    Source: Nagel et al. 2019, arXiv:1906.04721, appendix D.
    """
    return BiasCorrection()


def shifts(segment: Segment, quantized: Container[str]) -> Iterator[Shift]:
    """The biases after the products of quantized parameters, in order."""
    views = _views(segment)
    held: dict[int, Leaf] = {}  # values that are a product, but for moves of its elements
    for step in segment.instructions:
        leaves = [views.get(_key(x)) for x in step.inputs]
        weights = [x for x in leaves if x is not None and x.path in quantized]
        values = [held[x.id] for x in step.inputs if isinstance(x, Value) and x.id in held]
        if step.primitive in PRODUCTS and weights:
            held[step.outputs[0]] = weights[0]
        elif step.primitive in MOVES and values:
            held[step.outputs[0]] = values[0]
        elif step.primitive in ("add", "add_any", "sub") and len(values) == 1:
            own = [i for i, x in enumerate(leaves) if x is not None and x.path not in quantized]
            if not own or (step.primitive == "sub" and own != [1]):
                continue
            bias, operand = leaves[own[0]], step.inputs[own[0]]
            assert bias is not None and not isinstance(operand, Constant)
            sign = -1 if step.primitive == "sub" else 1
            yield Shift(values[0], bias, operand, step.outputs[0], sign)


def _key(x: Any) -> Any:
    return x._replace(casts=()) if isinstance(x, Leaf) else None if isinstance(x, Constant) else x


def _views(segment: Segment) -> dict[Any, Leaf]:
    """By operand, the parameter that it is a view of."""
    views: dict[Any, Leaf] = {x: x for x in segment.leaves}
    for step in segment.fixed:
        of = views.get(_key(step.inputs[0])) if step.inputs else None
        if of is not None and step.primitive in VIEWS:
            views[Value(step.outputs[0])] = of
    return views


def _uses(pieces: Pieces) -> Mapping[Leaf, int]:
    """How many steps read each parameter."""
    count: dict[Leaf, int] = {}
    for segment in pieces.segments():
        seen: set[Instruction] = set()
        for step in (*segment.fixed, *segment.instructions):
            if step in seen:
                continue
            seen.add(step)
            for x in step.inputs:
                if isinstance(x, Leaf):
                    bare = x._replace(casts=())
                    count[bare] = count.get(bare, 0) + 1
    return count


class _Place(NamedTuple):
    """A bias: shift n of piece k."""

    k: int
    n: int
    shift: Shift
    quantized: frozenset[str]


def _corrected(
    pieces: Pieces, at: _Place, leaves: tuple[Leaves, Leaves], streams: tuple[Stream, Stream]
) -> jax.Array:
    """The bias after the correction."""

    def sums(
        segment: Segment, held: Any, constants: Any, inputs: Any, float_inputs: Any, floats: Any
    ) -> tuple[jax.Array, jax.Array]:
        """What the batch lost, summed for each element of the bias, and over how many values."""
        machine, own = Machine(Record()), list(shifts(segment, at.quantized))[at.n]
        bias = segment.leaves.index(own.bias)

        def output(leaves: Any, inputs: Any) -> jax.Array:
            env = segment.values(machine, leaves, constants, inputs, segment.instructions)
            return env[own.output].astype(jnp.float32)

        def spread(x: jax.Array) -> jax.Array:
            if isinstance(own.operand, Value):
                given = [x if i == bias else leaf for i, leaf in enumerate(held)]
                found = segment.values(machine, given, constants, inputs, ())[own.operand.id]
                x = found.array() if isinstance(found, Param) else found
            return jnp.broadcast_to(x, lost.shape)

        lost = output(floats, float_inputs) - output(held, inputs)
        wide, gather = jax.vjp(spread, held[bias])
        lost, ones = lost.astype(wide.dtype), jnp.ones_like(wide)
        return gather(lost)[0], gather(ones)[0]

    total, count = jnp.float32(0), jnp.float32(0)
    for batch in range(pieces.batches):
        floats = [leaves[1](x) for x in pieces.segment(at.k, batch).leaves]
        kind, extra = ("mean shift", at.n, at.quantized), [floats]
        lost, n = pieces.call(kind, at.k, batch, sums, leaves[0], *streams, extra=extra)
        if not jax.device_get(jnp.isfinite(lost).all()):
            raise ValueError(
                f"{at.shift.weight.name}: batch {batch}: its output holds NaN or infinity, which "
                f"have no mean."
            )
        total, count = total + lost, count + n
    now = jnp.asarray(leaves[0](at.shift.bias))
    return (now + at.shift.sign * total / jnp.maximum(count, 1)).astype(now.dtype)
