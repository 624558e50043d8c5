"""Does a tree come back in whatever structure it was, with `like` and without?"""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from quantjax import storage
from quantjax.qtensor import is_qtensor
from quantjax.storage import load, save

from .trees import assert_same, normal, quantized, random_bits


def names(tree: Any) -> Any:
    """The tree as `load` gives it without `like`: fields to dicts, tuples to lists."""
    if is_qtensor(tree):
        return tree
    if isinstance(tree, dict):
        return {key: names(value) for key, value in tree.items()}
    return [names(value) for value in tree] if isinstance(tree, list | tuple) else tree


class Pair(NamedTuple):
    a: Any
    b: Any


def test_plain_structures_come_back_and_like_restores_the_rest(tmp_path):
    shared = normal(3)
    tree = {
        "list": [normal(2), (normal(1), {"deep": quantized(normal(4, 4))})],
        "tuple": Pair(shared, shared),
        "ints": {3: normal(1), 10: normal(2)},
        "odd/name": {"": normal(1), "__metadata__": normal(1), "é\n\ud800": normal(1)},
        "odd": {"name": {"": normal(2)}},
        "plain": [1, -(2**70), True, 1 / 3, float("inf"), float("nan"), "text \ud800", None],
        "empty": [{}, [], (), {"inner": []}],
        "__metadata__": normal(2),
    }
    save(tmp_path / "q", tree)
    expected = names(tree) | {"tuple": {"a": shared, "b": shared}}
    assert_same(load(tmp_path / "q"), expected)
    assert_same(load(tmp_path / "q", like=tree), tree)


@pytest.mark.parametrize("tree", [normal(3), quantized(normal(4, 4)), 3, None, {}, [normal(1)]])
def test_the_root_may_be_a_leaf(tmp_path, tree):
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), tree)


def quantize_matrices(tree: Any) -> Any:
    def convert(x: Any) -> Any:
        return quantized(x) if isinstance(x, jax.Array) and x.ndim == 2 else x

    return jax.tree.map(convert, tree)


def test_linen_variables(tmp_path):
    shapes = jax.eval_shape(nn.Dense(4).init, jax.random.key(0), jnp.ones((1, 3)))
    variables = random_bits(shapes)
    tree = quantize_matrices(variables)
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), tree)
    assert_same(load(tmp_path / "q", like=shapes), tree)


def test_nnx_state(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    state = random_bits(nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0)))))
    tree = quantize_matrices(state)
    save(tmp_path / "q", tree)
    back = load(tmp_path / "q", like=state)
    assert_same(back, tree)
    assert isinstance(back, nnx.State)
    kernel = load(tmp_path / "q")["layers"][0]["kernel"]["value"]
    assert is_qtensor(kernel)


def test_equinox_module_with_functions(tmp_path):
    build = partial(eqx.nn.MLP, 2, 2, 4, 1, use_bias=False, key=jax.random.key(0))
    model = random_bits(eqx.filter_eval_shape(build))
    tree = quantize_matrices(model)
    save(tmp_path / "q", tree)
    back = load(tmp_path / "q", like=model)
    assert_same(eqx.filter(back, eqx.is_array), eqx.filter(tree, eqx.is_array))
    assert back.activation is model.activation
    # Functions are code: without `like` they are not made up, and another one is not accepted.
    with pytest.raises(
        storage.StructureMismatch, match=r"activation is the function 'relu'.*like="
    ):
        load(tmp_path / "q")
    other = eqx.tree_at(lambda m: m.activation, model, jax.nn.gelu)
    with pytest.raises(storage.StructureMismatch, match=r"activation: expected.*got .* relu"):
        load(tmp_path / "q", like=other)
    # The other idiom: functions filtered out before saving.
    save(tmp_path / "f", eqx.filter(tree, eqx.is_array))
    assert load(tmp_path / "f", like=model).activation is model.activation


@jax.tree_util.register_pytree_node_class
class Silent:
    """A node with neither keys nor, sometimes, leaves."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_custom_nodes(tmp_path):
    tree = {"a": Silent(normal(1), normal(2))}
    save(tmp_path / "q", tree)
    assert_same(load(tmp_path / "q"), {"a": [normal(1), normal(2)]})
    assert_same(load(tmp_path / "q", like=tree), tree)
    gap = [normal(1), Silent(), normal(2)]
    save(tmp_path / "q", gap)
    with pytest.raises(storage.StructureMismatch, match=r"only positions \[0, 2\].*like="):
        load(tmp_path / "q")
    assert_same(load(tmp_path / "q", like=gap), gap)
