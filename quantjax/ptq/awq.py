"""AWQ: scale up the input channels that matter before rounding, and find how far and where to clip.
Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023,
arXiv:2306.00978, sections 3.2 and 4 (clipping), equations 4 and 5.

W x = (W diag s)(diag(1/s) x): a channel with a larger s is rounded more finely. 1/s stays on the
leaf, as `QTensor.input_scale`."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax.affine import Scales, fake_quantize_array, find_range, find_scales, range_scales
from quantjax.blocks import sizes, split, spread
from quantjax.formats import is_learned
from quantjax.observers import Observer, absmax, magnitude, minmax
from quantjax.policy import Policy, Resolved
from quantjax.ptq.channels import by_channel, by_input, lead_of, on_leaf
from quantjax.ptq.folded import Folded
from quantjax.ptq.layerwise import Layerwise, Problem
from quantjax.ptq.matrix import MatrixForm
from quantjax.ptq.moments import Moments
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec

# B matrices, O outputs, I inputs; L groups of matrices that share C channels; N candidates
POINTS, LOWEST = 20, 0.5  # of both searches; the narrowest range that clipping tries
FLOOR = 1e-4  # of the largest activation: what a channel counts that was hardly seen


def output_error(
    e_BOI: Float[Array, "b o i"], h_BII: Float[Array, "b i i"]
) -> Float[Array, "b o i"]:
    """E (e x)^2 of every output, e H e' with H = E[x x'], in the terms of its inputs: their sum is
    the error."""
    return e_BOI * jnp.matmul(e_BOI, h_BII, precision="highest")


def channel_scales(
    m_LC: Float[Array, "l c"], w_LC: Float[Array, "l c"], points: int = POINTS
) -> Float[Array, "n l c"]:
    """The scales to be tried: s = m^r / (w^(1-r) + 1e-4) for r = 0, 1/n, ... below 1, over the
    square root of its largest times its smallest; and s = 1, the last.

    m: the mean magnitude of a channel's activations, w: that of its weights, each weight over the
    largest of its group.
    """
    largest = m_LC.max(1, keepdims=True)
    m_LC = jnp.maximum(m_LC, FLOOR * jnp.where(largest > 0, largest, 1))
    r = (jnp.arange(points, dtype=jnp.float32) / points)[:, None, None]
    s = m_LC**r / (w_LC ** (1 - r) + np.float32(1e-4))
    s = s / jnp.sqrt(s.max(2, keepdims=True) * s.min(2, keepdims=True))
    return jnp.concatenate([s, jnp.ones_like(s[:1])])


def relative(w: Float[Array, "*w"], spec: QuantSpec) -> Float[Array, "*w"]:
    """The magnitude of every weight over the largest of its group."""
    block = spec.block_shape
    largest = jnp.maximum(magnitude(split(w, block)), np.float32(1e-30))
    return jnp.abs(w) / spread(largest, w.shape, block)


def lost(
    w: Float[Array, "*w"],
    s: Float[Array, "*#w"],
    h_BII: Float[Array, "b i i"],
    form: MatrixForm,
    spec: QuantSpec,
) -> Float[Array, " b"]:
    """||Q(W diag s) diag(1/s) X - W X||^2 of every matrix, s in the axes of the leaf."""
    x = w * s
    v = fake_quantize_array(x, find_scales(x, spec), spec=spec) * (1 / s)
    return output_error(form.matrices(v - w), h_BII).sum((1, 2))


@functools.partial(jax.jit, static_argnames=("form", "spec"))
def _each_lost(w, s_N, h_BII, *, form, spec):
    return lax.map(lambda s: lost(w, s, h_BII, form, spec).sum(), s_N)


@functools.partial(jax.jit, static_argnames=("form", "spec", "points"))
def search(
    w: Float[Array, "*w"],
    magnitude_BI: Float[Array, "b i"],
    h_BII: Float[Array, "b i i"],
    *,
    form: MatrixForm,
    spec: QuantSpec,
    points: int = POINTS,
) -> Float[Array, "l c"]:
    """The scales s of `channel_scales` with the least ||Q(W diag s) diag(1/s) X - W X||^2, matrix
    by matrix. As s = 1 is tried too, none is worse than rounding."""
    m_LC = by_channel(magnitude_BI, form, w.shape, jnp.mean)
    relative_BI = form.matrices(relative(w, spec)).mean(1)
    w_LC = by_channel(relative_BI, form, w.shape, jnp.mean)
    tried_NLC = channel_scales(m_LC, w_LC, points)

    def error(s_LC: jax.Array) -> jax.Array:
        lost_B = lost(w, on_leaf(s_LC, form, w.shape), h_BII, form, spec)
        return lost_B.reshape(len(s_LC), -1).sum(1)

    best_L = jnp.argmin(lax.map(error, tried_NLC), axis=0)
    return jnp.take_along_axis(tried_NLC, best_L[None, :, None], axis=0)[0]


def _same_block(
    form: MatrixForm, spec: QuantSpec, shape: tuple[int, ...]
) -> Bool[np.ndarray, "i i"]:
    """Which inputs share their scales."""
    size = sizes(shape, spec.block_shape)
    places = [np.arange(shape[a]) // size[a] for a in form.contracting]
    number = np.stack([p.reshape(-1) for p in np.meshgrid(*places, indexing="ij")])
    return (number[:, :, None] == number[:, None, :]).all(0)


@functools.partial(jax.jit, static_argnames=("form", "spec", "points"))
def clipped(
    x: Float[Array, "*w"],
    h_BII: Float[Array, "b i i"],
    *,
    form: MatrixForm,
    spec: QuantSpec,
    points: int = POINTS,
) -> Scales:
    """The scales of x under which every block changes its outputs least: its range times 1, ...,
    down to 0.5, by ||Q(x_g) X_g - x_g X_g||^2 of the inputs of that block alone.

    The ranges that are shrunk are that of the spec's observer and the widest. Where the blocks
    together turn out worse than under the observer's ranges, those are kept. A learned codebook
    has no range and is left as it is.
    """
    own = find_scales(x, spec)
    if is_learned(spec.format):
        return own
    block = spec.block_shape
    within_BII = h_BII * jnp.asarray(_same_block(form, spec, x.shape), jnp.float32)
    widest: Observer = absmax() if spec.symmetric else minmax()
    ranges = [find_range(x, spec)]
    if spec.observer != widest:
        ranges.append(find_range(x, dataclasses.replace(spec, observer=widest)))
    lows, highs = (jnp.stack([each[i] for each in ranges]) for i in (0, 1))

    def apart(scales: Scales) -> jax.Array:
        e = fake_quantize_array(x, scales, spec=spec) - x
        return output_error(form.matrices(e), within_BII)

    def error(candidate: tuple[jax.Array, jax.Array]) -> jax.Array:
        which, ratio = candidate
        scales = range_scales(lows[which] * ratio, highs[which] * ratio, spec)
        blocked = split(form.leaf(apart(scales), x.shape), block)
        values = blocked.values
        if blocked.valid is not None:
            values = jnp.where(blocked.valid, values, np.float32(0))
        return values.sum(blocked.axes) if blocked.axes else values

    ratio_N = jnp.tile(1 - (1 - LOWEST) * jnp.arange(points) / points, len(ranges))
    ratio_N = ratio_N.astype(jnp.float32)
    which_N = jnp.repeat(jnp.arange(len(ranges)), points)
    best = jnp.argmin(lax.map(error, (which_N, ratio_N)), axis=0)

    def chosen(ends: jax.Array) -> jax.Array:
        return jnp.take_along_axis(ends, which_N[best][None], axis=0)[0] * ratio_N[best]

    found = range_scales(chosen(lows), chosen(highs), spec)

    def total(scales: Scales) -> jax.Array:
        e = fake_quantize_array(x, scales, spec=spec) - x
        return output_error(form.matrices(e), h_BII).sum()

    better = total(found) < total(own)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, own)


def _coarse(spec: QuantSpec) -> QuantSpec:
    """The spec with fewer steps of a range that is itself searched, for each of many scales."""
    observer: Any = spec.observer
    if getattr(observer, "steps", 0) <= POINTS:
        return spec
    return dataclasses.replace(spec, observer=dataclasses.replace(observer, steps=POINTS))


@dataclasses.dataclass(frozen=True)
class AWQ:
    """The solver of one parameter; see `awq`. fixed: the names of parameters whose inputs were
    scaled already, and whose range alone is searched."""

    points: int = POINTS
    clip: bool = True
    fixed: frozenset[str] = frozenset()
    paired: ClassVar[bool] = False
    widest: ClassVar[bool] = False  # of inputs and weights, not the mean

    def of_weights(self, w: Float[Array, "*w"], spec: QuantSpec) -> Float[Array, "*w"]:
        """What of the weights enters s."""
        return relative(w, spec)

    def of_inputs(self, moments: Moments) -> Float[Array, "b i"]:
        """What of the inputs enters s."""
        return moments.magnitude

    def tried(self, m_C: Float[Array, " c"], w_C: Float[Array, " c"]) -> Float[Array, "n c"]:
        """The scales of channels among which the best is to be found."""
        return channel_scales(m_C[None], w_C[None], self.points)[:, 0]

    def errors(self, problem: Problem, s_N: Float[Array, "n *#w"]) -> Float[Array, " n"]:
        """The output error of a parameter under each of these scales, in the axes of the leaf."""
        w, how = (
            problem.w.astype(jnp.float32),
            {"form": problem.form, "spec": _coarse(problem.spec)},
        )
        return _each_lost(w, s_N, problem.moments.h, **how)

    def __call__(self, problem: Problem) -> QTensor:
        """The parameter, its channels scaled, and its input scale."""
        moments, form, spec = problem.moments, problem.form, problem.spec
        w, how = problem.w.astype(jnp.float32), {"form": form, "points": self.points}
        if problem.name in self.fixed:
            scales = find_scales(w, spec)
            if self.clip:
                scales = clipped(w, moments.h, spec=spec, **how)
            return problem.stored(problem.w_BOI, scales)
        s_LC = search(w, moments.magnitude, moments.h, spec=_coarse(spec), **how)
        x = w * on_leaf(s_LC, form, w.shape)
        t_BI = by_input(1 / s_LC, form, w.shape)
        if self.clip:
            h_BII = moments.h * t_BI[:, :, None] * t_BI[:, None, :]
            scales = clipped(x, h_BII, spec=spec, **how)
        else:
            scales = find_scales(x, spec)
        q = problem.stored(form.matrices(x), scales)
        return dataclasses.replace(
            q, input_scale=on_leaf(1 / s_LC, form, w.shape, lead_of(problem))
        )


def awq(
    policy: Policy | Resolved | str,
    *,
    points: int = POINTS,
    clip: bool = True,
    sequential: bool = True,
    fold: bool = True,
) -> Layerwise | Folded:
    """The method that scales every input channel by how much it matters, then rounds to nearest.

    s = argmin_s ||Q(W diag s) diag(1/s) X - W X||^2 over s_j = m_j^r / w_j^(1-r), `points` values
    of r and s = 1; m: mean |X_j|, w: mean |W_j| relative to its group. Then (`clip`) the range of
    every group that changes its outputs least. Any format, symmetric or not. fold: where the
    parameters before can take 1/s exactly (`find_scaling`), they do, with one s for all products of
    an input, such as queries, keys and values; elsewhere the leaf keeps 1/s as its `input_scale`,
    one float32 an input channel, by which products multiply the activation.
    Where only the range is to be searched, as the paper does for queries and keys, or nothing, use
    rules of a policy and another method for those. Source: Lin et al. 2023, arXiv:2306.00978.
    """
    if points < 1:
        raise ValueError(f"awq: points must be 1 or more, got {points}.")
    method = Layerwise(policy, AWQ(points, clip), sequential)
    return Folded(method) if fold else method
