"""What is a leaf of a parameter tree called? Key paths as people write them.

'/'-joined keys. A leading `params` (Flax Linen's collection) and the trailing `value` of boxes
(Linen's Partitioned, NNX's Param) are dropped, so the same network reads the same in both."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from quantjax.fake_quantized import is_quantized

KeyPath = tuple[Any, ...]


def key_name(key: Any) -> str:
    """The text of one key of a key path."""
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key).strip(".[]'\"")


def path_name(path: KeyPath) -> str:
    """The name of a leaf.

    >>> path_name((DictKey("params"), DictKey("conv1"), DictKey("kernel")))
    'conv1/kernel'
    """
    names = [key_name(key) for key in path]
    if len(names) > 1 and isinstance(path[-1], GetAttrKey) and names[-1] in ("value", "raw_value"):
        names = names[:-1]
    if len(names) > 1 and names[0] == "params":
        names = names[1:]
    return "/".join(names)


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """(name, leaf) of every leaf, quantized arrays whole, and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    return [(path_name(path), leaf) for path, leaf in leaves], structure


def other_collections(tree: Any) -> frozenset[str]:
    """The top-level keys beside `params` in Linen variables: batch_stats, cache, ..."""
    if isinstance(tree, dict) or hasattr(tree, "keys"):
        keys = {str(k) for k in tree.keys()}  # noqa: SIM118
        if "params" in keys:
            return frozenset(keys - {"params"})
    return frozenset()


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """An anchored glob over '/'-joined paths: `*` stays within a part, `**` spans any number.

    >>> bool(compile_pattern("**/kernel").fullmatch("kernel"))
    True
    >>> bool(compile_pattern("block*/kernel").fullmatch("block/0/kernel"))
    False
    """
    parts = pattern.split("/")
    if not pattern or "" in parts:
        raise ValueError(f"pattern {pattern!r}: expected parts joined by single '/'.")
    parts = [p for i, p in enumerate(parts) if p != "**" or parts[i - 1 : i] != ["**"]]
    regex, last = "", len(parts) - 1
    for i, part in enumerate(parts):
        if part == "**":
            # With its slash, so that it can stand for no part at all.
            regex += ".*" if i == last == 0 else "(?:/.*)?" if i == last else "(?:[^/]+/)*"
            continue
        glob = "".join("[^/]*" if c == "*" else "[^/]" if c == "?" else re.escape(c) for c in part)
        follows = i < last and not (parts[i + 1] == "**" and i + 1 == last)
        regex += glob + ("/" if follows else "")
    return re.compile(regex)


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """The names most like `name`, for an error message."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n, 0.3) or names[:n]
    return ", ".join(repr(c) for c in close) or "none"
