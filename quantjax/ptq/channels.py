"""Which inputs of a stack of matrices are one channel, and where do their factors lie on the leaf?

A product can scale each of its input channels: of a convolution a channel with its whole window,
and the same in all groups, as its kernel has no axis of groups. So B matrices of I inputs have
L = B / groups scales for each of C = I / window channels."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax.ptq.layerwise import Problem
from quantjax.ptq.matrix import MatrixForm


def _window(form: MatrixForm, shape: tuple[int, ...]) -> int:
    """The places of a convolution's window; 1 of a product."""
    return math.prod(shape[a] for a in form.contracting[len(form.contracting) - form.window :])


def by_channel(
    x_BI: Float[Array, "b i"], form: MatrixForm, shape: tuple[int, ...], reduce: Callable
) -> Float[Array, "l c"]:
    """One number a channel, from those of its inputs."""
    b, i = x_BI.shape
    window = _window(form, shape)
    return reduce(x_BI.reshape(b // form.groups, form.groups, i // window, window), axis=(1, 3))


def by_input(
    s_LC: Float[Array, "l c"], form: MatrixForm, shape: tuple[int, ...]
) -> Float[Array, "b i"]:
    """The number of its channel for every input of every matrix."""
    return jnp.repeat(jnp.repeat(s_LC, _window(form, shape), 1), form.groups, 0)


def on_leaf(
    s_LC: Float[Array, "l c"], form: MatrixForm, shape: tuple[int, ...], lead: int = 0
) -> Float[Array, "*leaf"]:
    """The channels' numbers in the axes of the leaf, of length one where they do not vary; whole
    along the first `lead`, as `QTensor.input_scale` is along those that its block leaves out."""
    inputs = form.contracting[: len(form.contracting) - form.window]
    return _placed(s_LC, form, shape, lead, {*form.batch, *inputs})


def factors_on_leaf(
    left_LIR: Float[Array, "l i r"],
    right_LOR: Float[Array, "l o r"],
    form: MatrixForm,
    shape: tuple[int, ...],
    lead: int = 0,
) -> tuple[Float[Array, "*left"], Float[Array, "*right"]]:
    """`QTensor.left` and `right` of a leaf, from the factors of its matrices, groups joined."""
    left = _placed(left_LIR, form, shape, lead, {*form.batch, *form.contracting})
    right = _placed(right_LOR, form, shape, lead, {*form.batch, *form.output})
    return left, right


def _placed(
    x: jax.Array, form: MatrixForm, shape: tuple[int, ...], lead: int, varies: set[int]
) -> jax.Array:
    order = (*form.batch, *form.output, *form.contracting)
    more = x.shape[2:]
    x = x.reshape([shape[a] if a in varies else 1 for a in order] + list(more))
    x = jnp.transpose(x, [*(order.index(a) for a in range(len(shape))), *range(len(shape), x.ndim)])
    whole = [n if a < lead else m for a, (n, m) in enumerate(zip(shape, x.shape, strict=False))]
    return jnp.broadcast_to(x, (*whole, *more))


def lead_of(problem: Problem) -> int:
    """How many leading axes the parameter's scales keep apart."""
    return problem.w.ndim - len(problem.spec.block_shape)
