"""How is the activation that meets a quantized weight rounded? By its spec, and scales found anew
in each call (dynamic) or given (static).
Jacob et al. 2018, arXiv:1712.05877, section 3.1."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import (
    Scales,
    encoded,
    fake_quantize_array,
    find_scales,
    finite_blocks,
    scale_values,
)
from quantjax.blocks import Block
from quantjax.rounding import low_byte
from quantjax.spec import Granularity, QuantSpec


def activation_block(rank: int, act: QuantSpec, summed: Sequence[int]) -> Block:
    """Which elements of an activation share a scale: all (TENSOR), or those that one output sums
    over: a row of a dot, an example of a convolution.

    >>> from quantjax import IntFormat
    >>> activation_block(3, QuantSpec(format=IntFormat(8)), [2])
    (1, 1, None)
    """
    whole = act.block is Granularity.TENSOR
    return tuple(None if whole or a in summed else 1 for a in range(rank))


def activation_scales(
    x: Float[Array, "*x"], act: QuantSpec, given: Scales | None, summed: Sequence[int]
) -> Scales:
    """The scales of x, of its rank: the given ones, or those of its own range. A row (or, under
    TENSOR, an array) with NaN or infinity gets a NaN scale, unless scales are given."""
    if given is None:
        return find_scales(x, act.with_block(activation_block(x.ndim, act, summed)))
    single = (1,) * x.ndim
    zero = None if given.zero_point is None else jnp.reshape(given.zero_point, single)
    scale = jnp.reshape(jnp.asarray(given.scale), single)
    return Scales(scale, zero, thresholds=given.thresholds)


def fake_activation(
    x: Float[Array, "*x"], act: QuantSpec, given: Scales | None, summed: Sequence[int]
) -> Float[Array, "*x"]:
    """D(Q(x)) in floats, as the products in low precision round it. Gradient straight-through: 1,
    or 0 where x is clipped. Under given scales NaN and infinity stay what they are."""
    spec = act.with_block(activation_block(x.ndim, act, summed))
    rounded = fake_quantize_array(x, activation_scales(x, act, given, summed), spec=spec)
    return rounded if given is None else jnp.where(jnp.isfinite(x), rounded, x)


def activation_codes(
    x: Float[Array, "*x"], act: QuantSpec, given: Scales | None, summed: Sequence[int]
) -> tuple[jax.Array, Scales]:
    """Codes of x, a byte each (int8, or uint8 for unsigned and float formats), and its scales.

    Given scales come back as one a row, NaN for rows that hold NaN or infinity: a code can not
    say so.
    """
    scales = activation_scales(x, act, given, summed)
    codes = encoded(x, scales, act.format, activation_block(x.ndim, act, summed))
    if given is not None:
        rows = act.with_block(tuple(None if a in summed else 1 for a in range(x.ndim)))
        fine = finite_blocks(x, rows).reshape(
            [1 if a in summed else n for a, n in enumerate(x.shape)]
        )
        step = scale_values(scales.scale)
        scales = scales._replace(scale=jnp.where(fine, step, np.float32(np.nan)))
    return low_byte(codes, act.format.code_dtype), scales
