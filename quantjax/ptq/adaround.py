"""AdaRound: which way should every weight be rounded, for the least error of the layer's output?

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
arXiv:2004.10568. Without a nonlinearity the error of a layer is a quadratic form of the rounding
(its equations 8 and 20), so that the moments of the inputs are all that is asked of the data, and
a step costs one product of matrices. `reconstruct` is the same through whatever follows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import find_scales
from quantjax.formats import Format
from quantjax.policy import Policy, Resolved
from quantjax.ptq.layerwise import Layerwise, Problem
from quantjax.ptq.matrix import Cells, on_grid
from quantjax.ptq.soft_rounding import (
    Anneal,
    adam,
    adam_start,
    hardened,
    indecision,
    neighbours,
    softened,
    start_at,
)
from quantjax.qtensor import QTensor

# O outputs, I inputs
SWEEPS, COLUMNS = 2, 128  # of the descent that ends it; how many columns it takes together
STEPS = Anneal(1000)


def output_error(
    v_OI: Float[Array, "o i"],
    w_OI: Float[Array, "o i"],
    h_II: Float[Array, "i i"],
    r_OI: Float[Array, "o i"] | None = None,
) -> Float[Array, " o"]:
    """E (w f - v x)^2 of every output, up to what v does not change: e'He - 2 e'r with e = v - w,
    H = E[x x'] and r = w E[f x'] - w H, which is 0 (None) where f = x."""
    e_OI = v_OI - w_OI
    half = jnp.matmul(e_OI, h_II, precision="highest")
    return jnp.sum((half if r_OI is None else half - 2 * r_OI) * e_OI, axis=1)


def adaround_matrix(
    w_OI: Float[Array, "o i"],
    h_II: Float[Array, "i i"],
    cells: Cells,
    format: Format,
    *,
    cross_II: Float[Array, "i i"] | None = None,
    anneal: Anneal = STEPS,
) -> Float[Array, "o i"]:
    """The weights on the grid of `cells` that change the outputs least: argmin E |w f - v x|^2.

    h_II: E[x x'] of the inputs under v. cross_II: E[f x'], f the inputs of the float model; None
    where they are the same. Every weight is soft between its two neighbours, v = low +
    h(V) (high - low), and V follows the gradient 2 (v H - w E[f x']) and a push to one of the two;
    the loss of every output counts in units of what plain rounding loses. Then two sweeps of
    coordinate descent over all levels, from there and from rounding to nearest: each weight takes
    the best one given all others. Every output takes the better of the two ends.

    >>> from quantjax.formats import IntFormat
    >>> w, h = jnp.array([[0.4, 0.4, 0.4]]), jnp.ones((3, 3)) + 0.01 * jnp.eye(3)  # x1 = x2 = x3
    >>> adaround_matrix(w, h, Cells(jnp.ones((1, 1))), IntFormat(4)).sum()  # not 0: 1.2 was meant
    Array(1., dtype=float32)
    """
    cells = _each_row(lambda x: jnp.broadcast_to(x, w_OI.shape), cells)
    nearest_OI = on_grid(w_OI, cells, format)
    r_OI = None
    if cross_II is not None:
        r_OI = jnp.matmul(w_OI, cross_II - h_II, precision="highest")
    best = output_error(nearest_OI, w_OI, h_II)[:, None]
    unit_O1 = jnp.where(best > 0, w_OI.shape[1] / jnp.where(best > 0, best, 1), 0)
    between = neighbours(w_OI, cells, format)

    def step(i: jax.Array, state: tuple) -> tuple:
        v, moving = state
        soft_OI, back = jax.vjp(lambda v: softened(v, between), v)
        slope_OI = (soft_OI - w_OI) @ h_II
        slope_OI = 2 * unit_O1 * (slope_OI if r_OI is None else slope_OI - r_OI)
        weight, beta = anneal.push(i)
        push = jax.grad(indecision)(v, beta)
        return adam(v, back(slope_OI)[0] + weight * push, moving, anneal.rate)

    v = start_at(w_OI, between)
    v, _ = lax.fori_loop(0, anneal.steps, step, (v, adam_start(v)))
    # Outputs are independent: every start of one is an output of a larger problem.
    starts = [nearest_OI, hardened(v, between)]

    def each(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x] * len(starts))

    w_SI, r_SI, own = each(w_OI), None if r_OI is None else each(r_OI), _each_row(each, cells)
    found_SI = descended(jnp.concatenate(starts), w_SI, h_II, r_SI, own, format)
    errors_NO = output_error(found_SI, w_SI, h_II, r_SI).reshape(len(starts), -1)
    best_1OI = jnp.argmin(errors_NO, axis=0)[None, :, None]
    found_NOI = found_SI.reshape(len(starts), *w_OI.shape)
    return jnp.take_along_axis(found_NOI, best_1OI, axis=0)[0]


def _each_row(of: Callable[[jax.Array], jax.Array], cells: Cells) -> Cells:
    """The cells with what `of` makes of the arrays that have rows."""
    zero = None if cells.zero_point is None else of(cells.zero_point.astype(jnp.float32))
    return Cells(of(cells.scale), zero, cells.codebook)


def descended(
    v_OI: Float[Array, "o i"],
    w_OI: Float[Array, "o i"],
    h_II: Float[Array, "i i"],
    r_OI: Float[Array, "o i"] | None,
    cells: Cells,
    format: Format,
) -> Float[Array, "o i"]:
    """v after sweeps of coordinate descent: column by column the best levels given the others,
    those nearest to v_i - (e H - r)_i / H_ii. The error never rises. `cells` are of v's shape."""
    o, i = v_OI.shape
    k = min(i, COLUMNS)
    more = -i % k

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, more)))

    slope_OI = jnp.matmul(v_OI - w_OI, h_II, precision="highest")
    slope_OI = padded(slope_OI if r_OI is None else slope_OI - r_OI)
    h_II = jnp.pad(h_II, ((0, more), (0, more)))
    cells = _each_row(padded, cells)  # a scale of 0 makes a level of 0 of what is padded

    def column(t: jax.Array, state: tuple) -> tuple:
        v_OK, slope_OK, h_KK, block_cells = state
        own = _each_row(lambda x: x[:, t], block_cells)
        curve = h_KK[t, t]
        wanted = v_OK[:, t] - slope_OK[:, t] / jnp.where(curve > 0, curve, 1)
        new = jnp.where(curve > 0, on_grid(wanted, own, format), v_OK[:, t])
        slope_OK = slope_OK + (new - v_OK[:, t])[:, None] * h_KK[t]
        return v_OK.at[:, t].set(new), slope_OK, h_KK, block_cells

    def block(j: jax.Array, state: tuple) -> tuple:
        v_OI, slope_OI = state
        first = (j % (h_II.shape[0] // k)) * k

        def cut(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, first, k, 1)

        h_KI = lax.dynamic_slice_in_dim(h_II, first, k, 0)
        start = (cut(v_OI), cut(slope_OI), cut(h_KI), _each_row(cut, cells))
        v_OK = lax.fori_loop(0, k, column, start)[0]
        change_OI = jnp.matmul(v_OK - cut(v_OI), h_KI, precision="highest")
        v_OI = lax.dynamic_update_slice_in_dim(v_OI, v_OK, first, 1)
        return v_OI, slope_OI + change_OI

    blocks = SWEEPS * (h_II.shape[0] // k)
    return lax.fori_loop(0, blocks, block, (padded(v_OI), slope_OI))[0][:, :i]


@functools.partial(jax.jit, static_argnames=("format", "anneal"))
def _all(w_BOI, h_BII, cross_BII, cells, *, format, anneal):
    """One matrix after another: each fills the machine, and their working sets add up."""

    def one(args: tuple) -> jax.Array:
        w_OI, h_II, cross_II, own = args
        return adaround_matrix(w_OI, h_II, own, format, cross_II=cross_II, anneal=anneal)

    return lax.map(one, (w_BOI, h_BII, cross_BII, cells))


@dataclasses.dataclass(frozen=True)
class AdaRound:
    """The solver of one parameter; see `adaround`."""

    anneal: Anneal = STEPS
    paired: ClassVar[bool] = True

    def __call__(self, problem: Problem) -> QTensor:
        """The parameter with every weight rounded the better way."""
        moments = problem.moments
        scales = find_scales(problem.w, problem.spec)
        w_BOI = problem.w_BOI
        v_BOI = _all(
            w_BOI, moments.h, moments.cross, problem.cells(scales),
            format=problem.spec.format, anneal=self.anneal,
        )  # fmt: skip
        return problem.stored(v_BOI, scales)


def adaround(
    policy: Policy | Resolved | str, *, steps: int = 1000, sequential: bool = True
) -> Layerwise:
    """The method that rounds every weight up or down for the least error of its layer's output.

    min_V E |W x - W_hat x_q|^2 + lambda sum 1 - |2 h(V) - 1|^beta with W_hat between the two
    levels next to W: h(V) = 1 is the upper one, h(V) = 0 the lower; beta falls from 20 to 2.
    x_q are the inputs after the quantized layers before (`sequential`). Any format, codebooks
    too. The outputs are compared before any nonlinearity; through what follows the layer they are
    compared by `brecq(policy)`, which costs passes of the data instead of products with their
    moments. Source: Nagel et al. 2020, arXiv:2004.10568.
    """
    return Layerwise(policy, AdaRound(Anneal(steps)), sequential)
