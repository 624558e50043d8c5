"""Which n of every m weights in a row stay? The largest; products of such weights can be fast.
Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378, section 4."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from quantjax.axes import FIRST, LAST, WINDOW
from quantjax.interpret.products import CONV
from quantjax.paths import named_leaves
from quantjax.policy import Policy, Resolved
from quantjax.prune.select import chosen, tree_of


def n_m(
    params: Any,
    which: str | Sequence[str] | Policy | Resolved,
    n: int = 2,
    m: int = 4,
    *,
    sites: Sequence[Any] = (),
) -> Any:
    """Masks with n of every m weights in a row, along what their product sums over: 2:4 and such.

    A tree like `params` of booleans, False where a weight is pruned, None at leaves kept whole. In
    every m weights of one output the n largest |w| stay, of equal ones the first. The weights lie
    along the input channels of a convolution, the same place of its window, and along all the axes
    that another product sums over, in their order, as if they were one.

    which: as in `magnitude`. sites: of the model (`quantjax.sites`), which tell the axes; without,
    names do for matrices and images' kernels: the last axis of a `kernel` or `w` is the output, the
    first of a `weight`. Raises ValueError, naming the leaf, where m does not divide the axis, where
    nothing tells the axis or two products sum over different ones.

    >>> w = {"kernel": jnp.array([[4.0], [1.0], [-3.0], [2.0]])}
    >>> n_m(w, "kernel")["kernel"][:, 0].tolist()
    [True, False, True, False]
    """
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n < m):
        raise ValueError(f"n_m: expected whole numbers 0 < n < m, got n={n!r}, m={m!r}.")
    names = chosen(params, which, sites)
    masks = {}
    for name, leaf in named_leaves(params)[0]:
        if name in names:
            x = jnp.abs(jnp.asarray(leaf).astype(jnp.float32))
            axes = _summed(name, x.shape, [site for site in sites if site.path == name])
            length = int(np.prod([x.shape[a] for a in axes]))
            if length % m:
                raise ValueError(
                    f"{name}: {n}:{m} does not divide the {length} weights of shape {x.shape} that "
                    f"its product sums over, along axes {axes}."
                )
            rest = [a for a in range(x.ndim) if a not in axes]
            order = (*rest, *axes)
            rows = jnp.transpose(x, order)
            kept = _largest(rows.reshape(-1, m), n).reshape(rows.shape)
            masks[name] = jnp.transpose(kept, [order.index(a) for a in range(x.ndim)])
    return tree_of(params, masks)


def _largest(x_RM: Float[Array, "r m"], n: int) -> Bool[Array, "r m"]:
    """The n largest of every row, of equal ones the first."""
    rank = jnp.argsort(jnp.argsort(-x_RM, axis=1, stable=True), axis=1, stable=True)
    return rank < n


def _summed(name: str, shape: tuple[int, ...], sites: Sequence[Any]) -> tuple[int, ...]:
    """The axes along which the weights of one output lie in a row."""
    if sites:
        products = [site for site in sites if site.contracting]
        found = {_inputs(site) for site in products}
        if len(found) != 1:
            what = f"over axes {sorted(found)}" if found else "over none of its axes"
            raise ValueError(f"{name}: its products sum {what}; {shape} has no one row of weights.")
        return found.pop()
    last, rank = name.rsplit("/", 1)[-1], len(shape)
    image = rank == 4 and max(shape[2:] if last in FIRST else shape[:2]) <= WINDOW
    if last in LAST | FIRST and (rank == 2 or image):
        return (1,) if last in FIRST else (rank - 2,)
    raise ValueError(
        f"{name}: neither its name nor its shape {shape} tells the axes that its product sums "
        f"over: pass sites=quantjax.sites(apply, params, ...)."
    )


def _inputs(site: Any) -> tuple[int, ...]:
    """As axes of the whole parameter, layers included; of a convolution its input channels."""
    axes = site.contracting[:1] if site.primitive == CONV else sorted(site.contracting)
    return tuple(a + site.layers for a in axes)
