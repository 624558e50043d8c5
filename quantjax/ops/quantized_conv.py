"""A convolution of an image, rounded on the way, with a quantized kernel.

y = s_x s_w sum (q_x - z_x) q_w over the window: what pads the image is its zero point. Jacob et al.
2018, arXiv:1712.05877, section 2.4 and appendix."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import Scales, dequantize_array, scale_values, zero_cotangent
from quantjax.blocks import counts, spread
from quantjax.formats import IntFormat
from quantjax.ops.activation import activation_codes, fake_activation
from quantjax.ops.conv import integer_conv, prefers_integers
from quantjax.ops.dot import Lowering, Plan, integer_codes, level_factor, no_integers
from quantjax.ops.patches import output_sums
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec


class ConvParams(NamedTuple):
    """The parameters of `lax.conv_general_dilated_p` that say what is summed; hashable."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int = 1
    batch_group_count: int = 1

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes of the image that share a scale: an example's."""
        return tuple(self.dimension_numbers.lhs_spec[1:])


def plan_conv(q: QTensor, act: QuantSpec, params: ConvParams, x_shape: tuple[int, ...]) -> Plan:
    """What `quantized_conv` does for this kernel and activation."""
    _, *window = params.dimension_numbers.rhs_spec
    reason = no_integers(q, act, math.prod(q.shape[a] for a in window))
    if not reason and any(counts(q.shape, q.block)[a] > 1 for a in window):
        reason = "several scales along the sum"
    if not reason and q.zero_point is not None:
        reason = "a zero point of the kernel"
    if not reason and isinstance(q.format, IntFormat) and not q.format.signed:
        reason = "unsigned codes of the kernel"
    if not reason and params.batch_group_count > 1:
        reason = "groups of the batch"
    if reason:
        return Plan(Lowering.FLOAT, reason)
    slow = prefers_integers(x_shape, q.shape, **params._asdict())
    return Plan(Lowering.INTEGER, on_cpu="faster for this shape" if slow else "")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def quantized_conv(
    x: Float[Array, "*x"],
    q: QTensor,
    given: Scales | None,
    act: QuantSpec,
    params: ConvParams,
) -> Float[Array, "*y"]:
    """`lax.conv_general_dilated(round(x), dequantize(q), **params)` in float32.

    Rounding, NaN and gradient are those of `quantized_dot`, with an example in place of a row.
    Where the plan says so a CPU multiplies the rounded values as floats, other platforms in
    integers; the plan's lowering must not be FLOAT.
    """
    slow = plan_conv(q, act, params, x.shape).on_cpu
    in_integers = functools.partial(_integer_conv, act=act, params=params)
    if not slow:
        return in_integers(x, q, given)
    in_floats = functools.partial(_float_conv, act=act, params=params)
    return lax.platform_dependent(x, q, given, cpu=in_floats, default=in_integers)


def _integer_conv(x, q: QTensor, given, *, act: QuantSpec, params: ConvParams) -> jax.Array:
    numbers = params.dimension_numbers
    codes, scales = activation_codes(x.astype(jnp.float32), act, given, params.summed)
    w, zero = integer_codes(q)[0], scales.zero_point
    pad: jax.Array | int = 0
    if zero is not None:
        pad = zero.astype(codes.dtype)
        pad = pad.reshape(()) if pad.size == 1 else pad.reshape(-1)
    y = integer_conv(codes, w, pad_value=pad, **params._asdict())
    rank = x.ndim

    def placed(values: jax.Array, axis: int) -> jax.Array:
        """A vector, or a single value, along one axis of the output."""
        return values.reshape([-1 if a == axis else 1 for a in range(rank)])

    if zero is not None:
        sums = placed(output_sums(w, numbers), numbers.out_spec[1])
        y = y - placed(zero.astype(jnp.int32), numbers.out_spec[0]) * sums
    s_w = spread(scale_values(q.scale), q.shape, q.block) if q.scale is not None else jnp.ones(1)
    s_w = placed(s_w * level_factor(q), numbers.out_spec[1])
    return y.astype(jnp.float32) * (placed(scale_values(scales.scale), numbers.out_spec[0]) * s_w)


def _float_conv(x, q: QTensor, given, *, act: QuantSpec, params: ConvParams) -> jax.Array:
    x = fake_activation(x.astype(jnp.float32), act, given, params.summed)
    w = dequantize_array(q).astype(jnp.float32)
    return lax.conv_general_dilated(x, w, **params._asdict())


def _forward(x, q, given, act, params):
    return quantized_conv(x, q, given, act, params), (x, q, given)


def _backward(act, params, residuals, gradient):
    x, q, given = residuals
    (dx,) = jax.vjp(lambda x: _float_conv(x, q, given, act=act, params=params), x)[1](gradient)
    return dx, *jax.tree.map(zero_cotangent, (q, given))


quantized_conv.defvjp(_forward, _backward)
