"""What is left to gain once a matrix is rounded? Its codes given its scales, and its scales given
its codes, in turn; the error of the outputs never rises.

Codes: one weight after another takes its best level given all others, coordinate descent in the
norm of H (Behdin et al. 2023, QuantEase, arXiv:2309.01885; Chee et al. 2023, arXiv:2307.13304,
section 4.2, call it greedy). Scales: for levels l the error is quadratic in them, and its minimum
solves (l'Hl) s = l'Hw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.formats import Format
from quantjax.ptq.factor import exact_product
from quantjax.ptq.matrix import Cells, on_grid
from quantjax.ptq.sweep import each_cell, sweep
from quantjax.ptq.tiling import Tiling, over_matrices
from quantjax.scales import inverse

# B matrices of O outputs and I inputs; "s" is the shape of the scales.
STEPS = 6  # of the conjugate gradients that fit scales
WIDEST = np.float32(4)  # how far a fitted scale may lie from the one before


def descended(
    q_OI: Float[Array, "o i"],
    slope_OI: Float[Array, "o i"],
    h_II: Float[Array, "i i"],
    cells: Cells,
    format: Format,
) -> Float[Array, "o i"]:
    """One sweep of coordinate descent over the columns, from the last to the first.

    q_j <- D(Q(q_j + slope_j / H_jj)) with slope = (w - q) H kept up to date: the level nearest to
    the best value that column j can have while the others stay. Inputs that were never seen keep
    their weights.
    """
    curve_I = jnp.diagonal(h_II)
    share_I = jnp.where(curve_I > 0, 1 / jnp.where(curve_I > 0, curve_I, 1), 0)
    base_IO = q_OI.T + slope_OI.T * share_I[:, None]
    own = each_cell(jnp.transpose, cells)
    found_IO, _ = sweep(base_IO, q_OI.T, h_II * share_I, curve_I, own, format)
    return found_IO.T


def fitted(
    w_BOI: Float[Array, "b o i"],
    q_BOI: Float[Array, "b o i"],
    h_BII: Float[Array, "b i i"],
    scale: Float[Array, "*s"],
    tiling: Tiling,
) -> Float[Array, "*s"]:
    """The scales that lose least of the outputs with the levels of q: by conjugate gradients from
    `scale`, at once for all scales that an output has; exact after one step where it has one."""
    level_BOI = q_BOI * inverse(tiling.spread(scale))
    curve_B1I = jnp.diagonal(h_BII, axis1=1, axis2=2)[:, None]
    diagonal = tiling.sums(level_BOI * level_BOI * curve_B1I)
    scaling = jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0)

    def ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
        return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), 0)

    def step(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, left, along, size = state
        bent = tiling.sums(level_BOI * exact_product(level_BOI * tiling.spread(along), h_BII))
        length = ratio(size, tiling.together(along * bent))
        x, left = x + length * along, left - length * bent
        ahead = scaling * left
        new = tiling.together(left * ahead)
        return x, left, ahead + ratio(new, size) * along, new

    left = tiling.sums(level_BOI * exact_product(w_BOI - q_BOI, h_BII))
    along = scaling * left
    start = (scale, left, along, tiling.together(left * along))
    x = lax.fori_loop(0, STEPS if tiling.several else 1, step, start)[0]
    return jnp.clip(x, scale / WIDEST, scale * WIDEST)


def refined(
    w_BOI: Float[Array, "b o i"],
    q_BOI: Float[Array, "b o i"],
    h_BII: Float[Array, "b i i"],
    scale: Float[Array, "*s"],
    cells: Cells,
    format: Format,
    tiling: Tiling,
    *,
    rounds: int,
    fit: bool,
) -> tuple[Float[Array, "b o i"], Float[Array, "*s"]]:
    """Values on the grid and their scales, after `rounds` of both in turn. fit: whether the scales
    may change. New scales are taken for those outputs whose error they lower."""

    nearest = jax.vmap(functools.partial(on_grid, format=format))

    def on(scale: jax.Array) -> Cells:
        return cells._replace(scale=tiling.spread(scale))

    def error(e_BOI: jax.Array, slope_BOI: jax.Array) -> jax.Array:
        return tiling.of_outputs((e_BOI * slope_BOI).sum(-1))

    def one(q_BOI: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        slope_BOI = exact_product(w_BOI - q_BOI, h_BII)
        if fit:
            other = fitted(w_BOI, q_BOI, h_BII, scale, tiling)
            level_BOI = q_BOI * inverse(tiling.spread(scale))
            moved_BOI = nearest(level_BOI * tiling.spread(other), on(other))
            moved_slope_BOI = exact_product(w_BOI - moved_BOI, h_BII)
            before, after = (
                error(w_BOI - q_BOI, slope_BOI),
                error(w_BOI - moved_BOI, moved_slope_BOI),
            )
            better = after < before
            scale = jnp.where(better, other, scale)
            q_BOI = tiling.where(better, moved_BOI, q_BOI)
            slope_BOI = tiling.where(better, moved_slope_BOI, slope_BOI)
        descend = functools.partial(descended, format=format)
        return over_matrices(descend, q_BOI, slope_BOI, h_BII, on(scale)), scale

    return lax.fori_loop(0, rounds, lambda _, state: one(*state), (q_BOI, scale))
