"""A product of tokens sorted by expert, rounded on the way, with the experts' quantized matrices.

y_tn = s_t s_en sum_k (q_tk - z_t)(q_ekn - z_en), e the expert of token t: one expert a token, so
its scales come after the sum, as in `quantjax.ops.dot`. Gale et al. 2022, arXiv:2211.15841."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from quantjax.affine import Scales, dequantize_array, scale_values, zero_cotangent
from quantjax.blocks import counts, spread
from quantjax.ops.activation import activation_codes, fake_activation
from quantjax.ops.dot import Lowering, Plan, integer_codes, level_factor, no_integers
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec


def plan_ragged_dot(q: QTensor, act: QuantSpec) -> Plan:
    """What `quantized_ragged_dot` does for these experts (E, K, N) and activation."""
    reason = no_integers(q, act, q.shape[1])
    if not reason and counts(q.shape, q.block)[1] > 1:
        reason = "several scales along the sum"
    return Plan(Lowering.FLOAT, reason) if reason else Plan(Lowering.INTEGER)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def quantized_ragged_dot(
    x_TK: Float[Array, "T K"],
    q_EKN: QTensor,
    sizes_E: Int[Array, " E"],
    given: Scales | None,
    act: QuantSpec,
) -> Float[Array, "T N"]:
    """`lax.ragged_dot(round(x), dequantize(q), sizes)` in float32, summed in integers.

    Rounding, NaN and gradient are those of `quantized_dot`. Tokens beyond the sum of the sizes
    give 0. `plan_ragged_dot` must not be FLOAT.
    """
    codes, scales = activation_codes(x_TK.astype(jnp.float32), act, given, (1,))
    w, zero_w = integer_codes(q_EKN)
    signed = codes
    zero_x = None if scales.zero_point is None else scales.zero_point.astype(jnp.int32)
    if codes.dtype == jnp.uint8:
        signed = lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)
        zero_x = (jnp.int32(0) if zero_x is None else zero_x) - 128
    y = lax.ragged_dot(signed, w, sizes_E, preferred_element_type=jnp.int32)
    expert = jnp.repeat(jnp.arange(w.shape[0]), sizes_E, total_repeat_length=x_TK.shape[0])
    each = (w.shape[0], 1, w.shape[2])

    def of_token(per_block: jax.Array) -> jax.Array:
        """One value per block of the experts, constant along the sum, as it meets (T, N)."""
        per_block = spread(per_block, q_EKN.shape, q_EKN.block)
        return jnp.broadcast_to(per_block, each)[:, 0][expert]

    if zero_x is not None:
        sums = jnp.sum(w, 1, keepdims=True, dtype=jnp.int32)
        y = y - zero_x * sums[:, 0][expert]
    if zero_w is not None:
        total = jnp.sum(signed, 1, keepdims=True, dtype=jnp.int32)
        if zero_x is not None:
            total = total - zero_x * x_TK.shape[1]
        y = y - (zero_w if isinstance(zero_w, int) else of_token(zero_w)) * total
    s_w = scale_values(q_EKN.scale) * level_factor(q_EKN)
    s_w = of_token(s_w) if s_w.ndim else s_w
    used = jnp.arange(x_TK.shape[0])[:, None] < jnp.sum(sizes_E)
    return jnp.where(used, y.astype(jnp.float32) * (scale_values(scales.scale) * s_w), 0)


def _forward(x, q, sizes, given, act):
    return quantized_ragged_dot(x, q, sizes, given, act), (x, q, sizes, given)


def _backward(act, residuals, gradient):
    x, q, sizes, given = residuals

    def product(x: jax.Array) -> jax.Array:
        w = dequantize_array(q).astype(jnp.float32)
        return lax.ragged_dot(fake_activation(x.astype(jnp.float32), act, given, (1,)), w, sizes)

    (dx,) = jax.vjp(product, x)[1](gradient)
    return dx, *jax.tree.map(zero_cotangent, (q, sizes, given))


quantized_ragged_dot.defvjp(_forward, _backward)
