"""Which orthogonal matrices can be built into a model's parameters, so that it stays the same
function? One for every basis of `bases` that nothing fixes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from quantjax.interpret.abstract import interpret
from quantjax.interpret.bases import Basis, Known
from quantjax.interpret.bases import parts as parts_of
from quantjax.interpret.bases_of import Bases
from quantjax.interpret.intercept import is_array
from quantjax.interpret.program import Key, flatten
from quantjax.paths import named_leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Turned:
    """An axis of a parameter, or of one layer of it, that is turned: blocks of `outer` x `size` x
    `inner` entries, along the middle."""

    path: str
    layer: tuple[int, ...]
    axis: int
    outer: int
    inner: int


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """A matrix R of `size` x `size`, any orthogonal one: all of `axes` are multiplied by it, as
    rows v -> v R, and the function stays. keeps_sum: R must leave the vector of ones as it is.
    normed: its axis is the stream between norms."""

    size: int
    axes: tuple[Turned, ...]
    keeps_sum: bool
    normed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Turns:
    """All free bases. reasons: why streams between norms are fixed, by size."""

    free: tuple[Turn, ...]
    reasons: tuple[str, ...]


def find_turns(apply: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Turns:
    """The matrices that can be built into `params`, which hold values: a gain whose entries are all
    equal fixes nothing, others fix the stream that they scale.

    >>> import jax.numpy as jnp
    >>> apply = lambda p, x: jnp.tanh((x @ p["a"]) @ p["b"])
    >>> p = {"a": jnp.eye(3, 4), "b": jnp.eye(4, 2)}
    >>> (turn,) = find_turns(apply, p, jnp.ones((1, 3))).free
    >>> turn.size, [(t.path, t.axis) for t in turn.axes]
    (4, [('a', 1), ('b', 0)])
    """
    program = flatten(apply, params, *args, **kwargs)
    tree = {path: x for path, x in named_leaves(params)[0] if is_array(x)}
    made: list[Basis] = []
    leaves, _ = interpret(Bases(tree, made), program)
    reasons = [b.reason for b in made if b.root() is b and b.normed and b.reason]
    return Turns(_free(leaves), tuple(dict.fromkeys(reasons)))


def _free(leaves: dict[Key, Known]) -> tuple[Turn, ...]:
    found: dict[Basis, list[Turned]] = {}
    for (path, layer), state in leaves.items():
        for axis, parts in enumerate(() if state is None else state.axes):
            resolved = parts_of(parts)
            lengths = [part.length for part in resolved]
            for i, part in enumerate(resolved):
                if part.basis is not None and part.basis.contracted:
                    outer, inner = int(np.prod(lengths[:i])), int(np.prod(lengths[i + 1 :]))
                    turned = Turned(path, layer, axis, outer, inner)
                    found.setdefault(part.basis, []).append(turned)
    return tuple(
        Turn(basis.size, tuple(axes), basis.keeps_sum, basis.normed)
        for basis, axes in found.items()
    )
