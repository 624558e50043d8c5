"""How do the channels of two layers in a row get the same range? By one scale each, moved from the
weights before to the weights after.
Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
arXiv:1906.04721, section 4.1.

relu(W1 x) = S relu(S^-1 W1 x) for positive S, so W2 S and S^-1 W1 compute what W2 and W1 did. With
s_i = sqrt(r1_i / r2_i), for r1_i the range of the outputs i of W1 and r2_i that of the inputs i of
W2, both become sqrt(r1_i r2_i), which makes the product of their precisions largest (eq. 11)."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.interpret.method import Run
from quantjax.interpret.pieces import arguments
from quantjax.interpret.scaling import Factor, ScaleGroup, groups_of, scaled, solve
from quantjax.paths import named_leaves

_ROUNDS, _CLOSE = 100, 1e-3  # until no channel moves by more than a thousandth


def equalized(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Any:
    """The tree that computes the same function with equal ranges on both sides of each channel.

    Layers are found by what they compute (`find_scaling`): through relu, pools, attention's values,
    folded norms, concatenations; one scale serves all weights that a channel meets. Pairs share
    layers, so they are visited in turn until nothing moves. A channel whose weights are all zero on
    one side stays. Weight ranges are those of largest magnitudes.

    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    >>> p = {"a": jnp.array([[8.0, 1.0]]), "b": jnp.array([[0.5], [4.0]])}
    >>> new = equalized(apply, p, jnp.ones((1, 1)))
    >>> new["a"].tolist(), new["b"].tolist()
    ([[2.0, 2.0]], [[2.0], [2.0]])
    """
    return scaled(params, _scales(_pairs(apply, (params, *args), kwargs), params))


@dataclasses.dataclass(frozen=True)
class Equalize:
    """See `equalize`."""

    def __call__(self, run: Run) -> Run:
        run.floats_only("equalize")
        pairs = _pairs(run.apply, (run.tree, *arguments(run.batches[0])), {})
        scales = _scales(pairs, run.tree)
        trees = {"tree": scaled(run.tree, scales), "reference": scaled(run.reference, scales)}
        return dataclasses.replace(run, **trees)


def equalize() -> Equalize:
    """The method of cross-layer equalization; see `equalized`. It goes before methods that
    quantize, and after `fold_batch_norm` where there are norms."""
    return Equalize()


def _pairs(
    apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[ScaleGroup]:
    """The groups with weights of products on both sides. A gain in between keeps its value."""
    found = groups_of(solve(apply, args, kwargs, tied=True))
    pairs = [g for g in found.groups if any(f.role == "out" for f in g.producers)]
    if not pairs:
        reasons = sorted({reason for reason in found.reasons.values() if reason})
        warnings.warn(
            f"equalize: no two layers share channels that can be scaled: {'; '.join(reasons)}.",
            stacklevel=3,
        )
    return pairs


def _scales(groups: Sequence[ScaleGroup], params: Any) -> list[tuple[ScaleGroup, jax.Array]]:
    """The s of every group after the last round."""
    tree = dict(named_leaves(params)[0])
    weights = {
        (f.leaf.path, f.leaf.layer): np.abs(np.asarray(tree[f.leaf.path][f.leaf.layer], np.float32))
        for group in groups
        for f in (*group.consumers, *group.producers)
        if f.role
    }
    total, moved = [np.ones(group.channels) for group in groups], 0.0
    for _ in range(_ROUNDS):
        moved = 0.0
        for group, s in zip(groups, total, strict=True):
            before = _range(group, [f for f in group.producers if f.role == "out"], weights)
            after = _range(group, group.consumers, weights)
            usable = (before > 0) & (after > 0) & np.isfinite(before) & np.isfinite(after)
            power = _powers(group)
            step = np.divide(before, after, out=np.ones_like(s), where=usable) ** (1 / power)
            moved = max(moved, np.abs(np.log(step)).max(initial=0))
            s *= step
            for f in (*group.consumers, *group.producers):
                if f.role:
                    at = np.where(f.index < 0, 1.0, step[f.index] ** f.power)
                    weights[f.leaf.path, f.leaf.layer] *= at.astype(np.float32)
        if moved < _CLOSE:
            break
    else:
        warnings.warn(
            f"equalize: after {_ROUNDS} rounds a scale still moves by a factor of "
            f"{np.exp(moved):.3f}.",
            stacklevel=3,
        )
    return [(g, jnp.asarray(s, jnp.float32)) for g, s in zip(groups, total, strict=True)]


def _range(
    group: ScaleGroup, factors: Sequence[Factor], weights: dict[Any, np.ndarray]
) -> np.ndarray:
    """The largest magnitude that each channel meets in these weights."""
    largest = np.zeros(group.channels)
    for f in factors:
        w = weights[f.leaf.path, f.leaf.layer]
        shared = tuple(a for a, n in enumerate(f.index.shape) if n == 1)
        most = w.max(shared, keepdims=True) if w.size else np.zeros(f.index.shape)
        inside = f.index >= 0
        np.maximum.at(largest, f.index[inside], np.broadcast_to(most, f.index.shape)[inside])
    return largest


def _powers(group: ScaleGroup) -> np.ndarray:
    """By how much s ** (this) changes the ratio of the two ranges: 2, less behind a square."""
    out = np.full(group.channels, -np.inf)
    for f in group.producers:
        if f.role == "out":
            np.maximum.at(out, f.index[f.index >= 0], f.power)
    return 1 - np.where(np.isfinite(out) & (out < 0), out, -1.0)
