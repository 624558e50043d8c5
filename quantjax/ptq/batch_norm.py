"""How do batch norms leave a network, so that what is quantized is what is multiplied? Folded into
the products before them.
Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", 2018, arXiv:1712.05877, section 3.2.

norm(product(x, w) + b) with stored statistics is (product(x, w) + b - mean) * a + shift. The
weights take the factor a along their outputs; b and the mean take it, and the gain is divided by
it. The norm is then y - mean + shift, and the network the same function."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from quantjax.interpret.method import Run
from quantjax.interpret.norms import Norm, Reader, find_norms, layer_reader, multiplier
from quantjax.interpret.pieces import arguments
from quantjax.interpret.scaling import ScaleGroup, Solved, group_of, scaled, solve
from quantjax.interpret.unknowns import ONE
from quantjax.paths import named_leaves

# Of the multiplier that is left: a root, a sum, a product and a quotient, each rounded.
_ROUNDING = 16 * float(jnp.finfo(jnp.float32).eps)


def fold(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Any:
    """The tree in which the norms with stored statistics only shift: w' = w * a for each output.

    Norms are found by what they compute, in any framework. A norm that can not be folded stays as
    it is, and a warning says why; so do channels whose factor is zero. Batch norms that normalize
    by the batch itself are none of these. The arguments are those of `apply`, evaluating.

    >>> def apply(p, x):
    ...     y = (x @ p["w"] - p["mean"]) * (p["gain"] / jnp.sqrt(p["var"] + 1e-5))
    ...     return y + p["shift"]
    >>> p = {"w": jnp.ones((1, 2)), "mean": jnp.array([1.0, 0.0]), "gain": jnp.array([2.0, 3.0])}
    >>> p |= {"var": jnp.array([4.0, 1.0]), "shift": jnp.zeros(2)}
    >>> [round(w, 3) for w in fold(apply, p, jnp.ones((1, 1)))["w"][0].tolist()]
    [1.0, 3.0]
    """
    groups = _folding(apply, params, *args, **kwargs)
    return scaled(params, groups)


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm:
    """See `fold_batch_norm`."""

    def __call__(self, run: Run) -> Run:
        run.floats_only("fold_batch_norm")
        groups = _folding(run.apply, run.tree, *arguments(run.batches[0]))
        trees = {"tree": scaled(run.tree, groups), "reference": scaled(run.reference, groups)}
        return dataclasses.replace(run, **trees)


def fold_batch_norm() -> FoldBatchNorm:
    """The method that folds batch norms into the products before them; see `fold`. It goes before
    methods that quantize."""
    return FoldBatchNorm()


def _folding(
    apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> list[tuple[ScaleGroup, Any]]:
    """The groups to scale, and by how much."""
    solved = solve(apply, (params, *args), kwargs)
    reader, norms = find_norms(solved)
    groups: list[tuple[ScaleGroup, Any]] = []
    taken: set[int] = set()
    for norm in norms:
        found = _folded(norm, solved, reader, params, taken)
        if isinstance(found, str):
            warnings.warn(f"{norm.name}: not folded: {found}.", stacklevel=3)
        else:
            groups.append(found)
    return groups


def _folded(
    norm: Norm, solved: Solved, reader: Reader, params: Any, taken: set[int]
) -> tuple[ScaleGroup, Any] | str:
    """The group of one norm and its factors, or why there is none."""
    node = np.unique(norm.multipliers[0][2].node)
    node = node[node != ONE]
    if not node.size:
        return "what is multiplied is used elsewhere, so that it keeps its scale"
    if taken & set(node.tolist()):
        return "another norm was folded into the same weights"
    if norm.gain is None:
        return "it has no gain of its own that could be divided by the factor"
    group = group_of(solved, node)
    if group.consumers:
        names = ", ".join(x.leaf.name for x in group.consumers)
        return f"its input is used by other products as well: {names}"
    tree = dict(named_leaves(params)[0])
    a = multiplier(norm, reader, layer_reader(tree), node)
    if a is None:
        return "it does not multiply a channel by one number"
    usable = np.isfinite(a) & (a != 0) & ~(group.positive & (a < 0))
    if not usable.any():
        return "no channel has a factor that one can divide by"
    s = jnp.asarray(np.where(usable, a, 1.0), jnp.float32)
    after = dict(named_leaves(scaled(params, [(group, s)]))[0])
    left = multiplier(norm, reader, layer_reader(after), node)
    if left is None or (np.abs(left - 1) > _ROUNDING)[usable].any():
        return "no change of its own parameters makes it a mere shift"
    if not usable.all():
        channels = np.flatnonzero(~usable).tolist()
        warnings.warn(
            f"{norm.name}: channels {channels} are not folded: their factor is zero, not finite, "
            f"or negative before a relu.",
            stacklevel=4,
        )
    taken.update(node.tolist())
    return group, s
