"""Which parameters are pruned? Those that patterns or a policy name; and which mask is whose?"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.fake_quantized import is_quantized
from quantjax.paths import compile_pattern, named_leaves, nearest
from quantjax.policy import Policy, Resolved

Patterns = str | Sequence[str]


def chosen(params: Any, which: Patterns | Policy | Resolved, sites: Sequence[Any] = ()) -> set[str]:
    """The paths of the float arrays to prune: those that any pattern matches, or that a policy
    would quantize.

    Raises ValueError for a pattern that matches nothing, with the nearest names, for a leaf that is
    no float array or is quantized, and if nothing is left to prune.
    """
    leaves = dict(named_leaves(params)[0])
    if isinstance(which, Policy | Resolved):
        resolved = which.resolve(params, sites)
        names = {name for name, found in resolved.leaves if found.spec is not None}
    else:
        names = matching(list(leaves), which)
    if not names:
        raise ValueError("prune: the policy quantizes no parameter of this tree; name patterns.")
    for name in sorted(names):
        x = leaves[name]
        if is_quantized(x):
            raise ValueError(
                f"{name}: is quantized already ({x.format}): find the mask on the float "
                f"parameters, then put it on this tree with prune.apply."
            )
        dtype = getattr(x, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{name}: expected an array of floats to prune, got {x!r}.")
    return names


def matching(names: Sequence[str], patterns: Patterns) -> set[str]:
    """The names that any of the patterns matches; ValueError for a pattern without any."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        regex = compile_pattern(pattern)
        own = {name for name in names if regex.fullmatch(name)}
        if not own:
            raise ValueError(
                f"pattern {pattern!r} matches no parameter. Nearest: {nearest(pattern, names)}."
            )
        found |= own
    return found


def by_name(tree: Any, masks: Any) -> dict[str, jax.Array]:
    """The mask of every leaf of `tree` that has one, by path.

    Raises ValueError, naming the leaf, for a mask of another shape or that is not boolean, and for
    one of a leaf that is not there.
    """
    leaves, given = named_leaves(tree)[0], named_leaves(masks)[0]
    shapes = {name: tuple(np.shape(x)) if not is_quantized(x) else x.shape for name, x in leaves}
    found = dict(given)
    if len(found) < len(given):
        raise ValueError("masks: two leaves have one name, and can not be told apart.")
    for name, mask in given:
        if name not in shapes:
            raise ValueError(
                f"{name}: a mask for a parameter that is not there. Nearest: "
                f"{nearest(name, shapes)}."
            )
        dtype = getattr(mask, "dtype", None)
        if dtype != np.dtype(bool):
            raise ValueError(f"{name}: expected a mask of booleans, got {mask!r}.")
        if tuple(mask.shape) != shapes[name]:
            raise ValueError(
                f"{name}: expected a mask of shape {shapes[name]}, got {tuple(mask.shape)}."
            )
    return {name: jnp.asarray(mask) for name, mask in found.items()}


def tree_of(params: Any, found: dict[str, jax.Array]) -> Any:
    """A tree like `params` with what was found for its leaves, None for the others."""
    named, structure = named_leaves(params)
    return jax.tree.unflatten(structure, [found.get(name) for name, _ in named])


def is_known(x: Any) -> bool:
    """Whether the numbers of an array can be looked at: not while a function is traced."""
    return not isinstance(x, jax.core.Tracer)
