"""What of a tree is trained, what is fixed, and what changes as state? Parts, and how they join."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from quantjax import qat
from quantjax.fake_quantized import FakeQuantized, is_quantized
from quantjax.qat.labels import FIXED, LEARNED, WEIGHTS

Tree = Any  # a pytree of arrays


class Parts(NamedTuple):
    """trainable and fixed are of one structure, with None where the other has the leaf.
    collections: of Linen variables, all but `params`: batch statistics."""

    trainable: Tree
    fixed: Tree
    collections: dict[str, Any]


def split(params: Tree) -> tuple[Parts, Callable[[Parts], Tree]]:
    """Parts a tree, of which Linen variables train `params` alone; what joins it again.

    Fixed are integers, random keys, and the scales that a leaf of `qat.prepare` was given.
    Raises ValueError if the tree holds QTensors."""
    linen = isinstance(params, Mapping) and "params" in params
    tree = params["params"] if linen else params
    rest = {name: part for name, part in params.items() if name != "params"} if linen else {}
    without = jax.tree.map(
        lambda x: None if isinstance(x, FakeQuantized) else x, tree, is_leaf=is_quantized
    )
    qat.refuse_quantized(without)
    labels = qat.labels(tree)

    def of(wanted: Callable[[str], bool]) -> Tree:
        return jax.tree.map(lambda x, label: x if wanted(label) else None, tree, labels)

    def join(parts: Parts) -> Tree:
        whole = jax.tree.map(
            lambda x, other: other if x is None else x,
            parts.trainable,
            parts.fixed,
            is_leaf=lambda x: x is None,
        )
        return {"params": whole, **parts.collections} if linen else whole

    return Parts(of(lambda x: x != FIXED), of(lambda x: x == FIXED), rest), join


def optimizer_of(
    tree: Tree, weights: optax.GradientTransformation, learned: optax.GradientTransformation | None
) -> optax.GradientTransformation:
    """The optimizer of a tree's trainable part: `weights`, and `learned` for what estimators train,
    where there is such a thing and it has an optimizer of its own."""
    if learned is None or LEARNED not in jax.tree.leaves(qat.labels(tree)):
        return weights
    return optax.partition({WEIGHTS: weights, LEARNED: learned}, qat.labels)


def check_runs(tree: Tree, runs: int, what: str) -> None:
    """Raises ValueError, naming the leaf, unless the first axis of each is that of the runs."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.ndim(leaf) or jnp.shape(leaf)[0] != runs:
            raise ValueError(
                f"{what}{jax.tree_util.keystr(path)}: {runs} seeds need a first axis of {runs}, "
                f"got the shape {jnp.shape(leaf)}: stack the trees of all runs."
            )


@jax.jit
def run_of(tree: Tree, index: int) -> Tree:
    """One run of many: that entry of the first axis."""
    return jax.tree.map(lambda x: x[index], tree)
