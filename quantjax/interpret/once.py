"""How is a function of a model compiled once for all calls? By its arguments that are no arrays."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from quantjax.fake_quantized import is_quantized
from quantjax.interpret.intercept import is_array


class Frame(NamedTuple):
    """A tree without its arrays: its structure, and its leaves with None for arrays. Hashable where
    those are."""

    structure: Any
    fixed: tuple[Any, ...]

    def filled(self, arrays: Iterable[Any]) -> Any:
        """The tree with these arrays, in order."""
        moving = iter(arrays)
        leaves = [next(moving) if x is None else x for x in self.fixed]
        return jax.tree.unflatten(self.structure, leaves)


def taken_apart(tree: Any) -> tuple[list[Any], Frame]:
    """The arrays of a tree, quantized ones whole, and the rest.

    >>> arrays, frame = taken_apart({"x": jax.numpy.ones(2), "train": False})
    >>> len(arrays), frame.fixed, frame.filled(["y"])
    (1, (False, None), {'train': False, 'x': 'y'})
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_quantized)
    fixed = tuple(None if is_array(x) else x for x in leaves)
    return [x for x in leaves if is_array(x)], Frame(structure, fixed)


def jit_once(
    function: Callable[..., Any], *first: Any, static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """jit(function) with its first arguments bound, compiled once for a model that is asked again:
    with other parameters or batches, say. static_argnums counts the arguments after those."""
    try:
        return _kept(function, static_argnums, *first)
    except TypeError:  # a callable that can not be hashed
        return _kept.__wrapped__(function, static_argnums, *first)


@functools.lru_cache(maxsize=16)
def _kept(function: Callable[..., Any], static_argnums: tuple[int, ...], *first: Any) -> Any:
    return jax.jit(functools.partial(function, *first), static_argnums=static_argnums)
