"""Quantize, dequantize and fake-quantize one array: x -> q = clip(round(x * S)) -> q / S.
Jacob et al. 2018, arXiv:1712.05877, equation 1; Bengio et al. 2013, arXiv:1308.3432 (the
straight-through estimator)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from quantjax.blocks import Block, block_sum, sizes, split, spread
from quantjax.formats import Codebook, ExponentFormat, Format, IntFormat, is_learned
from quantjax.formats.codebook import count_below
from quantjax.kmeans import fit_levels
from quantjax.observers import Grid, magnitude, observe
from quantjax.packing import pack, packed_axis, unpack
from quantjax.qtensor import QTensor
from quantjax.rounding import low_byte
from quantjax.scales import inverse, scale_of_range
from quantjax.spec import Granularity, QuantSpec


class Scales(NamedTuple):
    """What is found before rounding: step, code of zero, levels of a learned codebook; thresholds:
    of an activation, (codes - 1,), as in a QTensor, where levels do not say where cells end."""

    scale: jax.Array | QTensor | None
    zero_point: jax.Array | None = None
    codebook: jax.Array | None = None
    thresholds: jax.Array | None = None


def scale_values(scale: jax.Array | QTensor | None) -> jax.Array:
    """The scales as float32, whatever they are stored as."""
    if scale is None:
        return jnp.ones((), jnp.float32)
    if isinstance(scale, QTensor):
        scale = dequantize_array(scale)
    return scale.astype(jnp.float32)


def scales_of(q: QTensor) -> Scales:
    """The scales that a quantized array carries, for quantizing another one by them."""
    return Scales(q.scale, q.zero_point, q.codebook)


def find_scales(x: Float[Array, "*n"], spec: QuantSpec, weights: Any = None) -> Scales:
    """Observes the range of every block of x and turns it into scales.

    `spec.block` must be a block shape. `weights`, broadcastable to x, weigh the elements in the
    MSE search and in k-means. NaN or infinity in a block makes its scale NaN. No gradient flows.
    """
    # Cut here, as the derivative of a search costs its loop again and is 0 / 0 in zero blocks.
    x, block = jax.lax.stop_gradient(x.astype(jnp.float32)), spec.block_shape
    if weights is not None:
        weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), x.shape)
    low, high = find_range(x, spec, weights)
    format = spec.format
    if is_learned(format):
        scale, _ = scale_of_range(low, high, format, symmetric=spec.symmetric)
        weights = jnp.ones(x.shape, jnp.float32) if weights is None else weights
        step = spread(scale, x.shape, block)
        # Squared errors weigh by the step squared: relative to the largest, which can not overflow.
        axes = tuple(range(x.ndim - len(block), x.ndim))
        share = spread(scale * inverse(scale.max(axes, keepdims=True)), x.shape, block)

        def fit(v: jax.Array, w: jax.Array) -> jax.Array:
            return fit_levels(v, w, format.bits)

        for _ in range(x.ndim - len(block)):
            fit = jax.vmap(fit)
        return Scales(scale, None, fit(x * inverse(step), weights * (share * share)))
    return range_scales(low, high, spec)


def find_range(
    x: Float[Array, "*n"], spec: QuantSpec, weights: Any = None
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """The range (low, high) of every block of x, as the observer of `spec` finds it."""
    blocked_weights = None if weights is None else split(weights, spec.block_shape).values
    grid = Grid(spec.format, spec.symmetric, spec.scale_format)
    return observe(spec.observer, split(x, spec.block_shape), grid, blocked_weights)


def range_scales(low: Float[Array, "*b"], high: Float[Array, "*b"], spec: QuantSpec) -> Scales:
    """The scales whose grid spans a range, as `spec` stores them; for formats with levels of their
    own, so not for a learned codebook."""
    block = spec.block_shape
    # The sizes of `low` are those of the blocks, axes of length one included.
    scale, zero_point = scale_of_range(
        low, high, spec.format, symmetric=spec.symmetric, scale_format=spec.scale_format
    )
    if isinstance(spec.scale_format, ExponentFormat):
        codes = spec.scale_format.encode(scale).astype(jnp.uint8)
        single = (1,) * len(block)
        return Scales(QTensor(codes, None, format=spec.scale_format, block=single))
    if spec.scale_spec is not None:
        nested = spec.scale_spec
        if isinstance(nested.block, Granularity):
            nested = nested.with_block((None,) * len(block))
        return Scales(quantize_array(scale, find_scales(scale, nested), spec=nested))
    if zero_point is not None and isinstance(spec.format, IntFormat):
        zero_point = zero_point.astype(spec.format.code_dtype)
    return Scales(scale, zero_point)


def finite_blocks(x: Float[Array, "*n"], spec: QuantSpec) -> Bool[Array, "*b"]:
    """Per block of x, whether it holds neither NaN nor infinity."""
    return jnp.isfinite(magnitude(split(jax.lax.stop_gradient(x), spec.block_shape)))


def _spread_zero(scales: Scales, shape: tuple[int, ...], block: Block) -> jax.Array | None:
    if scales.zero_point is None:
        return None
    return spread(scales.zero_point.astype(jnp.float32), shape, block)


def _scaled(x: jax.Array, scales: Scales, block: Block) -> Float[Array, "*n"]:
    """v = x * S in float32."""
    return x.astype(jnp.float32) * spread(inverse(scale_values(scales.scale)), x.shape, block)


def encoded(
    x: jax.Array, scales: Scales, format: Format, block: Block, uniform: jax.Array | None = None
) -> Float[Array, "*n"]:
    """Codes of x under given scales, as float32: q = clip(round(x / s) + z, qmin, qmax), or how
    many thresholds lie below x."""
    if scales.thresholds is not None:
        return count_below(x.astype(jnp.float32), scales.thresholds)
    v = _scaled(x, scales, block)
    if isinstance(format, IntFormat):
        return format.encode(v, uniform, _spread_zero(scales, x.shape, block))
    if isinstance(format, Codebook):
        return format.encode(v, uniform, scales.codebook)
    return format.encode(v, uniform)


def decoded(
    codes: jax.Array, scales: Scales, format: Format, block: Block, dtype: np.dtype
) -> jax.Array:
    """Values of codes under given scales, as a QTensor has them: (level(q) - z) * s."""
    if isinstance(format, Codebook):
        levels = format.decode(codes, scales.codebook)
    else:
        levels = format.decode(codes)
    zero = _spread_zero(scales, codes.shape, block)
    levels = levels if zero is None else levels - zero
    return (levels * spread(scale_values(scales.scale), codes.shape, block)).astype(dtype)


def _code_offset(format: Format | ExponentFormat) -> int:
    """What is added to signed codes below 8 bits, so that they are stored without a sign."""
    return 2 ** (format.bits - 1) if isinstance(format, IntFormat) and format.signed else 0


def _stored(codes: Float[Array, "*n"], format: Format | ExponentFormat) -> jax.Array:
    """Codes as bytes, before they are packed. A NaN becomes the byte 0."""
    if format.bits == 8:
        return low_byte(codes, format.code_dtype)
    return low_byte(codes + np.float32(_code_offset(format)), np.uint8)


def _loaded(stored: jax.Array, format: Format | ExponentFormat) -> Integer[Array, "*n"]:
    """Bytes as codes again: int8 or uint8.

    The offset is taken off by turning the sign bit and spreading it, stored - 2^(b-1) without a
    subtraction: XLA on CPU (jaxlib 0.10.2 to 0.12.0) sums up garbage where one int8 constant is
    added to two operands that a fusion reduces, as in `((p - 2) * a + (q - 2) * b).sum(1)`."""
    offset = _code_offset(format) if format.bits < 8 else 0
    if not offset:
        return stored
    left = np.uint8(8 - format.bits)
    signed = jax.lax.bitcast_convert_type((stored ^ np.uint8(offset)) << left, jnp.int8)
    return signed >> np.int8(left)


def quantize_array(
    x: Float[Array, "*n"],
    scales: Scales,
    uniform: Float[Array, "*n"] | None = None,
    *,
    spec: QuantSpec,
) -> QTensor:
    """Codes of x under given scales: q = clip(round(x / s) + z, qmin, qmax), packed.

    `spec.block` must be a block shape; the scales have one entry per block. `uniform`, in
    [0, 1), makes the rounding stochastic (see `quantjax.rounding.noise`).
    """
    block = spec.block_shape
    codes = encoded(x, scales, spec.format, block, uniform)
    bits, axis = spec.format.bits, None
    qvalue = _stored(codes, spec.format)
    if bits < 8 and codes.size:
        reduced = tuple(b > 1 for b in sizes(x.shape, block))
        axis = packed_axis(x.shape, x.ndim - len(block), bits, reduced)
        qvalue = pack(qvalue, bits, axis)
    return QTensor(
        qvalue,
        scales.scale,
        scales.zero_point,
        scales.codebook,
        format=spec.format,
        block=block,
        packed=None if axis is None else (axis, x.shape[axis]),
        dtype=np.dtype(x.dtype),
        act=spec.act,
    )


def codes_of(q: QTensor) -> Integer[Array, "*n"]:
    """The codes of a quantized array, unpacked: int8 or uint8, in the logical shape."""
    if q.packed is None:
        return q.qvalue
    axis, length = q.packed
    return _loaded(unpack(q.qvalue, q.format.bits, length, axis), q.format)


def dequantize_array(q: QTensor) -> jax.Array:
    """The values of a quantized array, x = (level(q) - z) * s, computed in float32, cast last;
    with an input scale t and low-rank factors, (level(q) - z) * s * t + left @ right."""
    if isinstance(q.format, ExponentFormat):
        return q.format.decode(q.qvalue)
    if q.is_bare:
        return decoded(codes_of(q), scales_of(q), q.format, q.block, q.dtype)
    x = decoded(codes_of(q), scales_of(q), q.format, q.block, np.dtype(np.float32))
    if q.input_scale is not None:
        x = x * q.input_scale.astype(jnp.float32)
    if q.left is not None and q.right is not None:
        # The choice, always of x, keeps compilers from making one operation of the product above
        # and this sum, which rounds once and not twice. They look through an optimization barrier.
        x = jnp.where(jnp.isnan(x), np.float32(np.nan), x) + low_rank_values(q.left, q.right)
    return x.astype(q.dtype)


def low_rank_values(left: Float[Array, "*l r"], right: Float[Array, "*m r"]) -> Float[Array, "*#n"]:
    """left @ right of the factors of a quantized array, in float32: broadcastable to its shape.

    A float product: the same bits jitted or not, but a part of the array, such as the shard of one
    device, may be summed in another order."""
    rank = left.ndim - 1
    axes = list(range(rank))
    operands: list[Any] = []
    for factor in (left, right):
        kept = [a for a in axes if factor.shape[a] != 1]
        operands += [factor.reshape([factor.shape[a] for a in (*kept, -1)]), [*kept, rank]]
    lengths = [max(left.shape[a], right.shape[a]) for a in axes]
    y = jnp.einsum(
        *operands,
        [a for a in axes if lengths[a] != 1],
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.reshape(lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _snap(format: Format, block: Block, x, scales: Scales, uniform) -> jax.Array:
    # As they would be stored: a float code may be -0, and its value then -0 * s; or NaN.
    codes = _loaded(_stored(encoded(x, scales, format, block, uniform), format), format)
    return decoded(codes, scales, format, block, x.dtype)


def _snap_forward(format: Format, block, x, scales: Scales, uniform):
    v = _scaled(x, scales, block)
    if scales.thresholds is not None:
        clips = jnp.zeros(x.shape, bool)
    elif isinstance(format, IntFormat):
        clips = format.clips(v, _spread_zero(scales, x.shape, block))
    elif isinstance(format, Codebook):
        clips = format.clips(v, scales.codebook)
    else:
        clips = format.clips(v)
    return _snap(format, block, x, scales, uniform), (clips, scales, uniform)


def _snap_backward(format: Format, block, residuals, gradient):
    clips, scales, uniform = residuals
    none = jax.tree.map(zero_cotangent, (scales, uniform))
    return jnp.where(clips, jnp.zeros((), gradient.dtype), gradient), *none


def zero_cotangent(x: jax.Array) -> Any:
    """The cotangent of what no gradient reaches: zeros, without a type for integers."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


