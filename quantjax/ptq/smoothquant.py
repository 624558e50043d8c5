"""SmoothQuant: move the outliers of activations into the weights, so that both fit 8 bits.
Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2022, arXiv:2211.10438, equations 3 and 4.

X W = (X diag(1/s))(diag(s) W). 1/s stays on the leaf, as `QTensor.input_scale`: a product scales
its activation before it rounds it, and multiplies integers."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import fake_quantize_array, find_scales
from quantjax.formats import IntFormat
from quantjax.policy import Policy, Resolved
from quantjax.ptq.awq import output_error
from quantjax.ptq.channels import by_channel, lead_of, on_leaf
from quantjax.ptq.folded import Folded
from quantjax.ptq.layerwise import Layerwise, Problem
from quantjax.ptq.matrix import MatrixForm
from quantjax.ptq.moments import Moments
from quantjax.qtensor import QTensor
from quantjax.spec import Granularity, QuantSpec

ALPHAS = np.arange(21, dtype=np.float32) / 20  # that a search tries


def smoothing(
    widest_LC: Float[Array, "l c"], weight_LC: Float[Array, "l c"], alpha: float | jax.Array
) -> Float[Array, "l c"]:
    """s = max|X_j|^alpha / max|W_j|^(1 - alpha); 1 for a channel that is zero on either side.

    >>> smoothing(jnp.array([[16.0, 1.0]]), jnp.array([[1.0, 1.0]]), 0.5)
    Array([[4., 1.]], dtype=float32)
    """
    alive = (widest_LC > 0) & (weight_LC > 0)
    x, w = (jnp.where(alive, a, 1) for a in (widest_LC, weight_LC))
    return jnp.where(alive, x**alpha / w ** (1 - alpha), 1)


def typical_largest(power_LC: Float[Array, "l c"]) -> Float[Array, " l"]:
    """The median over rows of the largest |x_j|, from E[x_j^2]: t with prod_j P(|x_j| < t) = 1/2,
    as if the channels were normal and independent.

    >>> round(float(typical_largest(jnp.array([[4.0]]))[0]), 3)  # half of it is within 0.6745 sigma
    1.349
    """
    sigma_LC = jnp.sqrt(power_LC)
    top_L = sigma_LC.max(1)
    relative_LC = jnp.maximum(sigma_LC / jnp.maximum(top_L, 1e-30)[:, None], 1e-6)

    def halved(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_L, high_L = ends
        middle_L = (low_L + high_L) / 2
        inside = jax.scipy.special.erf(middle_L[:, None] / (relative_LC * np.float32(2**0.5)))
        above = jnp.log(inside).sum(1) < np.float32(math.log(0.5))
        return jnp.where(above, middle_L, low_L), jnp.where(above, high_L, middle_L)

    ends = (jnp.zeros_like(top_L), jnp.full_like(top_L, 8))  # of 10^12 channels it is 7
    return lax.fori_loop(0, 24, halved, ends)[1] * top_L


@functools.partial(jax.jit, static_argnames=("form", "spec"))
def search(
    w: Float[Array, "*w"],
    widest_LC: Float[Array, "l c"],
    weight_LC: Float[Array, "l c"],
    h_BII: Float[Array, "b i i"],
    *,
    form: MatrixForm,
    spec: QuantSpec,
) -> Float[Array, " l"]:
    """The alpha of every matrix with the least output error, that of rounding both sides.

    e H e' for the weights, e = Q(W diag s) diag(1/s) - W, and step^2 / 12 sum Q(W diag s)^2 for the
    activation, whose rounding errors are as good as uniform and independent. Its step is that of
    the largest element, over all batches for one scale a tensor, and else of a row, see
    `typical_largest`.
    """

    def error(alpha: jax.Array) -> jax.Array:
        s = on_leaf(smoothing(widest_LC, weight_LC, alpha), form, w.shape)
        return lost(w, s, widest_LC, h_BII, form, spec)

    return jnp.asarray(ALPHAS)[jnp.argmin(lax.map(error, jnp.asarray(ALPHAS)), axis=0)]


def lost(
    w: Float[Array, "*w"],
    s: Float[Array, "*#w"],
    widest_LC: Float[Array, "l c"],
    h_BII: Float[Array, "b i i"],
    form: MatrixForm,
    spec: QuantSpec,
) -> Float[Array, " l"]:
    """The error that `search` compares, s in the axes of the leaf."""
    act = spec.act
    assert act is not None and isinstance(act.format, IntFormat)
    s_BI = form.matrices(jnp.broadcast_to(s, w.shape))[:, 0]
    s_LC = by_channel(s_BI, form, w.shape, jnp.mean)
    v = fake_quantize_array(w * s, find_scales(w * s, spec), spec=spec)
    lost_B = output_error(form.matrices(v / s - w), h_BII).sum((1, 2))
    if act.block is Granularity.TENSOR:
        largest_L = (widest_LC / s_LC).max(1)
    else:
        diagonal_BI = jnp.diagonal(h_BII, axis1=1, axis2=2)
        power_LC = by_channel(diagonal_BI, form, w.shape, jnp.mean)
        largest_L = typical_largest(power_LC / (s_LC * s_LC))
    step_L = 2 * largest_L / np.float32(2**act.format.bits - 2)
    power_L = (form.matrices(v) ** 2).sum((1, 2)).reshape(len(s_LC), -1).sum(1)
    return lost_B.reshape(len(s_LC), -1).sum(1) + step_L**2 / 12 * power_L


@functools.partial(jax.jit, static_argnames=("form", "spec"))
def _each_lost(w, s_N, widest_LC, h_BII, *, form, spec):
    return lax.map(lambda s: lost(w, s, widest_LC, h_BII, form, spec).sum(), s_N)


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """The solver of one parameter; see `smoothquant`. fixed: the names of parameters whose inputs
    were scaled already."""

    alpha: float | None = 0.5
    fixed: frozenset[str] = frozenset()
    paired: ClassVar[bool] = False
    widest: ClassVar[bool] = True  # of inputs and weights, not the mean

    def of_weights(self, w: Float[Array, "*w"], spec: QuantSpec) -> Float[Array, "*w"]:
        """What of the weights enters s."""
        return jnp.abs(w)

    def of_inputs(self, moments: Moments) -> Float[Array, "b i"]:
        """What of the inputs enters s."""
        return moments.widest

    def tried(self, m_C: Float[Array, " c"], w_C: Float[Array, " c"]) -> Float[Array, "n c"]:
        """The scales of channels among which the best is to be found."""
        alphas = ALPHAS.tolist() if self.alpha is None else [self.alpha]
        return jnp.stack([smoothing(m_C[None], w_C[None], a)[0] for a in alphas])

    def errors(self, problem: Problem, s_N: Float[Array, "n *#w"]) -> Float[Array, " n"]:
        """The output error of a parameter under each of these scales, in the axes of the leaf."""
        self.check(problem)
        if len(s_N) == 1:
            return jnp.zeros(1)
        w, form = problem.w.astype(jnp.float32), problem.form
        widest_LC = by_channel(problem.moments.widest, form, w.shape, jnp.max)
        return _each_lost(w, s_N, widest_LC, problem.moments.h, form=form, spec=problem.spec)

    def check(self, problem: Problem) -> None:
        """Raises ValueError, naming the parameter, where its activation is not rounded, or not to
        integers and alpha is to be found."""
        act = problem.spec.act
        if act is None:
            raise ValueError(
                f"{problem.name}: SmoothQuant makes activations fit few bits, but the policy keeps "
                f"them in float: {problem.spec!r}. Give it an act, as 'w8a8' does."
            )
        if self.alpha is None and not isinstance(act.format, IntFormat):
            raise ValueError(
                f"{problem.name}: alpha is searched for integer activations, not for "
                f"{act.format}: give one, such as 0.5."
            )

    def __call__(self, problem: Problem) -> QTensor:
        """The smoothed parameter, rounded to nearest, and its input scale."""
        self.check(problem)
        spec, form, shape = problem.spec, problem.form, problem.w.shape
        w = problem.w.astype(jnp.float32)
        if problem.name in self.fixed:
            return problem.stored(problem.w_BOI, find_scales(w, spec))
        widest_LC = by_channel(problem.moments.widest, form, shape, jnp.max)
        weight_LC = by_channel(jnp.abs(problem.w_BOI).max(1), form, shape, jnp.max)
        alpha: float | jax.Array | None = self.alpha
        if alpha is None:
            found_L = search(w, widest_LC, weight_LC, problem.moments.h, form=form, spec=spec)
            alpha = found_L[:, None]
        s_LC = smoothing(widest_LC, weight_LC, alpha)
        x = w * on_leaf(s_LC, form, shape)
        q = problem.stored(form.matrices(x), find_scales(x, spec))
        return dataclasses.replace(q, input_scale=on_leaf(1 / s_LC, form, shape, lead_of(problem)))


def smoothquant(
    policy: Policy | Resolved | str,
    *,
    alpha: float | None = 0.5,
    sequential: bool = False,
    fold: bool = True,
) -> Layerwise | Folded:
    """The method that divides every input channel by s and multiplies its weights by s.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), then both sides are rounded as the policy says,
    such as 'w8a8'. alpha: how much of the difficulty moves to the weights, 0.5 in most of the paper
    and more for models with larger outliers; None: the best of 21 for every parameter, by the
    output error of both roundings (`search`). fold: where the parameters before can take 1/s
    exactly (`find_scaling`), they do, with one s for all products of an input; elsewhere the leaf
    keeps 1/s as its `input_scale`, and `intercept` multiplies the activation by it, rounds, and
    runs the product in integers.
    Source: Xiao et al. 2022, arXiv:2211.10438.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"smoothquant: alpha must be in [0, 1] or None, got {alpha}.")
    method = Layerwise(policy, SmoothQuant(alpha), sequential)
    return Folded(method) if fold else method
