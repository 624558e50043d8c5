"""GPTQ: round a weight matrix column by column, and let later columns undo each column's error.
Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv:2210.17323, algorithm 1.

The factor H = L L' of Chee et al. 2023, arXiv:2307.13304 (section 4.1, the same algorithm), stands
in for the inverse's: with e = w - q, e'He = sum_j L_jj^2 (e_j + sum_{k > j} F_kj e_k)^2 where
F = L / diag(L), so a column rounds w_j + sum_{k > j} F_kj e_k, the last one first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from quantjax.formats import Format
from quantjax.ptq.factor import Factor, damped_cholesky
from quantjax.ptq.matrix import Cells, on_grid
from quantjax.ptq.sweep import LARGE, each_cell, sweep


class Rounded(NamedTuple):
    """A matrix on its grid, and what a caller has to know of how it came there.

    error, nearest_error: (w - q)' H (w - q) of every output, and the same of rounding to nearest.
    damping: the share of the mean of diag(H) that was added. ok: whether H could be factored; if
    not, q is w rounded to nearest, and the caller says so.
    """

    q_OI: Float[Array, "o i"]
    error_O: Float[Array, " o"]
    nearest_error_O: Float[Array, " o"]
    damping: Float[Array, ""]
    ok: Bool[Array, ""]


def gptq_matrix(
    w_OI: Float[Array, "o i"],
    h_II: Float[Array, "i i"],
    cells: Cells,
    format: Format,
    *,
    damping: float = 0.01,
    act_order: bool = True,
) -> Rounded:
    """The values on the grid of `cells` that GPTQ finds for min_q sum_o (w_o - q_o)' H (w_o - q_o).

    h_II: E[x x'] of the inputs, float32. cells: broadcastable to w_OI; as they are fixed before,
    the order of the columns leaves no trace. act_order: the largest diag(H) first. damping: see
    `damped_cholesky`. An input that was never seen is rounded to nearest, as is an output for
    which nearest turns out better: clipping can make it so.
    """
    n = len(h_II)
    order = jnp.argsort(jnp.diagonal(h_II)) if act_order else jnp.arange(n)[::-1]
    w_IO = w_OI.T[order]
    cells = each_cell(lambda x: x.T[order] if x.shape[-1] > 1 else x.T, cells)
    factor = damped_cholesky(h_II[order[:, None], order], damping)
    root_I = jnp.diagonal(factor.lower_II)
    q_IO, lost_O = sweep(w_IO, w_IO, factor.lower_II / root_I, root_I * root_I, cells, format)
    nearest_IO = on_grid(w_IO, cells, format)
    nearest_lost_O = _lost(w_IO - nearest_IO, factor.lower_II)

    # Damping counts in what was minimised, not in what is compared. NaN compares false.
    error_O = _undamped(lost_O, w_IO - q_IO, factor)
    nearest_error_O = _undamped(nearest_lost_O, w_IO - nearest_IO, factor)
    better_O = error_O < nearest_error_O
    q_IO = jnp.where(better_O, q_IO, nearest_IO)
    error_O = jnp.where(better_O, error_O, nearest_error_O)
    inverse = jnp.zeros(n, order.dtype).at[order].set(jnp.arange(n, dtype=order.dtype))
    return Rounded(q_IO[inverse].T, error_O, nearest_error_O, factor.damping, factor.ok)


def _lost(e_IO: Float[Array, "i o"], lower_II: Float[Array, "i i"]) -> Float[Array, " o"]:
    """|L'e|^2 of every output, over the lower half of L alone."""
    total_O = jnp.zeros(e_IO.shape[1], jnp.float32)
    for start in range(0, len(e_IO), LARGE):
        part = lower_II[start:, start : start + LARGE].T @ e_IO[start:]
        total_O += (part * part).sum(0)
    return total_O


def _undamped(lost_O: jax.Array, e_IO: jax.Array, factor: Factor) -> Float[Array, " o"]:
    """e'He, from the same of the damped H."""
    return jnp.maximum(lost_O - factor.damping * (e_IO * e_IO).sum(0), 0) * factor.unit
