"""Rounding to nearest, at scales that lose least of what a layer puts out.

The search is that of `output_scales`; or, cheaper, of the weights' own error with every input
weighed by E[x_j^2], as the importance matrix of llama.cpp (2023) does."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax import affine
from quantjax.affine import Scales
from quantjax.formats import is_learned
from quantjax.observers import mse
from quantjax.policy import Policy, Resolved
from quantjax.ptq.layerwise import Layerwise, Problem
from quantjax.ptq.matrix import on_grid
from quantjax.ptq.output_scales import rounded_by_output
from quantjax.ptq.tiling import Tiling
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec


@functools.partial(jax.jit, static_argnames=("spec", "tiling", "correlations"))
def _solved(
    w: Float[Array, "*w"],
    w_BOI: Float[Array, "b o i"],
    h_BII: Float[Array, "b i i"],
    *,
    spec: QuantSpec,
    tiling: Tiling,
    correlations: bool,
) -> tuple[jax.Array, Scales]:
    if correlations and spec.scale_format is None:
        return rounded_by_output(w_BOI, h_BII, affine.find_scales(w, spec), spec, tiling)
    energy_BOI = jnp.broadcast_to(jnp.diagonal(h_BII, axis1=1, axis2=2)[:, None], w_BOI.shape)
    # Relative, so that float32 neither overflows nor vanishes; alike where no input was seen.
    largest = energy_BOI.max((1, 2), keepdims=True)
    energy_BOI = jnp.where(largest > 0, energy_BOI / jnp.where(largest > 0, largest, 1), 1)
    searched = is_learned(spec.format) or isinstance(spec.observer, type(mse()))
    weighed = spec if searched else dataclasses.replace(spec, observer=mse())
    scales = affine.find_scales(w, weighed, tiling.form.leaf(energy_BOI, tiling.shape))
    nearest = jax.vmap(lambda w, own: on_grid(w, own, spec.format))
    return nearest(w_BOI, tiling.form.cells(scales, spec, tiling.shape)), scales


@dataclasses.dataclass(frozen=True)
class RTN:
    """The solver of one parameter; see `rtn`."""

    correlations: bool
    paired: ClassVar[bool] = False

    def __call__(self, problem: Problem) -> QTensor:
        """The parameter at the scales that lose least."""
        spec = problem.spec
        values_BOI, scales = _solved(
            problem.w.astype(jnp.float32), problem.w_BOI, problem.moments.h, spec=spec,
            tiling=Tiling(problem.form, spec.block_shape, problem.w.shape),
            correlations=self.correlations,
        )  # fmt: skip
        return problem.stored(values_BOI, scales)


def rtn(
    policy: Policy | Resolved | str, *, correlations: bool = True, sequential: bool = True
) -> Layerwise:
    """The method that rounds to nearest at the scales that lose least of every layer's outputs.

    argmin_s (w - q)' H (w - q) with q = D(Q(w; s)) and H = E[x x'] of the inputs after the
    quantized layers before (`sequential`); then the scales are fitted to the codes (see
    `output_scales`).
    With correlations=False, H is taken as diagonal: argmin_s sum_j E[x_j^2] (w_j - q_j)^2, which
    asks for much less work; the observer is then mse(), where the policy's is no search. So it is
    for scales that are stored in few bits themselves. Without data, `quantize(params, policy)`
    rounds to nearest.

    >>> import quantjax as qj
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jnp.tri(8)
    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (8, 4))}
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> def loss(p):
    ...     return float(((apply(qj.dequantize(p), x) - apply(params, x)) ** 2).mean())
    >>> found = qj.calibrate(apply, params, [x], rtn("w3"))
    >>> loss(found) < 0.8 * loss(qj.quantize(params, "w3"))
    True
    """
    return Layerwise(policy, RTN(correlations), sequential)
