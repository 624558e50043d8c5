"""Does a file hold the tree that was asked for? Leaf by leaf, by key path, before any is read."""

import difflib
from typing import Any, NamedTuple

import jax
import numpy as np

from quantjax.qtensor import QTensor
from quantjax.storage import keys, leaves
from quantjax.storage.errors import StructureMismatch
from quantjax.storage.keys import Names, text_of
from quantjax.storage.leaves import Buffer, Empty, Function, Value

_SHOWN = 10


class Taken(NamedTuple):
    """A leaf that comes from `like`: code, or a container with nothing in it."""

    leaf: Any


def match(path: str, stored: dict[Names, Any], like: Any) -> tuple[list[Any], Any]:
    """A skeleton (or `Taken`) for every leaf of `like`, and its structure.

    Key paths are matched by their names and positions; whether a dict, a class or a tuple holds
    them is up to `like`. Raises StructureMismatch listing all that is missing, left over, or of
    another kind, shape or dtype.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=leaves.is_leaf)
    asked = {keys.names_of(keys.path_of(names)): leaf for names, leaf in flat}
    extra = {text_of(names) for names in stored if names not in asked}
    problems, found = [], []
    for names, leaf in asked.items():
        if names in stored:
            result = _fit(stored[names], leaf)
        elif callable(leaf):
            result = Taken(leaf)
        else:
            close = difflib.get_close_matches(text_of(names), extra, 3, 0.3)
            hint = f"; the file has {', '.join(map(repr, close))}" if close else ""
            result = f"missing from the file{hint}"
        if isinstance(result, str):
            problems.append(f"{text_of(names)}: {result}.")
        found.append(result)
    problems += [f"{name}: in the file, not in `like`." for name in sorted(extra)]
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise StructureMismatch(
            f"{path}: the file does not fit `like`:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
            + "\nGive the tree that was saved, or load without `like` to see what the file holds."
        )
    return found, structure


def _fit(stored: Any, leaf: Any) -> Any:
    """What to take for `leaf`, or a sentence that says why it does not fit."""
    match stored:
        case Value(None) if callable(leaf):  # where functions were filtered out before saving
            return Taken(leaf)
        case Function(name):
            fits = callable(leaf) and leaves.function_name(leaf) == name
            return Taken(leaf) if fits else f"expected {_shown(leaf)}, got the function {name}"
        case Empty(container):
            kind = dict if container == "dict" else list | tuple
            fits = isinstance(leaf, kind) and not leaf
            return Taken(leaf) if fits else f"expected {_shown(leaf)}, got an empty {container}"
        case Value(value):
            fits = type(value) is type(leaf)
            return stored if fits else f"expected {_shown(leaf)}, got {value!r:.60}"
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return f"expected {_shown(leaf)}, got {_shown(stored)}"
    if isinstance(leaf, QTensor) and not isinstance(stored, QTensor):
        return f"expected {_shown(leaf)}, got the float array {_shown(stored)}"
    if _facts(stored) != _facts(leaf):
        return f"expected {_shown(leaf)}, got {_shown(stored)}"
    if isinstance(leaf, QTensor):
        for name in ("format", "block", "packed", "act"):
            expected, got = getattr(leaf, name), getattr(stored, name)
            if expected != got:
                return f"expected {name} {expected}, got {got}"
        structures = {jax.tree.structure(leaf), jax.tree.structure(stored)}
        if len(structures) > 1:
            return f"expected the same children, got {' and '.join(map(str, structures))}"
    return stored


def _facts(array: Any) -> tuple[tuple[int, ...], str]:
    """Logical shape and dtype, the same for an array and for its skeleton."""
    if isinstance(array, Buffer):
        return array.facts
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return tuple(array.shape), str(array.dtype)
    return tuple(array.shape), np.dtype(array.dtype).name


def _shown(leaf: Any) -> str:
    if isinstance(leaf, QTensor):
        return repr(leaf)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        shape, dtype = _facts(leaf)
        return f"{dtype}{list(shape)}"
    return f"{leaf!r:.60}"
