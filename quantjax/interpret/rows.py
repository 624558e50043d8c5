"""What does a product see of its activation, row by row? The inputs x of y = w x, as matrices.

In the order in which `quantjax.ptq.matrix.MatrixForm` sees the parameter: T rows of I inputs for
each of its B matrices. A convolution is the product with its unfolded window."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from quantjax.interpret.products import CONV, DOT
from quantjax.ops.patches import Window, seen


class Rows(NamedTuple):
    """The inputs of a product. x_BTI: one stack for each matrix, or one for all (B = 1). mine_BT:
    which of them a matrix sees, None where it is all."""

    x_BTI: Float[Array, "b t i"]
    mine_BT: Bool[Array, "#b t"] | None = None


def rows_of(eqn: Any, inputs: Sequence[Any], side: int, most: int | None = None) -> Rows | None:
    """The rows of the activation in a product whose parameter is operand `side`; None for a kind
    of product whose rows are not known.

    most: so many of them are enough, spread over all. Those of experts are kept, as few of them may
    be one expert's.
    """
    x, name = inputs[1 - side], eqn.primitive.name
    if name == DOT:
        summed, shared = eqn.params["dimension_numbers"]
        x_BTI = _matrices(x, shared[1 - side], summed[1 - side])
        chosen = _chosen(x_BTI.shape[1], most)
        return Rows(x_BTI if chosen is None else x_BTI[:, chosen])
    if side == 0:
        return None
    if name == CONV:
        return _windows(eqn.params, x, inputs[1].shape, most)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (summed, _), (shared, _) = numbers.dot_dimension_numbers
    ragged = tuple(numbers.lhs_ragged_dimensions)
    if shared or ragged in map(tuple, (summed,)) or len(numbers.rhs_group_dimensions) != 1:
        return None
    return _experts(x, ragged[0], summed, inputs[2])


def _matrices(x: jax.Array, batch: Sequence[int], summed: Sequence[int]) -> jax.Array:
    """The axes of x as (batch, the others, those summed over)."""
    rest = [a for a in range(x.ndim) if a not in (*batch, *summed)]
    sizes = [math.prod(x.shape[a] for a in axes) for axes in (batch, rest, summed)]
    return jnp.transpose(x, [*batch, *rest, *summed]).reshape(sizes)


def _experts(x: jax.Array, ragged: int, summed: Sequence[int], sizes: jax.Array) -> Rows:
    """Rows sorted by expert: expert e sees those from its first to the next one's."""
    others = [a for a in range(x.ndim) if a not in (ragged, *summed)]
    x_1TI = _matrices(jnp.moveaxis(x, ragged, 0), (), [a + (a < ragged) for a in summed])
    ends = jnp.cumsum(sizes.astype(jnp.int32))
    place = jnp.arange(x.shape[ragged], dtype=jnp.int32)
    mine = (place >= (ends - sizes)[:, None]) & (place < ends[:, None])
    each = math.prod(x.shape[a] for a in others)
    return Rows(x_1TI, jnp.repeat(mine, each, axis=1))


def _chosen(t: int, most: int | None) -> np.ndarray | None:
    """So many of t rows; None for all. One from each of as many equal stretches, at a place that
    moves by the golden ratio: steps of one length could meet the same column of every image."""
    if most is None or t <= most:
        return None
    i = np.arange(most)
    return i * t // most + (i * 0.6180339887498949 % 1 * (t // most)).astype(int)


def _windows(
    params: dict[str, Any], image: jax.Array, kernel: tuple[int, ...], most: int | None
) -> Rows | None:
    """What the window sees at each place, as (input, window) of each group of channels."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return None
    n, c, *places = numbers.lhs_spec
    x = jnp.transpose(image, (n, *places, c))
    pads = zip(params["padding"], params["lhs_dilation"], strict=True)
    config = [(0, 0, 0), *((low, high, d - 1) for (low, high), d in pads), (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), config)
    size = tuple(kernel[a] for a in numbers.rhs_spec[2:])
    window = Window(size, tuple(params["window_strides"]), tuple(params["rhs_dilation"]))
    shape = (x.shape[0], *window.places(x.shape[1:-1]))
    chosen, axes = _chosen(math.prod(shape), most), range(1, x.ndim - 1)
    parts = []
    for place in itertools.product(*map(range, size)):
        if chosen is None:
            parts.append(seen(x, place, axes, window))
            continue
        example, *at = np.unravel_index(chosen, shape)
        moves = zip(at, window.strides, place, window.dilation, strict=True)
        parts.append(x[(example, *(a * s + k * d for a, s, k, d in moves))])
    x_TCK = jnp.stack(parts, -1).reshape(-1, x.shape[-1], len(parts))
    x_TGI = x_TCK.reshape(x_TCK.shape[0], groups, -1)
    return Rows(jnp.moveaxis(x_TGI, 1, 0))