_snap.defvjp(_snap_forward, _snap_backward)


def fake_quantize_array(
    x: Float[Array, "*n"],
    scales: Scales,
    uniform: Float[Array, "*n"] | None = None,
    *,
    spec: QuantSpec,
) -> Float[Array, "*n"]:
    """D(Q(x)) in floats: the values that `quantize_array` would store, bit for bit.

    Gradient (straight-through): dL/dx = dL/dy where x lies in a cell of the grid, 0 where it is
    clipped, which under thresholds it is nowhere; none to scales, zero points, codebooks and
    thresholds.
    """
    return _snap(spec.format, spec.block_shape, x, scales, uniform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _learned(spec: QuantSpec, to_levels: bool, x: jax.Array, scales: Scales) -> jax.Array:
    return _snap(spec.format, spec.block_shape, x, scales, None)


def _learned_forward(spec: QuantSpec, to_levels: bool, x, scales: Scales):
    y, (clips, *_) = _snap_forward(spec.format, spec.block_shape, x, scales, None)
    if to_levels and isinstance(spec.format, IntFormat):
        v = _scaled(x, scales, spec.block_shape)
        zero = _spread_zero(scales, x.shape, spec.block_shape)
        v = v if zero is None else v + zero
        clips = (v < np.float32(spec.format.lowest)) | (v > np.float32(spec.format.highest))
    return y, (x, scales, clips)


def _learned_backward(spec: QuantSpec, to_levels: bool, residuals, gradient):
    x, scales, clips = residuals
    format, block = spec.format, spec.block_shape
    g = gradient.astype(jnp.float32)
    codes = encoded(x, scales, format, block)
    table = None
    if isinstance(format, Codebook):
        table = scales.codebook
        level = format.decode(codes, table)
    else:
        level = format.decode(codes)
    zero = _spread_zero(scales, x.shape, block)
    level = level if zero is None else level - zero
    step = spread(scale_values(scales.scale), x.shape, block)
    moves = jnp.where(clips, level, level - _scaled(x, scales, block))
    by_scale = _like(block_sum(g * moves, block), scales.scale)
    by_zero = None
    if zero is not None:
        by_zero = _like(block_sum(jnp.where(clips, -g * step, 0), block), scales.zero_point)
    by_table = None
    if table is not None:
        # The level of a cell moves all values in it.
        cells = jnp.arange(table.shape[-1], dtype=codes.dtype)
        hits = (codes[..., None] == cells) * (g * step)[..., None]
        lead = table.ndim - 1
        by_table = hits.sum(tuple(range(lead, x.ndim))).astype(table.dtype)
    dx = jnp.where(clips, jnp.zeros((), gradient.dtype), gradient)
    return dx, Scales(by_scale, by_zero, by_table)


def _like(per_block: Float[Array, "*b"], scale: Any) -> Any:
    """A cotangent of scales, which may have fewer axes of length one; none for quantized ones."""
    if not isinstance(scale, jax.Array) or not jnp.issubdtype(scale.dtype, jnp.floating):
        return jax.tree.map(zero_cotangent, scale)
    return per_block.reshape(scale.shape).astype(scale.dtype)


_learned.defvjp(_learned_forward, _learned_backward)


def fake_quantize_learned(
    x: Float[Array, "*n"], scales: Scales, *, spec: QuantSpec, to_levels: bool = False
) -> Float[Array, "*n"]:
    """`fake_quantize_array` whose gradient reaches the scales as well, for those that train them.

    With v = x / s, l(v) the level of v (code minus zero point) and g = dL/dy:
    dL/dx = g in the cells of the grid, 0 where x is clipped;
    dL/ds = sum g (l(v) - v) in the cells and sum g l(v) where x is clipped, over a block;
    dL/dz = -sum g s where x is clipped; dL/dt_k = sum g s over all x that take entry k of a
    codebook t. The forward pass is that of `quantize_array`, bit for bit. to_levels: of integers,
    x counts as clipped from the outermost levels on, not half a step beyond, where their cells end.

    Esser et al. 2020, arXiv:1902.08153, eq. 3; Bhalgat et al. 2020, arXiv:2004.09576, eq. 5 and 6.
    """
    return _learned(spec, to_levels, x, scales)
