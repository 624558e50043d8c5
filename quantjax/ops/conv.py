"""The convolution of 8-bit codes, exact in integers: on CPU and GPU the product of patches with
the kernel, on TPU the native operation.

The code that stands for zero pads the borders: Jacob et al. 2018, arXiv:1712.05877, section 2.4.
CuDNN has no s8 x s8 -> s32: XLA refuses it on GPUs, https://github.com/jax-ml/jax/issues/7637."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Int8, Int32, Integer, UInt8

from quantjax.ops.depthwise import depthwise
from quantjax.ops.forms import flip
from quantjax.ops.patches import Window, convolve, is_known, output_sums
from quantjax.ops.probe import force, forced, probe
from quantjax.ops.transposed import interleave, kernel_of_phases, phases

# Bytes of patches at a time. On CPU patches that leave the second-level cache cost more than the
# product: 3x3 on 256 x 16x16x64 is 1.1 times as fast as float in one piece, 2.4 times in blocks of
# 0.25 to 1 MiB. On GPUs a block must only bound the memory.
CPU_PATCHES, GPU_PATCHES = 2**20, 2**28
# What integers save and cost on CPU for each place of the window, in multiply-adds of XLA's float32
# convolution. Fitted to 70 layers at batch 1, 32 and 256, quantizing the input (one scale for each
# example) and scaling the output included: medians on two shared cores of an Intel Xeon with AMX
# and VNNI, jaxlib 0.10.2. Times as fast as float:
#   3x3, channels in to out    3 to 16: 0.7-1.8, 16 to 16: 0.5-0.8 (batch 1: 0.8-1.7), 32 to 32:
#     0.7-1.0, 32 to 64: 2.0-3.5 (in steps of 2: 0.9-1.4; batch 1: 0.2-0.6), 64 to 64: 1.2-2.4
#     (8x8 at batch 1: 0.6-1.6), 128 to 128: 1.6-4, 256 to 256: 2.3-8
#   7x7 in steps of 2, 3 to 64: 0.5-0.9; 16x16 patches, 3 to 384: 1.8-2.3; 4x4, 3 to 64: 0.4-0.9
#   1x1    16 to 32: 0.1-0.6, 32 to 192: 0.4-0.7, 64 to 256: 0.7-1.3, 256 to 64: 1.5-4,
#     256 to 1024: 1.6-8
#   groups    of several channels: 1.1-7, of one (depthwise): 1.7-40; three spatial axes: 4-8, as
#     XLA's own float forms of these are slow; with 1x1 windows, 0.3-1.4
#   transposed, twice the size    2x2 64 to 32: 1.2-3, 3x3 64 to 32: 0.7-1.8, 4x4 128 to 64: 1.5-1.8
#     (batch 1: 0.8), 4x4 256 to 128: 2.0-2.4 (batch 1: 0.8-0.9), 4x4 32 to 3: 0.6
GAIN = 5.0  # how many integer multiply-adds take the time of a float one
OUTPUT, INPUT = 50.0, 28.0  # to write one int32 and scale it; to quantize one input
PATCH, THIN = 28.0, 60.0  # to copy one byte into a patch; the same in runs of less than 16 bytes
# Once for all places: to copy a byte into the kernel of a transposed convolution; to start what
# else there is to do, some 0.05 ms.
ARRANGE, CALL = 12.0, 4e6

Groups = tuple[int, int]  # of features, of the batch; one of them is 1


def integer_conv(
    x: Int8[Array, "*x"] | UInt8[Array, "*x"],
    w: Int8[Array, "*w"],
    *,
    pad_value: int | Integer[Array, ""] | Integer[Array, " N"],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
) -> Int32[Array, "*y"]:
    """`lax.conv_general_dilated` of integer codes, summed exactly in int32.

    The arguments are those of the primitive, so padding is in pairs, which may be negative.
    `pad_value` is the code of zero, one for all or one for each example: it fills the padding and
    the holes of `lhs_dilation`. Sums of more than 65,000 terms may pass 2^31 and wrap. It has no
    gradient. Raises TypeError for other dtypes, ValueError for a number that is no code of x.

    >>> numbers = lax.conv_dimension_numbers((1, 3, 1), (3, 1, 1), ("NWC", "WIO", "NWC"))
    >>> x, w = jnp.array([[[7], [9], [8]]], jnp.uint8), jnp.ones((3, 1, 1), jnp.int8)
    >>> steps = {"window_strides": (1,), "lhs_dilation": (1,), "rhs_dilation": (1,)}
    >>> y = integer_conv(x, w, pad_value=5, padding=((1, 1),), dimension_numbers=numbers, **steps)
    >>> y[0, :, 0].tolist()
    [21, 24, 22]
    """
    bounds = jnp.iinfo(x.dtype)
    if isinstance(pad_value, int) and not bounds.min <= pad_value <= bounds.max:
        raise ValueError(f"integer_conv: pad_value {pad_value} is no code of {x.dtype}.")
    numbers, zero = dimension_numbers, jnp.asarray(pad_value, x.dtype)
    lengths = [x.shape[a] for a in numbers.lhs_spec[2:]]
    size = tuple(w.shape[a] for a in numbers.rhs_spec[2:])
    steps = (*window_strides, *rhs_dilation, batch_group_count)
    if max(lhs_dilation) > 1 and set(steps) == {1} and is_known(lengths):
        axes = [phases(*axis) for axis in zip(lengths, size, padding, lhs_dilation, strict=True)]
        if all(axis.out > 0 for axis in axes):
            v = kernel_of_phases(w, axes, numbers, feature_group_count)
            y = _bind(
                _pad(x, zero, [(*axis.pad, 0) for axis in axes], numbers),
                v,
                window=Window(tuple(axis.size for axis in axes), *((1,) * len(axes),) * 2),
                numbers=numbers,
                groups=(feature_group_count, 1),
                form=forced(),
            )
            added = None if isinstance(pad_value, int) and pad_value == 0 else zero
            return interleave(y, w, v, added, axes, numbers, feature_group_count)
    pads = [(*pad, holes - 1) for pad, holes in zip(padding, lhs_dilation, strict=True)]
    return _bind(
        _pad(x, zero, pads, numbers),
        w,
        window=Window(size, tuple(window_strides), tuple(rhs_dilation)),
        numbers=numbers,
        groups=(feature_group_count, batch_group_count),
        form=forced(),
    )


def _pad(
    x: jax.Array, zero: jax.Array, pads: Sequence[tuple[int, int, int]], numbers: Any
) -> jax.Array:
    """The spatial axes padded by the code of zero, which may be one for each example."""
    edges = [(0, 0, 0)] * x.ndim
    for a, pad in zip(numbers.lhs_spec[2:], pads, strict=True):
        edges[a] = pad
    if zero.ndim == 0:
        return lax.pad(x, zero, edges)
    batch = numbers.lhs_spec[0]
    del edges[batch]
    return jax.vmap(lambda x, zero: lax.pad(x, zero, edges), (batch, 0), batch)(x, zero)


def prefers_integers(
    x_shape: Sequence[Any],
    w_shape: Sequence[int],
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
) -> str:
    """Why a convolution is faster in float on CPU; empty if `integer_conv` is, with its input
    quantized and its output scaled on the way.

    >>> shape = {"padding": ((1, 1),) * 2, "window_strides": (1, 1), "lhs_dilation": (1, 1)}
    >>> numbers = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC"))
    >>> shape |= {"rhs_dilation": (1, 1), "dimension_numbers": numbers}
    >>> prefers_integers((32, 16, 16, 64), (3, 3, 64, 64), **shape)
    ''
    >>> prefers_integers((32, 32, 32, 3), (3, 3, 3, 16), **shape)
    'a sum of 27 to 16 outputs gains less than patches and scales cost'
    """
    outputs, channels, *size = (w_shape[a] for a in dimension_numbers.rhs_spec)
    groups = max(feature_group_count, batch_group_count)
    if (groups > 1 or len(size) > 2) and math.prod(size) > 1:
        return ""
    outputs //= groups
    saved, once = math.prod(size) * channels * outputs, CALL
    batch, _, *lengths = (x_shape[a] for a in dimension_numbers.lhs_spec)
    if max(lhs_dilation) > 1:
        if {*window_strides, *rhs_dilation} != {1}:
            return "steps of more than one over holes"
        axes = [phases(*axis) for axis in zip(lengths, size, padding, lhs_dilation, strict=True)]
        size, outputs = [axis.size for axis in axes], outputs * math.prod(lhs_dilation)
        once += math.prod(size) * channels * outputs * ARRANGE
        places = tuple(lengths)
    else:
        padded = [n + low + high for n, (low, high) in zip(lengths, padding, strict=True)]
        places = Window(tuple(size), tuple(window_strides), tuple(rhs_dilation)).places(padded)
    window = math.prod(size)
    summed, seen = window * channels, min(window, math.prod(window_strides))
    patch = 0.0 if window == 1 else PATCH if channels >= 16 else THIN
    gain = saved - summed * outputs / GAIN
    gain -= outputs * OUTPUT + summed * patch + channels * seen * INPUT
    if gain <= 0:
        return f"a sum of {summed} to {outputs} outputs gains less than patches and scales cost"
    if is_known([batch, *places]) and gain * groups * batch * math.prod(places) <= once:
        return "too small to be worth more operations"
    return ""


# The primitive: a convolution of an input that is padded and dilated already.
integer_conv_p = Primitive("integer_conv")


def _bind(x: Any, w: Any, **params: Any) -> jax.Array:
    return integer_conv_p.bind(x, w, **params)


_compiled = jax.jit(_bind, static_argnames=("window", "numbers", "groups", "form"))
integer_conv_p.def_impl(_compiled)


def _native(x: jax.Array, w: jax.Array, window: Window, numbers: Any, groups: Groups) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        w,
        window.strides,
        [(0, 0)] * len(window.size),
        rhs_dilation=window.dilation,
        dimension_numbers=numbers,
        feature_group_count=groups[0],
        batch_group_count=groups[1],
        preferred_element_type=jnp.int32,
    )


@integer_conv_p.def_abstract_eval
def _abstract(
    x: Any, w: Any, *, window: Window, numbers: Any, groups: Groups, form: str | None
) -> Any:
    if x.dtype not in (np.int8, np.uint8) or w.dtype != np.int8:
        raise TypeError(
            f"integer_conv: expected int8 or uint8 and int8, got {x.dtype} and {w.dtype}."
        )
    signed = jax.ShapeDtypeStruct(x.shape, jnp.int8)
    out = jax.eval_shape(lambda x, w: _native(x, w, window, numbers, groups), signed, w)
    return jax.core.ShapedArray(out.shape, jnp.int32)


def _as(dtype: Any, x: jax.Array, w: jax.Array, numbers: Any) -> tuple[jax.Array, jax.Array | int]:
    """The codes in the other type, 128 apart, and what every output of them then misses: 128 times
    the sum of its weights, as no padding is left to be made."""
    if x.dtype == dtype:
        return x, 0
    others = [a for a in range(x.ndim) if a != numbers.out_spec[1]]
    sums = lax.expand_dims(output_sums(w, numbers), others)
    return flip(x), sums * (128 if x.dtype == np.uint8 else -128)


def _on_tpu(
    x: jax.Array, w: jax.Array, *, window: Window, numbers: Any, groups: Groups, form: str | None
) -> jax.Array:
    x, missing = _as(np.int8, x, w, numbers)
    return _native(x, w, window, numbers, groups) + missing


def _elsewhere(
    x: jax.Array, w: jax.Array, *, window: Window, numbers: Any, groups: Groups, form: str | None
) -> jax.Array:
    limit = GPU_PATCHES if is_known(x.shape) else None
    return _by_patches(x, w, window, numbers, groups, np.int8, limit)


def _lower_on_cpu(
    ctx: Any, x: Any, w: Any, *, window: Window, numbers: Any, groups: Groups, form: str | None
) -> Any:
    """By the product that the probe ranks first, asked here, where the platform is known."""
    form = form or probe().form
    dtype = np.uint8 if form == "u8s8" else np.int8

    def chosen(x: jax.Array, w: jax.Array) -> jax.Array:
        with force(form):
            return _by_patches(x, w, window, numbers, groups, dtype, CPU_PATCHES)

    return mlir.lower_fun(chosen, multiple_results=False)(ctx, x, w)


mlir.register_lowering(integer_conv_p, mlir.lower_fun(_elsewhere, multiple_results=False))
mlir.register_lowering(
    integer_conv_p, mlir.lower_fun(_on_tpu, multiple_results=False), platform="tpu"
)
mlir.register_lowering(integer_conv_p, _lower_on_cpu, platform="cpu")


def _by_patches(
    x: jax.Array,
    w: jax.Array,
    window: Window,
    numbers: lax.ConvDimensionNumbers,
    groups: Groups,
    dtype: Any,
    limit: int | None,
) -> jax.Array:
    """Channels last, groups first; then the axes as they were asked for. Codes become `dtype`
    before patches repeat them; sums of one channel have no preference."""
    alone = groups[0] == x.shape[numbers.lhs_spec[1]] > 1
    x, missing = (x, 0) if alone else _as(dtype, x, w, numbers)
    # G groups, N batch, S spatial axes, C inputs and O outputs of a group, K window
    x_NSC = jnp.transpose(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    w_KCO = jnp.transpose(w, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    conv = functools.partial(convolve, window=window)
    count = max(groups)
    if alone:
        y_NSO = depthwise(x_NSC, w_KCO, window)
    elif count == 1:
        y_NSO = conv(x_NSC, w_KCO, limit=limit)
    else:
        x_GNSC = _split(x_NSC, x.ndim - 1 if groups[0] > 1 else 0, count)
        w_GKCO = _split(w_KCO, w.ndim - 1, count)
        share = None if limit is None else limit // count
        y_GNSO = jax.vmap(functools.partial(conv, limit=share))(x_GNSC, w_GKCO)
        y_NSO = _merge(y_GNSO, x.ndim - 1)
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return jnp.transpose(y_NSO, np.argsort(order).tolist()) + missing


def _split(x: jax.Array, axis: int, count: int) -> jax.Array:
    """An axis in `count` runs, which become the first axis."""
    shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _merge(x: jax.Array, axis: int, groups: int = 1) -> jax.Array:
    """The first axis goes into another, of the result: behind the `groups` that this is made of."""
    n, *shape = x.shape
    runs = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
    x = jnp.moveaxis(x.reshape(n, *runs), 0, axis + 1)
    return x.reshape(*shape[:axis], n * shape[axis], *shape[axis + 1 :])


def _batch(
    args: Any, dims: Any, *, window: Window, numbers: Any, groups: Groups, form: str | None
) -> tuple[jax.Array, int]:
    """A mapped axis joins an axis there is: of x alone the batch, of w alone the outputs, of both
    the groups."""
    x, w = (a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True))
    rest = {"window": window, "numbers": numbers, "form": form}
    (n_x, c_x), o_w = numbers.lhs_spec[:2], numbers.rhs_spec[0]
    n_y, o_y = numbers.out_spec[:2]
    x_mapped, w_mapped = (d is not None for d in dims)
    if x_mapped and w_mapped:
        size, grouped = x.shape[0], groups[1] > 1
        x, w = _merge(x, n_x if grouped else c_x), _merge(w, o_w)
        more = (1, size * groups[1]) if grouped else (size * groups[0], 1)
        return _split(_bind(x, w, groups=more, **rest), o_y, size), 0
    if x_mapped:
        size = x.shape[0]
        y = _bind(_merge(x, n_x, groups[1]), w, groups=groups, **rest)
        return _split(y, n_y, size), 0
    size, count = w.shape[0], max(groups)
    y = _bind(x, _merge(w, o_w, count), groups=groups, **rest)
    y = _split(_split(y, o_y, count), o_y + 1, size)  # mapped, groups, axes of y
    return jax.vmap(lambda y: _merge(y, o_y))(y), 0


batching.primitive_batchers[integer_conv_p] = _batch
