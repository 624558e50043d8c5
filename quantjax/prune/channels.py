"""How does a network get really smaller? Whole channels go, out of every array that holds them.
Li et al., "Pruning Filters for Efficient ConvNets", 2016, arXiv:1608.08710 (norms of filters);
Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, arXiv:1906.10771
(gradient times weight); Michel et al., "Are Sixteen Heads Really Better than One?", 2019,
arXiv:1905.10650 (heads)."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.fake_quantized import is_quantized
from quantjax.interpret.abstract import interpret
from quantjax.interpret.intercept import is_array, sites
from quantjax.interpret.program import Key, flatten
from quantjax.paths import named_leaves
from quantjax.prune.select import matching
from quantjax.prune.ties import FIXED, Ties
from quantjax.prune.widths import Axes, Widths


class Cut(NamedTuple):
    """A smaller network. params: its parameters. widths: the new shape of every one that shrank, by
    path, with which the caller builds the model. masks: booleans on the old parameters, for
    `prune.apply`; with them, the old model computes what the new one does."""

    params: Any
    widths: dict[str, tuple[int, ...]]
    masks: Any


def channels(
    apply: Callable[..., Any],
    params: Any,
    *args: Any,
    sparsity: float | None = None,
    keep: Mapping[str, int] | None = None,
    score: str | Any = "l1",
) -> Cut:
    """Cuts out the channels of least weight, and gives the smaller parameters.

    A channel goes out of all that holds it: the outputs of the products that make it, biases and
    norms, the inputs of those that read it, and everything tied to it by a residual sum, an
    elementwise product or a group. They are found by what `apply(params, *args)` computes. Where an
    axis is split, as into groups of a norm, a block of channels is one. Channels of the model's
    inputs and outputs stay, and so do those that a mean goes over (layer norms).

    sparsity: in [0, 1), the share that each set of tied channels loses, rounded down; one stays.
    keep: instead, how many channels stay, by the path of a parameter that makes them; the rest is
    whole. score: "l1" or "l2", the sum of |w| or w^2 over all that makes a channel, or a tree like
    `params` of scores to sum: (g w)^2 for gradients g is Molchanov's. Heads are left to `heads`.

    Factors that the model's code computes from a width, such as 1 / sqrt(width), are its own: what
    it computes with the new widths is what the old one does under `masks` only if those stay.

    Raises ValueError, with the reasons and paths, where nothing can be cut, for a path in `keep`
    whose channels are fixed, and for a quantized leaf or a sparsity or number out of range.

    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]
    >>> p = {"a": jnp.array([[3.0, 0.1, 2.0]]), "b": jnp.arange(3.0), "c": jnp.ones((3, 2))}
    >>> cut = channels(apply, p, jnp.ones((4, 1)), sparsity=0.5)
    >>> cut.widths
    {'a': (1, 2), 'b': (2,), 'c': (2, 2)}
    >>> cut.params["b"].tolist()
    [0.0, 2.0]
    """
    return _cut("channels", apply, params, args, sparsity, keep, score)


def heads(
    apply: Callable[..., Any],
    params: Any,
    *args: Any,
    sparsity: float | None = None,
    keep: Mapping[str, int] | None = None,
    score: str | Any = "l1",
) -> Cut:
    """Cuts out whole attention heads: their queries, keys, values and what reads them.

    As `channels`, whose arguments these are, for what stands along the axis that products of two
    activations share, of one label a head. Under grouped queries a head of keys goes with all
    queries that read it, and counts as one.

    >>> def apply(p, x):  # two heads of width 2
    ...     q, k, v = (jnp.reshape(x @ p[n], (5, 2, 2)) for n in "qkv")
    ...     scores = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
    ...     return jnp.reshape(jnp.einsum("hqk,khd->qhd", scores, v), (5, 4)) @ p["o"]
    >>> p = {n: jnp.ones((3, 4)) for n in "qkv"} | {"o": jnp.ones((4, 3))}
    >>> heads(apply, p, jnp.ones((5, 3)), keep={"q": 1}).widths
    {'k': (3, 2), 'o': (2, 3), 'q': (3, 2), 'v': (3, 2)}
    """
    return _cut("heads", apply, params, args, sparsity, keep, score)


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """What the program says. makers: the axes of parameters that products give, by key."""

    ties: Ties
    leaves: dict[Key, Axes]
    makers: dict[Key, tuple[int, ...]]

    def roots(self, key: Key, axis: int) -> np.ndarray:
        """The channel at each position of an axis."""
        return self.ties.roots(np.asarray(self.leaves[key].labels[axis]))


def _cut(
    who: str,
    apply: Callable[..., Any],
    params: Any,
    args: tuple[Any, ...],
    sparsity: float | None,
    keep: Mapping[str, int] | None,
    score: str | Any,
) -> Cut:
    if (sparsity is None) == (keep is None):
        raise ValueError(f"{who}: give either sparsity= or keep=.")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"{who}: sparsity must lie in [0, 1), got {sparsity}.")
    for name, leaf in named_leaves(params)[0]:
        if is_quantized(leaf):
            raise ValueError(f"{name}: is quantized ({leaf.format}): {who} needs float parameters.")
    found = _analysed(apply, params, args)
    scores = _scores(found, params, score)
    is_head = {found.ties.root(x) for x in found.ties.heads}
    sets = [s for s in _sets(found) if (who == "heads") == bool(s & is_head)]
    gone: set[int] = set()
    for members, stay in _wanted(who, found, sets, sparsity, keep):
        ranked = sorted(members, key=lambda x: (scores[x], x))
        gone.update(ranked[: len(members) - stay])
    return _without(found, params, gone)


def _analysed(apply: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> _Found:
    shapes = {path: tuple(x.shape) for path, x in named_leaves(params)[0] if is_array(x)}
    ties = Ties()
    leaves, _ = interpret(Widths(ties, shapes), flatten(apply, params, *args))
    outputs: dict[str, set[int]] = {}
    for site in sites(apply, params, *args):
        outputs.setdefault(site.path, set()).update(a + site.layers for a in site.output)
    makers = {
        key: tuple(sorted(a - len(key[1]) for a in outputs.get(key[0], ()))) for key in leaves
    }
    return _Found(ties, leaves, makers)


def _sets(found: _Found) -> list[set[int]]:
    """Channels that lie on one axis of any parameter, and that products make: one width each."""
    made = {
        int(x) for key, axes in found.makers.items() for a in axes for x in found.roots(key, a)
    } - {FIXED}
    sets: list[set[int]] = []
    for key, axes in found.leaves.items():
        for a in range(len(axes.labels)):
            own = {int(x) for x in found.roots(key, a)} & made
            if own:
                met = [s for s in sets if s & own]
                sets = [s for s in sets if not s & own] + [own.union(*met)]
    return sorted(sets, key=min)


def _wanted(
    who: str,
    found: _Found,
    sets: Sequence[set[int]],
    sparsity: float | None,
    keep: Mapping[str, int] | None,
) -> list[tuple[set[int], int]]:
    """Of each set that loses channels, how many stay."""
    paths = sorted({path for path, _ in found.leaves})
    if sparsity is not None:
        if not sets:
            raise ValueError(f"{who}: nothing can be cut: {_reasons(found, paths)}.")
        return [(s, len(s) - min(math.floor(sparsity * len(s) + 1e-9), len(s) - 1)) for s in sets]
    wanted = []
    for path, stay in (keep or {}).items():
        matching(paths, path)
        keys = [key for key in found.makers if key[0] == path]
        for key in keys:
            own = {int(x) for a in found.makers[key] for x in found.roots(key, a)}
            met = [s for s in sets if s & own]
            if len(met) != 1:
                why = f"{len(met)} sets of them" if met else _reasons(found, [path])
                raise ValueError(f"{path}: its {who} can not be cut: {why or 'none are its own'}.")
            if not 0 < stay <= len(met[0]):
                raise ValueError(f"{path}: has {len(met[0])} {who}, can not keep {stay!r}.")
            wanted.append((met[0], stay))
    return wanted


def _reasons(found: _Found, paths: Sequence[str]) -> str:
    """Why the channels that these make stay."""
    out = []
    for key, axes in found.makers.items():
        labels = [np.asarray(found.leaves[key].labels[a]) for a in axes]
        why = [w for x in labels for w in found.ties.why(x)]
        if key[0] in paths and why:
            out.append(f"{key[0]}: {'; '.join(dict.fromkeys(why))}")
    return ", ".join(dict.fromkeys(out))


def _scores(found: _Found, params: Any, score: str | Any) -> dict[int, float]:
    """Of every channel, summed over all that makes it, in float64."""
    if isinstance(score, str) and score not in ("l1", "l2"):
        raise ValueError(f"score must be 'l1', 'l2' or a tree of scores, got {score!r}.")
    given = dict(named_leaves(params if isinstance(score, str) else score)[0])
    total: dict[int, float] = {}
    for key, axes in found.makers.items():
        path, layer = key
        if not axes:
            continue
        if path not in given or np.shape(given[path]) != np.shape(
            dict(named_leaves(params)[0])[path]
        ):
            raise ValueError(f"{path}: expected scores of its shape in score=.")
        x = np.asarray(given[path][layer] if layer else given[path]).astype(np.float64)
        x = {"l1": np.abs, "l2": np.square}[score](x) if isinstance(score, str) else x
        for a in axes:
            sums = x.sum(tuple(b for b in range(x.ndim) if b != a))
            for root, value in zip(found.roots(key, a).tolist(), sums.tolist(), strict=True):
                total[root] = total.get(root, 0.0) + value
    return total


def _without(found: _Found, params: Any, gone: set[int]) -> Cut:
    """The parameters without these channels."""
    named, structure = named_leaves(params)
    out = np.fromiter(gone, np.int64, len(gone))
    smaller: list[Any] = []
    masks: list[Any] = []
    widths: dict[str, tuple[int, ...]] = {}
    for name, leaf in named:
        keys = [key for key in found.leaves if key[0] == name]
        kept = {
            key[1]: [
                ~np.isin(found.roots(key, a), out) for a in range(len(found.leaves[key].labels))
            ]
            for key in keys
        }
        if all(axis.all() for axes in kept.values() for axis in axes):
            smaller.append(leaf)
            masks.append(None)
            continue
        x, lead = jnp.asarray(leaf), len(keys[0][1])
        parts, mask = [], np.ones(x.shape, bool)
        layers = list(np.ndindex(x.shape[:lead]))
        for layer in layers:
            axes = kept.get(layer) or [np.ones(n, bool) for n in x.shape[lead:]]
            grid = np.ix_(*axes)
            own = np.zeros(x.shape[lead:], bool)
            own[grid] = True
            mask[layer] = own
            parts.append(x[layer][grid])
        if len({part.shape for part in parts}) > 1:
            raise ValueError(
                f"{name}: its layers would keep different widths and are one array: "
                f"{sorted({part.shape for part in parts})}."
            )
        new = jnp.stack(parts).reshape(*x.shape[:lead], *parts[0].shape) if lead else parts[0]
        smaller.append(new)
        masks.append(jnp.asarray(mask))
        widths[name] = tuple(new.shape)
    return Cut(jax.tree.unflatten(structure, smaller), widths, jax.tree.unflatten(structure, masks))
