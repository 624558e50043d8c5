"""GPTQ: round a weight matrix column by column, and let later columns undo each column's error.
Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv:2210.17323, algorithm 1.

The factor H = L L' of Chee et al. 2023, arXiv:2307.13304 (section 4.1, the same algorithm), stands
in for the inverse's: with e = w - q, e'He = sum_j L_jj^2 (e_j + sum_{k > j} F_kj e_k)^2 where
F = L / diag(L), so a column rounds w_j + sum_{k > j} F_kj e_k, the last one first."""

import dataclasses
import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from quantjax import affine
from quantjax.affine import Scales, scale_values
from quantjax.formats import Format
from quantjax.policy import Policy, Resolved
from quantjax.ptq.factor import Factor, damped_cholesky, divided, exact_product
from quantjax.ptq.layerwise import Layerwise, Problem
from quantjax.ptq.matrix import Cells, on_grid
from quantjax.ptq.moments import Moments
from quantjax.ptq.refine import refined
from quantjax.ptq.sweep import LARGE, each_cell, sweep
from quantjax.ptq.tiling import Tiling, over_matrices
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec

RANGE = (0.7, 1.45)  # of the policy's scales, in which others are tried


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
    return round_columns(w_OI, prepared(h_II, damping, act_order=act_order), cells, format)


class Prepared(NamedTuple):
    """What GPTQ asks of H, whatever the weights: the order of its inputs, the last to be rounded
    first, and the factor of H in that order."""

    order_I: Int[Array, " i"]
    factor: Factor


def prepared(h_II: Float[Array, "i i"], damping: float, *, act_order: bool) -> Prepared:
    """See `gptq_matrix`."""
    order_I = jnp.argsort(jnp.diagonal(h_II)) if act_order else jnp.arange(len(h_II))[::-1]
    return Prepared(order_I, damped_cholesky(h_II[order_I[:, None], order_I], damping))


def round_columns(
    w_OI: Float[Array, "o i"], of_h: Prepared, cells: Cells, format: Format
) -> Rounded:
    """`gptq_matrix` with what it asks of H at hand."""
    order_I, factor = of_h
    w_IO = w_OI.T[order_I]
    cells = each_cell(lambda x: x.T[order_I] if x.shape[-1] > 1 else x.T, cells)
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
    back_I = jnp.zeros_like(order_I).at[order_I].set(jnp.arange(len(order_I), dtype=order_I.dtype))
    return Rounded(q_IO[back_I].T, error_O, nearest_error_O, factor.damping, factor.ok)


def _lost(e_IO: Float[Array, "i o"], lower_II: Float[Array, "i i"]) -> Float[Array, " o"]:
    """|L'e|^2 of every output, over the lower half of L alone."""
    total_O = jnp.zeros(e_IO.shape[1], jnp.float32)
    for start in range(0, len(e_IO), LARGE):
        part = exact_product(lower_II[start:, start : start + LARGE].T, e_IO[start:])
        total_O += (part * part).sum(0)
    return total_O


def _undamped(lost_O: jax.Array, e_IO: jax.Array, factor: Factor) -> Float[Array, " o"]:
    """e'He, from the same of the damped H."""
    return jnp.maximum(lost_O - factor.damping * (e_IO * e_IO).sum(0), 0) * factor.unit


def _aimed(
    w_OI: Float[Array, "o i"],
    h_II: Float[Array, "i i"],
    cross_II: Float[Array, "i i"],
    *,
    damping: float,
) -> Float[Array, "o i"]:
    """w E[f x'] E[x x']^-1: the weights whose outputs on x are nearest to those of w on f; damped
    towards w."""
    more_OI = exact_product(w_OI, cross_II - h_II)
    return w_OI + divided(more_OI, damped_cholesky(h_II, damping))


_found = jax.jit(affine.find_scales, static_argnames="spec")


