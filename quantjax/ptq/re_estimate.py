"""Which mean and variance do batch norms of a quantized network really meet? Those of its own
activations, estimated again on the calibration batches.
Sun et al., "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks",
NeurIPS 2019 (batch norm re-tuning); Finkelstein et al., 2019, arXiv:1906.03193, for the correction
of the output's mean where no norm is left.

From front to back, so that every norm sees the corrected ones before it:
- a norm gets the mean and the variance, over batches and positions, of its input in the quantized
  network;
- a norm that was folded multiplies by one, and its statistics are in the weights. Its mean and gain
  are set so that the mean and the deviation of its output are those of the float network on the
  same batches."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.fake_quantized import is_quantized
from quantjax.interpret.evaluate import Machine
from quantjax.interpret.method import Run
from quantjax.interpret.norms import Norm, Reader, find_norms, layer_reader, multiplier
from quantjax.interpret.pieces import Leaves, Pieces, Stream, arguments
from quantjax.interpret.program import Leaf
from quantjax.interpret.record import Record
from quantjax.interpret.scaling import Solved, solve
from quantjax.interpret.segments import Segment
from quantjax.interpret.unknowns import ONE
from quantjax.paths import named_leaves
from quantjax.ptq.layerwise import running

_FOLDED = 1e-3  # how near to one the multiplier of a folded norm stays


@dataclasses.dataclass(frozen=True)
class ReEstimateBatchNorm:
    """See `re_estimate_batch_norm`."""

    def __call__(self, run: Run) -> Run:
        solved = solve(run.apply, (run.reference, *arguments(run.batches[0])))
        reader, norms = find_norms(solved)
        ready = [norm for norm in norms if _is_ready(norm, run.tree)]
        if not ready:
            return run
        weights = {norm.weight for norm in ready}
        pieces = Pieces(
            run.apply, run.reference, run.batches, lambda x: x.name if x in weights else None
        )
        named, structure = named_leaves(run.tree)
        tree, floats = dict(named), dict(named_leaves(run.reference)[0])
        as_stored, before = layer_reader(tree), layer_reader(floats)

        def now(x: Leaf) -> Any:
            return running(as_stored(x))

        stream, float_stream = pieces.start(), pieces.start()
        for k in range(len(pieces)):
            given = {id for step in pieces.segment(k).instructions for id in step.outputs}
            for norm in ready:
                if norm.centered in given:
                    here = _moments(pieces, k, norm, now, stream)
                    there = _moments(pieces, k, norm, before, float_stream)
                    _settle(norm, solved, reader, tree, here, there)
            if k + 1 < len(pieces):
                stream = pieces.advance(k, stream, now)
                float_stream = pieces.advance(k, float_stream, before)
        return dataclasses.replace(
            run, tree=jax.tree.unflatten(structure, [tree[name] for name, _ in named])
        )


def re_estimate_batch_norm() -> ReEstimateBatchNorm:
    """The method that estimates the statistics of batch norms again, in the quantized network.

    It comes after the methods that quantize. Only norms whose input is a product, and whose mean
    and variance are parameters of their own, are changed; a warning names those that are not.
    Weights, gains and shifts of norms that were not folded stay.
    """
    return ReEstimateBatchNorm()


def _is_ready(norm: Norm, tree: Any) -> bool:
    """Whether it can be estimated again; else a warning says why."""
    leaves = dict(named_leaves(tree)[0])
    own = [x for x in (norm.mean, norm.variance, norm.gain) if x is not None]
    if norm.centered is None or norm.mean is None:
        why = "its mean is not a parameter that is taken from a product's output"
    elif not (norm.scale.node != ONE).any():
        why = "its input is used elsewhere, so that its channels can not be told"
    elif quantized := [x.name for x in own if is_quantized(leaves[x.path])]:
        why = f"{quantized[0]} is quantized"
    else:
        return True
    warnings.warn(f"{norm.name}: not estimated again: {why}.", stacklevel=3)
    return False


@dataclasses.dataclass(frozen=True, eq=False)
class _Moments:
    """Mean and variance of a norm's input, of the axes along which its channels lie."""

    mean: np.ndarray
    variance: np.ndarray


