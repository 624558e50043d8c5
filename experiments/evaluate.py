"""How often is a network right, and how sure of it? On all of a set, each example once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Shaped

Tree = Any  # a pytree of arrays


def evaluate(
    apply: Callable,
    params: Tree,
    images: Shaped[Array, "n ..."] | Shaped[np.ndarray, "n ..."],
    labels: Int[Array, "n *t"] | Int[np.ndarray, "n *t"],
    *,
    batch_size: int = 1000,
) -> tuple[float, float, Int[np.ndarray, "n *t"]]:
    """Returns mean cross-entropy, accuracy and predicted classes of `apply(params, images)`.

    The last batch is filled up with images of the first to keep one shape; what it gives for them
    is dropped, so every image counts once. Compiled once per `apply`: build it outside a loop.
    A label may be one class or an array of them, as for each token of a window. Without images the
    loss and the accuracy are nan."""
    losses, predictions = [], []
    for start in range(0, len(images), batch_size):
        index = np.arange(start, min(start + batch_size, len(images)))
        filled = np.resize(index, min(batch_size, len(images)))
        filled[: len(index)] = index
        x, y = jnp.asarray(images[filled]), jnp.asarray(np.asarray(labels)[filled])
        loss, prediction = _scores(apply, params, x, y)
        losses.append(np.asarray(loss, np.float64)[: len(index)])
        predictions.append(np.asarray(prediction)[: len(index)])
    if not losses:
        return float("nan"), float("nan"), np.zeros(0, np.int32)
    predicted = np.concatenate(predictions)
    accuracy = np.mean(predicted == np.asarray(labels))
    return float(np.concatenate(losses).mean()), float(accuracy), predicted


@partial(jax.jit, static_argnums=0)
def _scores(apply: Callable, params: Tree, x: Array, y: Array) -> tuple[Array, Array]:
    logits = apply(params, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
    return losses, logits.argmax(-1)