@functools.partial(jax.jit, static_argnames=("method", "spec", "tiling"))
def _solved(
    w_BOI: Float[Array, "b o i"],
    moments: Moments,
    scales: Scales,
    *,
    method: "GPTQ",
    spec: QuantSpec,
    tiling: Tiling,
) -> tuple[jax.Array, Scales, Bool[Array, " b"]]:
    """The values on the grid, the scales that they lie on, and which H could be factored."""
    h_BII = moments.h
    if moments.cross is not None:
        aimed = functools.partial(_aimed, damping=method.damping)
        w_BOI = over_matrices(aimed, w_BOI, h_BII, moments.cross)
    prepare = functools.partial(prepared, damping=method.damping, act_order=method.act_order)
    of_h = over_matrices(lambda _, h_II: prepare(h_II), w_BOI, h_BII)
    cells = tiling.form.cells(scales, spec, tiling.shape)
    free = spec.scale_format is None  # a scale may be any number, not only one of a grid
    steps = scale_values(scales.scale)
    fractions = jnp.asarray(_fractions(method.candidates if free else 1))
    solve = functools.partial(round_columns, format=spec.format)

    def better(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best, q_BOI, scale = state
        own = cells._replace(scale=cells.scale * fractions[i])
        found = over_matrices(solve, w_BOI, of_h, own)
        error = tiling.of_outputs(found.error_O)
        lower = ~(error >= best)  # NaN, where H could not be factored, takes the first
        q_BOI = tiling.where(lower, found.q_OI, q_BOI)
        return jnp.minimum(error, best), q_BOI, jnp.where(lower, steps * fractions[i], scale)

    start = (jnp.full(steps.shape, jnp.inf), w_BOI, steps)
    _, q_BOI, scale = lax.fori_loop(0, len(fractions), better, start)
    if method.rounds:
        added_B = of_h.factor.damping * of_h.factor.unit
        damped_BII = h_BII + added_B[:, None, None] * jnp.eye(h_BII.shape[-1])
        q_BOI, scale = refined(
            w_BOI, q_BOI, damped_BII, scale, cells, spec.format, tiling,
            rounds=method.rounds, fit=free,
        )  # fmt: skip
    return q_BOI, scales._replace(scale=scale) if free else scales, of_h.factor.ok


def _fractions(candidates: int) -> np.ndarray:
    """Of the scales: as they are, and others evenly spread in ratio."""
    return np.append(1, np.geomspace(*RANGE, candidates - 1)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """The solver of one parameter; see `gptq`."""

    damping: float
    act_order: bool
    candidates: int
    rounds: int
    paired: bool

    def __call__(self, problem: Problem) -> QTensor:
        """The parameter, column by column."""
        spec, tiling = problem.spec, Tiling(problem.form, problem.spec.block_shape, problem.w.shape)
        scales = _found(problem.w, spec=spec)
        q_BOI, scales, ok_B = _solved(
            problem.w_BOI, problem.moments, scales, method=self, spec=spec, tiling=tiling
        )
        if not jax.device_get(ok_B).all():
            warnings.warn(
                f"{problem.name}: the moments of its inputs are far from positive semidefinite, "
                f"and could not be factored; rounded to nearest.",
                stacklevel=2,
            )
        return problem.stored(q_BOI, scales)


def gptq(
    policy: Policy | Resolved | str,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    candidates: int = 8,
    rounds: int = 2,
    paired: bool = True,
    sequential: bool = True,
) -> Layerwise:
    """The method that rounds every product's weights column by column, errors handed on.

    min_q E |W x - q x|^2 over the grid of `policy`, any format and granularity; x are the inputs
    after the quantized layers before (`sequential`). damping: the share of the mean of diag(H)
    added to it, raised by tens where that can not be factored. act_order: the inputs with the
    largest E[x^2] first; the scales are fixed before, so it leaves no trace in the result.

    Three things go beyond the paper, which `candidates=1, rounds=0, paired=False` leaves out.
    candidates: how many multiples of the policy's scales GPTQ is tried with; every output takes
    its best. rounds: of coordinate descent on the codes and a fit of the scales to them (see
    `quantjax.ptq.refine`). Neither raises the error; scales that are stored in few bits are kept.
    paired: aim at the outputs of the float model's own inputs f, min_q E |W f - q x|^2, so that a
    layer makes up for those before it (Li et al. 2025, GPTAQ, arXiv:2504.02692).

    An output that rounding to nearest serves better keeps that. Raises ValueError for options out
    of range. Warns, with the path, where H can not be factored. Source: Frantar et al. 2022,
    arXiv:2210.17323.

    >>> import quantjax as qj
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (8, 4))}
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> def loss(p):
    ...     return float(((apply(qj.dequantize(p), x) - apply(params, x)) ** 2).mean())
    >>> found = qj.calibrate(apply, params, [x], gptq("w3"))
    >>> loss(found) < 0.5 * loss(qj.quantize(params, "w3"))
    True
    """
    if not 0 <= damping < math.inf:
        raise ValueError(f"gptq: damping must be 0 or more, got {damping!r}.")
    if candidates < 1 or rounds < 0:
        raise ValueError(f"gptq: candidates >= 1 and rounds >= 0, got {candidates!r}, {rounds!r}.")
    return Layerwise(policy, GPTQ(damping, act_order, candidates, rounds, paired), sequential)
