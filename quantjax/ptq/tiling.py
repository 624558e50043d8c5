"""Which weights of a stack of matrices share a scale? The blocks of a leaf, seen from its matrices.

Scales are fitted to sums over the weights that share one; and as errors of one output add up over
all its inputs, scales of blocks along the inputs are fitted together."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from quantjax.blocks import Block, split, spread
from quantjax.ptq.matrix import MatrixForm

# B matrices of O outputs and I inputs; "s" is the shape of the scales, which has the leaf's rank.

SIDE_BY_SIDE = 2**16  # weights of a matrix, up to which one alone does not fill the machine


def over_matrices(function: Callable[..., Any], w_BOI: Float[Array, "b o i"], *more: Any) -> Any:
    """`function` of every matrix of a stack, and of the parts of `more` that belong to it: side by
    side where they are small, otherwise one after another in the memory of one."""
    if w_BOI[0].size <= SIDE_BY_SIDE:
        return jax.vmap(function)(w_BOI, *more)
    return lax.map(lambda args: function(*args), (w_BOI, *more))


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A leaf of this shape and form whose scales are one for each block. Hashable."""

    form: MatrixForm
    block: Block
    shape: tuple[int, ...]

    def sums(self, x_BOI: Float[Array, "b o i"]) -> Float[Array, "*s"]:
        """The sum over the weights of every scale."""
        parts = split(self.form.leaf(x_BOI, self.shape), self.block)
        values = parts.values if parts.valid is None else jnp.where(parts.valid, parts.values, 0)
        return values.sum(parts.axes) if parts.axes else values

    def spread(self, per_scale: Shaped[Array, "*s"]) -> Float[Array, "b o i"]:
        """What every weight's scale has, as float32."""
        whole = spread(per_scale.astype(jnp.float32), self.shape, self.block)
        return self.form.matrices(jnp.broadcast_to(whole, self.shape))

    def where(
        self, chosen: Bool[Array, "*s"], x_BOI: Float[Array, "b o i"], y_BOI: Float[Array, "b o i"]
    ) -> Float[Array, "b o i"]:
        """x for the weights of chosen scales, y for the others."""
        return jnp.where(self.spread(chosen) > 0, x_BOI, y_BOI)

    def together(self, per_scale: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The sum over the scales of the same outputs, for each of them. Nothing connects the rest:
        neither a scale nor a product."""
        total = per_scale.sum(self.form.contracting, keepdims=True)
        return jnp.broadcast_to(total, per_scale.shape)

    def of_outputs(self, x_BO: Float[Array, "b o"]) -> Float[Array, "*s"]:
        """The sum over the outputs that share scales, for each of these."""
        inputs = self.form.sizes(self.shape)[2]
        each = jnp.broadcast_to(x_BO[..., None] / inputs, (*x_BO.shape, inputs))
        return self.together(self.sums(each))

    @property
    def several(self) -> bool:
        """Whether an output has more than one scale."""
        return len(np.unique(self.input_blocks)) > 1

    @property
    def input_blocks(self) -> np.ndarray:
        """(I,): the number of the block that an input lies in."""
        sizes = [self.shape[a] for a in self.form.contracting]
        lead = len(self.shape) - len(self.block)
        number = np.zeros(sizes, np.int64)
        for k, axis in enumerate(self.form.contracting):
            length = 1 if axis < lead else self.block[axis - lead] or max(sizes[k], 1)
            at = np.arange(sizes[k]) // length
            shape = [-1 if j == k else 1 for j in range(len(sizes))]
            number = number * (int(at.max(initial=0)) + 1) + at.reshape(shape)
        return number.reshape(-1)
