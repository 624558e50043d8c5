"""AdaRound: which way should every weight be rounded, for the least error of the layer's output?

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
arXiv:2004.10568. Without a nonlinearity the error of a layer is a quadratic form of the rounding
(its equations 8 and 20), so that the moments of the inputs are all that is asked of the data, and
a step costs one product of matrices. `reconstruct` is the same through whatever follows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import find_scales
from quantjax.formats import Format
from quantjax.policy import Policy, Resolved
from quantjax.ptq import refine
from quantjax.ptq.gptq import gptq_matrix
from quantjax.ptq.layerwise import Layerwise, Problem
from quantjax.ptq.matrix import Cells, on_grid
from quantjax.ptq.output_scales import rounded_by_output
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
from quantjax.ptq.sweep import each_cell
from quantjax.ptq.tiling import Tiling
from quantjax.qtensor import QTensor

# O outputs, I inputs
SWEEPS = 2  # of the descent that ends it
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
    coordinate descent over all levels, from there, from what GPTQ finds and from rounding to
    nearest: each weight takes the best one given all others. Every output takes the best end.

    >>> from quantjax.formats import IntFormat
    >>> w, h = jnp.array([[0.4, 0.4, 0.4]]), jnp.ones((3, 3)) + 0.01 * jnp.eye(3)  # x1 = x2 = x3
    >>> solved = jax.jit(adaround_matrix, static_argnames="format")
    >>> solved(w, h, Cells(jnp.ones((1, 1))), format=IntFormat(4)).sum()  # not 0: 1.2 was meant
    Array(1., dtype=float32)
    """
    cells = each_cell(lambda x: jnp.broadcast_to(x, w_OI.shape), cells)
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
    swept_OI = gptq_matrix(w_OI, h_II, cells, format).q_OI
    starts = [nearest_OI, swept_OI, hardened(v, between)]

    def each(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x] * len(starts))

    w_SI, r_SI, own = each(w_OI), None if r_OI is None else each(r_OI), each_cell(each, cells)
    found_SI = descended(jnp.concatenate(starts), w_SI, h_II, r_SI, own, format)
    errors_NO = output_error(found_SI, w_SI, h_II, r_SI).reshape(len(starts), -1)
    best_1OI = jnp.argmin(errors_NO, axis=0)[None, :, None]
    found_NOI = found_SI.reshape(len(starts), *w_OI.shape)
    return jnp.take_along_axis(found_NOI, best_1OI, axis=0)[0]


def descended(
    v_OI: Float[Array, "o i"],
    w_OI: Float[Array, "o i"],
    h_II: Float[Array, "i i"],
    r_OI: Float[Array, "o i"] | None,
    cells: Cells,
    format: Format,
) -> Float[Array, "o i"]:
    """v after sweeps of coordinate descent: weight by weight the best level given all others, that
    nearest to v_j - (e H - r)_j / H_jj. The error never rises. `cells` are of v's shape."""
    for _ in range(SWEEPS):
        slope_OI = jnp.matmul(w_OI - v_OI, h_II, precision="highest")
        slope_OI = slope_OI if r_OI is None else slope_OI + r_OI
        v_OI = refine.descended(v_OI, slope_OI, h_II, cells, format)
    return v_OI


@functools.partial(jax.jit, static_argnames=("format", "anneal"))
def _all(w_BOI, h_BII, cross_BII, cells, *, format, anneal):
    """One matrix after another: each fills the machine, and their working sets add up."""

    def one(args: tuple) -> jax.Array:
        w_OI, h_II, cross_II, own = args
        return adaround_matrix(w_OI, h_II, own, format, cross_II=cross_II, anneal=anneal)

    return lax.map(one, (w_BOI, h_BII, cross_BII, cells))


_found = jax.jit(find_scales, static_argnames="spec")


@functools.partial(jax.jit, static_argnames=("spec", "tiling"))
def _fitted(w_BOI, h_BII, scales, *, spec, tiling):
    """The scales that serve the outputs best when rounded to nearest."""
    return rounded_by_output(w_BOI, h_BII, scales, spec, tiling)[1]


@dataclasses.dataclass(frozen=True)
class AdaRound:
    """The solver of one parameter; see `adaround`."""

    anneal: Anneal = STEPS
    paired: bool = True

    def __call__(self, problem: Problem) -> QTensor:
        """The parameter with every weight rounded the better way."""
        moments, w_BOI, spec = problem.moments, problem.w_BOI, problem.spec
        scales = _found(problem.w, spec=spec)
        if spec.scale_format is None:  # a scale may be any number, not only one of a grid
            tiling = Tiling(problem.form, spec.block_shape, problem.w.shape)
            scales = _fitted(w_BOI, moments.h, scales, spec=spec, tiling=tiling)
        v_BOI = _all(
            w_BOI, moments.h, moments.cross, problem.cells(scales),
            format=spec.format, anneal=self.anneal,
        )  # fmt: skip
        return problem.stored(v_BOI, scales)


def adaround(
    policy: Policy | Resolved | str, *, steps: int = 1000, sequential: bool = True
) -> Layerwise:
    """The method that rounds every weight up or down for the least error of its layer's output.

    min_V E |W x - W_hat x_q|^2 + lambda sum 1 - |2 h(V) - 1|^beta with W_hat between the two
    levels next to W: h(V) = 1 is the upper one, h(V) = 0 the lower; beta falls from 20 to 2. The
    scales are those that serve the outputs best under plain rounding (see `rtn`).
    x_q are the inputs after the quantized layers before (`sequential`). Any format, codebooks
    too. The outputs are compared before any nonlinearity; through what follows the layer they are
    compared by `brecq(policy)`, which costs passes of the data instead of products with their
    moments. Source: Nagel et al. 2020, arXiv:2004.10568.
    """
    return Layerwise(policy, AdaRound(Anneal(steps)), sequential)
