"""Where does a leaf hang in its tree, in a form that a file can hold? Lists of typed keys.

`["dict", "a"]`, `["attr", "kernel"]` (fields of classes), `["seq", 0]` (lists, tuples) and
`["flat", 0]` (classes without key names)."""

from collections.abc import Sequence
from typing import Any

from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

# (kind, key) of every step from the root.
Path = tuple[tuple[str, str | int], ...]
Names = tuple[str | int, ...]

MAX_DEPTH = 256


def path_of(keys: Sequence[Any]) -> Path:
    """The typed keys of a key path of JAX. Raises ValueError for a key that is no text or int."""
    if len(keys) > MAX_DEPTH:
        raise ValueError(f"nested {len(keys)} deep; at most {MAX_DEPTH} is stored.")
    return tuple(_typed(key) for key in keys)


def _typed(key: Any) -> tuple[str, str | int]:
    match key:
        case DictKey(key=name) if type(name) in (str, int):
            return "dict", name
        case GetAttrKey(name=str(name)):
            return "attr", name
        case SequenceKey(idx=int(index)):
            return "seq", index
        case FlattenedIndexKey(key=int(index)):
            return "flat", index
    raise ValueError(f"key {key!r}: expected text or an int; rename it, or store that part apart.")


def to_json(path: Path) -> list[list[str | int]]:
    """The path as JSON values."""
    return [list(step) for step in path]


def from_json(data: Any) -> Path:
    """The path that `to_json` wrote. Raises ValueError for anything else."""
    if not isinstance(data, list) or len(data) > MAX_DEPTH:
        raise ValueError(f"expected a list of at most {MAX_DEPTH} keys, got {data!r:.60}")
    for step in data:
        match step:
            case ["dict", key] if type(key) in (str, int):
                continue
            case ["attr", str()]:
                continue
            case ["seq" | "flat", key] if type(key) is int and key >= 0:
                continue
        raise ValueError(f"expected [dict | attr | seq | flat, key], got {step!r:.60}")
    return tuple((kind, key) for kind, key in data)


def names_of(path: Path) -> Names:
    """The keys alone; by these a file and `like` are matched, whatever holds them."""
    return tuple(key for _, key in path)


def text_of(names: Names) -> str:
    """The keys for a reader.

    >>> text_of(("encoder", 0, "kernel")), text_of(())
    ('encoder/0/kernel', 'the root')
    """
    return "/".join(map(str, names)) if names else "the root"


def nest(paths: Sequence[Path], leaves: Sequence[Any]) -> Any:
    """Nested dicts (from dicts and fields) and lists (from sequences) with the given leaves.

    Raises ValueError where they do not nest: a leaf below a leaf, or a list with gaps, as nodes
    without leaves leave them.
    """
    if () in paths:
        if len(paths) > 1:
            raise ValueError("the root is a leaf and has leaves below it")
        return leaves[0]
    nodes: dict[Path, dict[str | int, Any]] = {(): {}}
    for path, leaf in zip(paths, leaves, strict=True):
        for depth in range(1, len(path)):
            if path[:depth] not in nodes:
                nodes[path[:depth]] = {}
                _hang(nodes, path[:depth], nodes[path[:depth]])
        _hang(nodes, path, leaf)
    kinds: dict[Path, set[str]] = {prefix: set() for prefix in nodes}
    for path in paths:
        for depth, (kind, _) in enumerate(path):
            kinds[path[:depth]].add(kind)
    # Children come after their parents, so backwards every child is finished first.
    finished: dict[Path, Any] = {}
    for prefix, children in reversed(nodes.items()):
        finished[prefix] = children
        if kinds[prefix] <= {"seq", "flat"}:
            if set(children) != set(range(len(children))):
                raise ValueError(
                    f"{text_of(names_of(prefix))}: only positions {list(children)} have leaves, so "
                    "it is no list"
                )
            finished[prefix] = [children[i] for i in range(len(children))]
        elif not kinds[prefix] <= {"dict", "attr"}:
            raise ValueError(f"{text_of(names_of(prefix))}: names and positions mixed")
        if prefix:
            nodes[prefix[:-1]][prefix[-1][1]] = finished[prefix]
    return finished[()]


def _hang(nodes: dict[Path, dict[str | int, Any]], path: Path, child: Any) -> None:
    parent = nodes[path[:-1]]
    if path[-1][1] in parent:
        raise ValueError(f"{text_of(names_of(path))}: two children of one name")
    parent[path[-1][1]] = child
