"""One LSTM that predicts the next word, and carries its state from window to window.

Zaremba, Sutskever and Vinyals, "Recurrent Neural Network Regularization", 2014, arXiv:1409.2329:
dropout between layers, none from step to step."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from experiments.windows import Tokens

State = tuple[Float[Array, "b c"], Float[Array, "b c"]]


class WordModel(nn.Module):
    """Words to the logits of each next word, over the whole vocabulary, and the state behind the
    last. key: of the dropout, None for none.

    What is left of the states is made larger behind the product, not before it, so that the product
    sees the same values in training as without dropout: an activation has one grid for both."""

    vocabulary: int
    width: int = 512
    dropout: float = 0.5

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b t"], state: State | None = None, key: Array | None = None
    ) -> tuple[Float[Array, "b t v"], State]:
        small = nn.initializers.uniform(0.2)  # in [0, 0.2), moved below
        table = nn.Embed(
            self.vocabulary,
            self.width,
            name="embedding",
            embedding_init=lambda *a: small(*a) - 0.1,
        )
        before, behind = (None, None) if key is None else jax.random.split(key)
        kept = 1.0 if key is None else 1 - self.dropout
        x = self._dropped(table(tokens), before) / kept
        rnn = nn.RNN(nn.LSTMCell(self.width, name="cell"), return_carry=True)
        state, states = rnn(x, initial_carry=state)
        product = nn.Dense(self.vocabulary, use_bias=False, name="head")
        bias = self.param("bias", nn.initializers.zeros, (self.vocabulary,))
        return product(self._dropped(states, behind)) / kept + bias, state

    def _dropped(self, x: Array, key: Array | None) -> Array:
        if key is None:
            return x
        return jnp.where(jax.random.bernoulli(key, 1 - self.dropout, x.shape), x, 0)


Apply = Callable[..., tuple[Array, State]]


def with_state(variables: Mapping[str, Any], width: int, batch: int, seed: int) -> dict[str, Any]:
    """The tree that the shared loop trains: the parameters, and as collections the state that goes
    from step to step and the key of the dropout."""
    zero = jnp.zeros((batch, width))
    return {
        "params": variables["params"],
        "carry": {"state": (zero, zero)},
        "dropout": {"key": jax.random.key(seed)},
    }


def carried_loss(apply: Apply) -> Callable[..., tuple[Array, dict[str, Any]]]:
    """The loop's loss: a window goes on from the state that the one before it left, through which
    no gradient passes."""

    def loss(tree: Any, tokens: Array, targets: Array) -> tuple[Array, dict[str, Any]]:
        key, own = jax.random.split(tree["dropout"]["key"])
        variables = {"params": tree["params"]}
        logits, state = apply(variables, tokens, tree["carry"]["state"], own)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean(), {"carry": {"state": state}, "dropout": {"key": key}}

    return loss


def logits_alone(apply: Apply) -> Callable[[Any, Array], Array]:
    """(tree, tokens) -> logits of windows that each begin with no state."""
    return lambda tree, tokens: apply({"params": tree["params"]}, tokens)[0]


def nats(apply: Apply, variables: Any, tokens: Tokens, targets: Tokens) -> float:
    """The mean cross-entropy of a text whose windows follow each other, the state carried through
    all of it."""
    state, losses = None, []
    for x, y in zip(tokens, targets, strict=True):
        loss, state = _of_window(apply, variables, x[None], y[None], state)
        losses.append(loss)
    return float(jnp.stack(losses).mean())


@partial(jax.jit, static_argnums=0)
def _of_window(
    apply: Apply, variables: Any, tokens: Array, targets: Array, state: State | None
) -> tuple[Array, State]:
    logits, state = apply(variables, tokens, state)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), state
