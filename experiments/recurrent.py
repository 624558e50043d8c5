"""A small recurrent classifier of sequences, unaware of quantization.

Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Cho et al., "Learning Phrase
Representations using RNN Encoder-Decoder", 2014, arXiv:1406.1078, for the GRU."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# Each gate has a product of its own with the input, and one with the state. OptimizedLSTMCell
# joins the kernels first, and what multiplies is then no parameter.
CELLS: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
CellName = Literal["lstm", "gru"]


class RecurrentClassifier(nn.Module):
    """A cell reads the frames one by one; a dense layer reads the mean of its states.

    The last channel of x is 1 where there is a frame and 0 in the padding, which no logit sees."""

    classes: int
    cell: CellName = "lstm"
    hidden: int = 96

    @nn.compact
    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b k"]:
        frames, there = x[..., :-1], x[..., -1:]
        states = nn.RNN(CELLS[self.cell](self.hidden, name="cell"))(frames)
        mean = (jnp.asarray(states) * there).sum(1) / there.sum(1)
        return nn.Dense(self.classes, name="head")(mean)
