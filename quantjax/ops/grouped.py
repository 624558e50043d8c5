"""The product of 8-bit codes whose weight has a scale for each group along the sum, as in W4A8.

y = sum_g s_g (x_g . w_g): integers are exact inside a group and floats between groups. The groups
are a loop with one accumulator: as one batched product each group's result would go through
memory, which is up to ten times slower."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

from quantjax.ops.forms import Codes
from quantjax.ops.integer import integer_dot_general
from quantjax.ops.thresholds import SHORT_GROUP, SHORT_GROUP_ROWS


def grouped_pays(rows: int, group: int) -> bool:
    """Whether groups of so many codes and x of so many rows are faster than the float product of
    the dequantized weight, by measurement (`quantjax.ops.thresholds`)."""
    return group > SHORT_GROUP or (group == SHORT_GROUP and rows <= SHORT_GROUP_ROWS)


def grouped_dot(
    x_BMK: Codes, w_BKN: Int8[Array, "*b k n"], scale_BGN: Float[Array, "*b g n"]
) -> Float[Array, "*b m n"]:
    """y_mn = sum_g s_gn sum_(k in g) x_mk w_kn, over any number of leading batch axes B.

    The G groups have K / G codes each; up to 512 codes a group's sum is exact in float32 too, and
    then |y - y_exact| <= (G + 1) 2^-24 sum_g |s_g x_g . w_g|. Raises ValueError if G does not
    divide K. The gradient reaches the scales.

    >>> x, w = jnp.array([[1, 2, 3, 4]], jnp.int8), jnp.ones((4, 1), jnp.int8)
    >>> grouped_dot(x, w, jnp.array([[1.0], [0.5]])).tolist()
    [[6.5]]
    """
    *batch, rows, length = x_BMK.shape
    groups, columns = scale_BGN.shape[-2:]
    if groups == 0 or length % groups:
        raise ValueError(f"grouped_dot: {groups} groups do not divide a sum of {length} codes.")
    lead, group = len(batch), length // groups
    leading = tuple(range(lead))
    numbers = (((lead + 1,), (lead,)), (leading, leading))

    def add(i: Any, y_BMN: jax.Array) -> jax.Array:
        x = lax.dynamic_slice_in_dim(x_BMK, i * group, group, lead + 1)
        w = lax.dynamic_slice_in_dim(w_BKN, i * group, group, lead)
        scale = lax.dynamic_slice_in_dim(scale_BGN, i, 1, lead).astype(jnp.float32)
        return y_BMN + integer_dot_general(x, w, numbers).astype(jnp.float32) * scale

    return lax.fori_loop(0, groups, add, jnp.zeros((*batch, rows, columns), jnp.float32))