def _moments(pieces: Pieces, k: int, norm: Norm, leaves: Leaves, stream: Stream) -> _Moments:
    """Over all batches, by the update of Chan et al. 1979."""
    assert norm.centered is not None
    axes = tuple(a for a, n in enumerate(norm.scale.shape) if n == 1)
    step = functools.partial(_step, norm.centered, axes)
    count, mean, squares = 0.0, np.zeros(()), np.zeros(())
    for batch in range(pieces.batches):
        found = pieces.call(("moments", norm.centered, axes), k, batch, step, leaves, stream)
        n, m, v = (np.asarray(x, np.float64) for x in found)
        if not np.isfinite(m).all():
            raise ValueError(
                f"{norm.name}: batch {batch}: its input holds NaN or infinity; nothing can be "
                f"estimated from that."
            )
        off = m - mean
        mean = mean + off * n / (count + n)
        squares = squares + n * v + off**2 * count * n / (count + n)
        count += float(n)
    return _Moments(mean, squares / count)


def _step(
    value: int, axes: tuple[int, ...], segment: Segment, leaves: Any, constants: Any, inputs: Any
) -> tuple[Any, Any, Any]:
    machine = Machine(Record())
    x = segment.values(machine, leaves, constants, inputs, segment.instructions)[value]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x.mean(axes, keepdims=True)
    n = jnp.asarray(x.size / mean.size, jnp.float32)
    return n, mean, ((x - mean) ** 2).mean(axes, keepdims=True)


def _settle(
    norm: Norm,
    solved: Solved,
    reader: Reader,
    tree: dict[str, Any],
    here: _Moments,
    there: _Moments,
) -> None:
    """Changes the norm's parameters in `tree`."""
    assert norm.mean is not None
    scale = solved.unknowns.solved(norm.scale)
    node = np.unique(scale.node)
    node = node[node != ONE]
    factor = multiplier(norm, reader, layer_reader(tree), node)
    mean, variance = (_by_channel(x, scale.node, node) for x in (here.mean, here.variance))
    places = _places(solved, norm.mean, node)
    if factor is not None and (np.abs(factor - 1) < _FOLDED).all() and norm.gain is not None:
        float_mean, float_variance = (
            _by_channel(x, scale.node, node) for x in (there.mean, there.variance)
        )
        alive = (variance > 0) & (float_variance > 0)
        ratio = np.sqrt(np.divide(float_variance, variance, out=np.ones_like(mean), where=alive))
        old = _read(tree, norm.mean, places, len(node))
        _write(tree, norm.mean, places, mean - (float_mean - old) / ratio)
        own = _places(solved, norm.gain, node)
        _write(tree, norm.gain, own, _read(tree, norm.gain, own, len(node)) * ratio)
        return
    _write(tree, norm.mean, places, mean)
    if norm.variance is None:
        warnings.warn(f"{norm.name}: its variance can not be told, so it stays.", stacklevel=4)
        return
    shapes = [np.shape(tree[x.path][x.layer]) for x in (norm.mean, norm.variance)]
    if shapes[0] != shapes[1]:
        warnings.warn(f"{norm.variance.name}: another shape than the mean's.", stacklevel=4)
        return
    _write(tree, norm.variance, places, variance)


def _by_channel(x: np.ndarray, nodes: np.ndarray, node: np.ndarray) -> np.ndarray:
    """What lies along the channels of a value, by the unknown of each."""
    out = np.zeros(len(node))
    inside = np.isin(nodes, node)
    out[np.searchsorted(node, nodes[inside])] = x[inside]
    return out


def _places(solved: Solved, leaf: Leaf, node: np.ndarray) -> np.ndarray:
    """The channel of every position of a parameter, -1 where there is none."""
    for part in solved.parts[leaf.path, leaf.layer]:
        inside = np.isin(part.node, node)
        if inside.any():
            return np.where(inside, np.searchsorted(node, part.node), -1)
    raise AssertionError(f"{leaf.name}: no scale of this norm")


def _read(tree: dict[str, Any], leaf: Leaf, places: np.ndarray, count: int) -> np.ndarray:
    """The number of each channel; equal positions hold equal ones."""
    out = np.zeros(count)
    x = np.broadcast_to(np.asarray(tree[leaf.path][leaf.layer], np.float64), places.shape)
    out[places[places >= 0]] = x[places >= 0]
    return out


def _write(tree: dict[str, Any], leaf: Leaf, places: np.ndarray, values: np.ndarray) -> None:
    x = jnp.asarray(tree[leaf.path])
    own = x[leaf.layer]
    new = jnp.where(places >= 0, jnp.asarray(values, x.dtype)[places], own)
    tree[leaf.path] = x.at[leaf.layer].set(new) if leaf.layer else new
