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
from quantjax.ptq.layerwise import Layerwise, Problem
from quantjax.ptq.matrix import MatrixForm
from quantjax.qtensor import QTensor
from quantjax.spec import Granularity, QuantSpec

ALPHAS = 20  # that a search tries: 0, 1/20, ..., 1


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
    act = spec.act
    assert act is not None and isinstance(act.format, IntFormat)
    levels = np.float32(2**act.format.bits - 2)
    diagonal_BI = jnp.diagonal(h_BII, axis1=1, axis2=2)
    power_LC = by_channel(diagonal_BI, form, w.shape, jnp.mean)

    def error(alpha: jax.Array) -> jax.Array:
        s_LC = smoothing(widest_LC, weight_LC, alpha)
        s = on_leaf(s_LC, form, w.shape)
        v = fake_quantize_array(w * s, find_scales(w * s, spec), spec=spec)
        lost_B = output_error(form.matrices(v / s - w), h_BII).sum((1, 2))
        if act.block is Granularity.TENSOR:
            largest_L = (widest_LC / s_LC).max(1)
        else:
            largest_L = typical_largest(power_LC / (s_LC * s_LC))
        step_L = 2 * largest_L / levels
        power_L = (form.matrices(v) ** 2).sum((1, 2)).reshape(len(s_LC), -1).sum(1)
        return lost_B.reshape(len(s_LC), -1).sum(1) + step_L**2 / 12 * power_L

    alphas = jnp.linspace(0, 1, ALPHAS + 1, dtype=jnp.float32)
    return alphas[jnp.argmin(lax.map(error, alphas), axis=0)]


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """The solver of one parameter; see `smoothquant`."""

    alpha: float | None = 0.5
    paired: ClassVar[bool] = False

    def __call__(self, problem: Problem) -> QTensor:
        """The smoothed parameter, rounded to nearest, and its input scale."""
        spec, form, shape = problem.spec, problem.form, problem.w.shape
        if spec.act is None:
            raise ValueError(
                f"{problem.name}: SmoothQuant makes activations fit few bits, but the policy keeps "
                f"them in float: {spec!r}. Give it an act, as 'w8a8' does."
            )
        w = problem.w.astype(jnp.float32)
        widest_LC = by_channel(problem.moments.widest, form, shape, jnp.max)
        weight_LC = by_channel(jnp.abs(problem.w_BOI).max(1), form, shape, jnp.max)
        alpha: float | jax.Array | None = self.alpha
        if alpha is None:
            if not isinstance(spec.act.format, IntFormat):
                raise ValueError(
                    f"{problem.name}: alpha is searched for integer activations, not for "
                    f"{spec.act.format}: give one, such as 0.5."
                )
            found_L = search(w, widest_LC, weight_LC, problem.moments.h, form=form, spec=spec)
            alpha = found_L[:, None]
        s_LC = smoothing(widest_LC, weight_LC, alpha)
        x = w * on_leaf(s_LC, form, shape)
        q = problem.stored(form.matrices(x), find_scales(x, spec))
        return dataclasses.replace(q, input_scale=on_leaf(1 / s_LC, form, shape, lead_of(problem)))


def smoothquant(
    policy: Policy | Resolved | str, *, alpha: float | None = 0.5, sequential: bool = False
) -> Layerwise:
    """The method that divides every input channel by s and multiplies its weights by s.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), then both sides are rounded as the policy says,
    such as 'w8a8'. alpha: how much of the difficulty moves to the weights, 0.5 in most of the paper
    and more for models with larger outliers; None: the best of 21 for every parameter, by the
    output error of both roundings (`search`). The leaf keeps 1/s as its `input_scale`; `intercept`
    multiplies the activation by it, rounds, and runs the product in integers.
    Source: Xiao et al. 2022, arXiv:2211.10438.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"smoothquant: alpha must be in [0, 1] or None, got {alpha}.")
    return Layerwise(policy, SmoothQuant(alpha), sequential)
