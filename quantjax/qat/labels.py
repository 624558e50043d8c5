"""What of a tree is trained, and how? Labels for `optax.partition`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantjax.fake_quantized import FakeQuantized, is_quantized

WEIGHTS, LEARNED, FIXED = "weights", "learned", "fixed"


def labels(tree: Any) -> Any:
    """The same tree of texts: "weights" for float parameters and the values of FakeQuantized
    leaves, "learned" for what estimators train, "fixed" for the rest: scales that are given, keys,
    integers, QTensors.

    What is learned asks for a rate of its own, and no decay, which would pull steps to zero:

    >>> import optax
    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.ones((4, 2))}, "w2", estimator=qat.lsq())
    >>> optimizer = optax.partition(
    ...     {
    ...         "weights": optax.adamw(1e-3),
    ...         "learned": optax.adam(1e-4),
    ...         "fixed": optax.set_to_zero(),
    ...     },
    ...     qat.labels,
    ... )
    >>> state = optimizer.init(tree)
    >>> qat.labels(tree)["kernel"].learned, qat.labels(tree)["kernel"].value
    ({'scale': 'learned'}, 'weights')
    """
    return jax.tree.map(_of_leaf, tree, is_leaf=is_quantized)


def _of_leaf(x: Any) -> Any:
    if not isinstance(x, FakeQuantized):
        floats = not is_quantized(x) and jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact)
        return jax.tree.map(lambda _: WEIGHTS if floats else FIXED, x)
    fixed = jax.tree.map(lambda _: FIXED, x)
    return dataclasses.replace(
        fixed,
        value=WEIGHTS,
        learned=jax.tree.map(lambda _: LEARNED, x.learned),
        act_learned=jax.tree.map(lambda _: LEARNED, x.act_learned),
    )
