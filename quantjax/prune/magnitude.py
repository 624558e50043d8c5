"""Which weights can go? Those of least magnitude.
Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015,
arXiv:1506.02626; over all layers at once or in each: Zhu and Gupta 2017, arXiv:1710.01878."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from quantjax.paths import named_leaves
from quantjax.policy import Policy, Resolved
from quantjax.prune.select import chosen, is_known, tree_of

Sparsity = float | jax.Array


def magnitude(
    params: Any,
    which: str | Sequence[str] | Policy | Resolved,
    sparsity: Sparsity,
    scope: str = "global",
) -> Any:
    """Masks that leave out the weights of least |w|: a tree like `params` of booleans, False where
    a weight is pruned, and None at the leaves that are kept whole.

    which: a pattern of paths or several, or a policy, whose quantized leaves are pruned.
    sparsity: the share s in [0, 1) that is left out, round(s n) of n weights; of equal ones the
    first go. It may be traced, as a `Cubic` gives it under jit; it then is exact to float32.
    scope: "global" ranks the weights of all leaves together, "layer" each leaf's on their own.

    Weights that are zero already go first: masks of a growing sparsity are nested if they are
    applied in between. Gives masks only: see `apply` and `masked`. Raises ValueError for a sparsity
    outside [0, 1), a pattern that matches nothing, leaves that are no float arrays, and, outside
    jit, NaN.

    >>> w = {"a": jnp.array([0.1, -3.0]), "b": jnp.array([[-0.2], [2.0]])}
    >>> masks = magnitude(w, "*", 0.5)
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([False, True], [[False], [True]])
    >>> magnitude(w, "b", 0.5)["a"] is None
    True
    """
    if scope not in ("global", "layer"):
        raise ValueError(f"magnitude: scope must be 'global' or 'layer', got {scope!r}.")
    if is_known(sparsity) and not 0 <= float(sparsity) < 1:
        raise ValueError(f"magnitude: sparsity must lie in [0, 1), got {float(sparsity)}.")
    names = chosen(params, which)
    sizes = {
        name: jnp.abs(jnp.asarray(x).astype(jnp.float32))
        for name, x in named_leaves(params)[0]
        if name in names
    }
    for name, x in sizes.items():
        if is_known(x) and np.isnan(x).any():
            raise ValueError(f"{name}: holds NaN, which has no magnitude.")
    if scope == "layer":
        return tree_of(params, {name: _largest(x, sparsity) for name, x in sizes.items()})
    kept = _largest(jnp.concatenate([x.ravel() for x in sizes.values()]), sparsity)
    ends = np.cumsum([x.size for x in sizes.values()])[:-1].tolist()
    parts = zip(sizes.items(), jnp.split(kept, ends), strict=True)
    return tree_of(params, {name: part.reshape(x.shape) for (name, x), part in parts})


def _largest(x: Float[Array, "*n"], sparsity: Sparsity) -> Bool[Array, "*n"]:
    """Where the entries are that stay if this share of the smallest goes."""
    out = round(float(sparsity) * x.size) if is_known(sparsity) else jnp.round(sparsity * x.size)
    order = jnp.argsort(x.ravel(), stable=True)
    stays = jnp.arange(x.size) >= out
    return jnp.zeros(x.size, bool).at[order].set(stays, unique_indices=True).reshape(x.shape)
