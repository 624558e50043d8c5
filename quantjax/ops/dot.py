"""A product of an activation, quantized on the way, with a quantized weight, in integers.

y = s_x s_w (q_x . q_w): both scales are constant along the sum, so they come after it. Jacob et
al. 2018, arXiv:1712.05877, section 2.2, with a symmetric activation and one scale per row."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from quantjax.affine import (
    codes_of,
    dequantize_array,
    fake_quantize_array,
    find_scales,
    scale_values,
)
from quantjax.blocks import counts
from quantjax.formats import IntFormat
from quantjax.ops.forms import DimensionNumbers
from quantjax.ops.integer import integer_dot_general
from quantjax.qtensor import QTensor
from quantjax.rounding import low_byte
from quantjax.scales import inverse
from quantjax.spec import QuantSpec


def fits_integers(q: QTensor, act: QuantSpec, contracting: Sequence[int]) -> str:
    """Why the product can not be computed in integers; empty if it can."""
    if not isinstance(q.format, IntFormat) or not isinstance(act.format, IntFormat):
        return f"{q.format} with activations in {act.format}"
    if not q.format.signed or not act.format.signed or not act.format.has_zero:
        return "an unsigned grid"
    if not q.format.has_zero and q.format.bits == 8:
        return "half-integer levels of 8 bits"
    if q.zero_point is not None or not act.symmetric:
        return "a zero point"
    if isinstance(q.scale, QTensor):
        return "a quantized scale"
    blocks = counts(q.shape, q.block)
    if any(blocks[a] > 1 for a in contracting):
        return "several scales along the sum"
    return ""


def _integers(q: QTensor) -> tuple[jax.Array, int]:
    """Codes whose products are those of the levels, and by what they are larger than the levels:
    half-integer levels are the odd integers over two."""
    codes = codes_of(q)
    if isinstance(q.format, IntFormat) and not q.format.has_zero:
        return codes * np.int8(2) + np.int8(1), 2
    return codes, 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def integer_dot(
    x: Float[Array, "*x"], q: QTensor, act: QuantSpec, dimension_numbers: DimensionNumbers
) -> Float[Array, "*y"]:
    """`lax.dot_general(x, dequantize(q), dimension_numbers)`, x quantized row by row, in float32.

    Exact but for the roundings of x and of the scales: sums are integers. A row with NaN or
    infinity comes out as NaN. The gradient passes straight through to x, as if it had not been
    rounded; none reaches q. `fits_integers` must be empty.
    """
    (cx, cw), (bx, bw) = dimension_numbers
    rows = [a for a in range(x.ndim) if a not in (*cx, *bx)]
    free = [a for a in range(q.ndim) if a not in (*cw, *bw)]
    row_shape, lead = tuple(x.shape[a] for a in rows), len(bx)
    # x as (batch, one axis of rows, summed axes); its scales as (batch, rows, 1, ...)
    x = jnp.transpose(x, [*bx, *rows, *cx]).astype(jnp.float32)
    x = x.reshape(*x.shape[:lead], -1, *x.shape[lead + len(rows) :])
    block = (1,) * (lead + 1) + (None,) * len(cx)
    found = find_scales(x, act.with_block(block))
    s_x = scale_values(found.scale)
    assert isinstance(act.format, IntFormat)
    codes = act.format.encode(x * inverse(s_x))
    w, factor = _integers(q)
    numbers = ((tuple(range(lead + 1, x.ndim)), tuple(cw)), (tuple(range(lead)), tuple(bw)))
    y = integer_dot_general(low_byte(codes, np.int8), w, numbers)
    s_w = scale_values(q.scale) * np.float32(1 / factor)
    s_w = jnp.broadcast_to(s_w, [1 if a in cw else n for a, n in enumerate(q.shape)])
    s_w = jnp.transpose(s_w, [*bw, *free, *cw])
    s_w = s_w.reshape(*s_w.shape[:lead], 1, *s_w.shape[lead : lead + len(free)])
    s_x = s_x.reshape(*s_x.shape[: lead + 1], *(1,) * len(free))
    y = y.astype(jnp.float32) * (s_x * s_w)
    return y.reshape(*y.shape[:lead], *row_shape, *y.shape[lead + 1 :])


def _integer_dot_forward(x, q, act, dimension_numbers):
    return integer_dot(x, q, act, dimension_numbers), (x, q)


def _integer_dot_backward(act, dimension_numbers, residuals, gradient):
    x, q = residuals

    def product(x: jax.Array) -> jax.Array:
        w = dequantize_array(q).astype(jnp.float32)
        return lax.dot_general(x.astype(jnp.float32), w, dimension_numbers)

    (dx,) = jax.vjp(product, x)[1](gradient)
    return dx, jax.tree.map(_nothing, q)


def _nothing(a: jax.Array) -> Any:
    floating = jnp.issubdtype(a.dtype, jnp.floating)
    return jnp.zeros_like(a) if floating else np.zeros(a.shape, jax.dtypes.float0)


integer_dot.defvjp(_integer_dot_forward, _integer_dot_backward)


def fake_rows(x: Float[Array, "*x"], act: QuantSpec, summed: Sequence[int]) -> Float[Array, "*x"]:
    """x rounded as `integer_dot` rounds it, in floats: one scale for each row, which are the
    elements that one output sums over. Gradient straight-through."""
    block = tuple(None if a in summed else 1 for a in range(x.ndim))
    spec = act.with_block(block)
    return fake_quantize_array(x, find_scales(x, spec), spec=spec)
