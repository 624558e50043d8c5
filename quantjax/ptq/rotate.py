"""How do outliers leave weights and activations, before either is rounded? They are spread over all
channels by an orthogonal matrix that is built into the parameters.
Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, arXiv:2404.00456,
section 4, stages 1a to 1c; the matrices that need no operation at inference.

Between norms without gains a residual stream x can be x R for any orthogonal R: what is added to it
is multiplied by R along its outputs, what reads it by R along its inputs. So can values between a
layer and the next that nothing acts on channel by channel, as those of attention heads. Gains of
the norms go into the products behind them first. A norm that takes the mean off asks for R with
R 1 = 1. All of it is found by what the model computes (`find_turns`)."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from quantjax.interpret.method import Run
from quantjax.interpret.pieces import arguments
from quantjax.interpret.scaling import Factor, ScaleGroup, find_scaling, scaled
from quantjax.interpret.turns import Turn, Turned, Turns, find_turns
from quantjax.paths import named_leaves
from quantjax.ptq.hadamard import random_hadamard, random_keeping_sum


def rotated(
    apply: Callable[..., Any], params: Any, *args: Any, seed: int = 0, **kwargs: Any
) -> Any:
    """The tree that computes the same function with all free bases turned: by Hadamard matrices
    with random signs, by `seed`.

    Warns, with the reason, for a stream between norms that can not be turned, as where a norm's
    gain meets a table that is the embedding too, and where no Hadamard matrix of a size is known;
    that stream then stays, or a random orthogonal matrix serves.

    >>> apply = lambda p, x: jnp.tanh((x @ p["a"]) @ p["b"])
    >>> p = {"a": jnp.zeros((3, 4)).at[:, 0].set(4.0), "b": jnp.eye(4, 2)}
    >>> new = rotated(apply, p, jnp.ones((1, 3)))
    >>> float(jnp.abs(p["a"]).max()), float(jnp.abs(new["a"]).max())
    (4.0, 2.0)
    """
    return _turned_trees(apply, [params], (params, *args), kwargs, seed)[0]


@dataclasses.dataclass(frozen=True)
class Rotate:
    """See `rotate`."""

    seed: int = 0

    def __call__(self, run: Run) -> Run:
        run.floats_only("rotate")
        args = (run.tree, *arguments(run.batches[0]))
        tree, reference = _turned_trees(run.apply, [run.tree, run.reference], args, {}, self.seed)
        return dataclasses.replace(run, tree=tree, reference=reference)


def rotate(seed: int = 0) -> Rotate:
    """The method that turns all free bases; see `rotated`. It goes before methods that quantize."""
    return Rotate(seed)


def _turned_trees(
    apply: Callable[..., Any],
    trees: Sequence[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
) -> list[Any]:
    """Every tree with the same matrices, found on the first argument."""
    turns, groups = find_turns(apply, *args, **kwargs), []
    folding = _gains(find_scaling(apply, *args, **kwargs).groups, args[0])
    if folding:
        free = find_turns(apply, _folded(args[0], args[0], folding), *args[1:], **kwargs)
        if _count(free) > _count(turns):
            turns, groups = free, folding
    for reason in turns.reasons:
        warnings.warn(f"rotate: the stream between norms stays: {reason}.", stacklevel=4)
    if not turns.free:
        if not turns.reasons:
            warnings.warn("rotate: nothing is turned: no basis is free.", stacklevel=4)
        return list(trees)
    rng = np.random.default_rng(seed)
    matrices = [(turn, _matrix(turn, rng)) for turn in turns.free]
    return [_turned(_folded(tree, args[0], groups), matrices) for tree in trees]


def _count(turns: Turns) -> int:
    """How many entries of parameters are turned."""
    return sum(turn.size * len(turn.axes) for turn in turns.free)


def _gains(groups: Sequence[ScaleGroup], params: Any) -> list[ScaleGroup]:
    """The groups between a norm's gain, and shift if any, and the products behind it."""
    tree = dict(named_leaves(params)[0])
    found = []
    for group in groups:
        own = [f for f in group.producers if f.power == -1]
        if len(own) != len(group.producers) or any(f.role for f in own) or len(own) > 2:
            continue
        gain = _entries(tree, own[0])
        shifted = len(own) == 2
        if (
            np.isfinite(gain).all()
            and (not shifted or gain.all())
            and not (group.positive and (gain <= 0).any())
        ):
            found.append(group)
    return found


def _entries(tree: dict[str, Any], factor: Factor) -> np.ndarray:
    """What a parameter holds where the scales of its group enter."""
    x = np.asarray(tree[factor.leaf.path][factor.leaf.layer], np.float32)
    return np.broadcast_to(x, factor.index.shape)[factor.index >= 0]


def _folded(params: Any, values: Any, groups: Sequence[ScaleGroup]) -> Any:
    """The tree with the gains of `values` in the products behind them, and gains of one."""
    tree = dict(named_leaves(values)[0])
    for group in groups:
        gain = group.producers[0]
        s = np.ones(group.channels, np.float32)
        s[gain.index[gain.index >= 0]] = _entries(tree, gain)
        dead = s == 0  # nothing of that channel passes: the weights take the zero, the gain is one
        params = scaled(params, [(group, jnp.asarray(np.where(dead, 1, s)))])
        if dead.any():
            params = _dead(params, group, dead)
    return params


def _dead(params: Any, group: ScaleGroup, dead: np.ndarray) -> Any:
    """Weights of zero behind a gain of zero, which becomes one."""
    named, structure = named_leaves(params)
    tree = dict(named)
    for f in (*group.consumers, *group.producers):
        x = jnp.asarray(tree[f.leaf.path])
        value = 0.0 if f.role == "in" else 1.0
        own = jnp.where(dead[f.index] & (f.index >= 0), value, x[f.leaf.layer]).astype(x.dtype)
        tree[f.leaf.path] = x.at[f.leaf.layer].set(own) if f.leaf.layer else own
    return jax.tree.unflatten(structure, [tree[name] for name, _ in named])


def _matrix(turn: Turn, rng: np.random.Generator) -> np.ndarray:
    if turn.keeps_sum:
        return random_keeping_sum(turn.size, rng)
    matrix, remark = random_hadamard(turn.size, rng)
    if remark:
        names = ", ".join(dict.fromkeys(t.path for t in turn.axes[:3]))
        warnings.warn(
            f"rotate: {names}: {remark}, so a random orthogonal matrix is used.", stacklevel=5
        )
    return matrix


def _turned(params: Any, matrices: Sequence[tuple[Turn, np.ndarray]]) -> Any:
    named, structure = named_leaves(params)
    tree = dict(named)
    for turn, matrix in matrices:
        for at in turn.axes:
            x = jnp.asarray(tree[at.path])
            own = _along(x[at.layer], at, matrix)
            tree[at.path] = x.at[at.layer].set(own) if at.layer else own
    return jax.tree.unflatten(structure, [tree[name] for name, _ in named])


def _along(x: Array, at: Turned, matrix: np.ndarray) -> Array:
    """x with one of its axes multiplied by a matrix: v -> v R."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    moved = jnp.moveaxis(x, at.axis, -1).astype(wide)
    parts = moved.reshape(*moved.shape[:-1], at.outer, len(matrix), at.inner)
    r = jnp.asarray(matrix, wide)
    out = jnp.einsum("...oni,nm->...omi", parts, r, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(out.reshape(moved.shape), -1, at.axis).astype(x.dtype)
