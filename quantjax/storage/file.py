"""How is a tree kept on disk, so that what comes back is what was saved, or an error?

One safetensors file. Its metadata holds `quantjax.version`, `quantjax.header` (JSON: for every
leaf its key path, format, block, logical shape, dtype, and the digest of each buffer) and
`quantjax.digest`, over that header and the user's metadata, so every byte that matters is covered.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from quantjax.qtensor import QTensor
from quantjax.storage import keys, leaves
from quantjax.storage.atomic import write_file
from quantjax.storage.container import (
    MAX_HEADER,
    Mapped,
    Planned,
    declare,
    header_bytes,
    map_file,
    order,
)
from quantjax.storage.errors import (
    CannotStore,
    CorruptFile,
    NewerVersion,
    NotQuantjaxFile,
    StructureMismatch,
)
from quantjax.storage.leaves import Buffer, Empty, Function
from quantjax.storage.like import Taken, match

FORMAT_VERSION = 1
_OURS = "quantjax."
_VERSION, _HEADER, _DIGEST = "quantjax.version", "quantjax.header", "quantjax.digest"

FilePath = str | os.PathLike[str]


def save(path: FilePath, tree: Any, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a tree of QTensors, arrays, numbers, text and None to one file, all or nothing.

    `load(path)` is equal bit for bit. On disk: the bytes of the arrays (`QTensor.nbytes`, packed)
    and a header. `metadata` is text of yours, for `read_header`. The same tree gives the same
    bytes. The file is a safetensors file, which other tools can open; it holds no code.

    Functions in the tree (activations of Equinox modules) are noted by name, and `load` then
    needs `like`. Weak types are not kept. An existing file is replaced in one step, through a
    link too, and stays whole if anything fails before.

    Memory: leaves are fetched from their devices one by one, so one leaf beyond the tree; JAX
    may keep the host copies of arrays that live on an accelerator for as long as those live.

    Raises CannotStore for a leaf or key that has no form on disk (traced, deleted or not
    addressable arrays, other objects), naming its path; OSError if the file cannot be written.

    >>> import tempfile, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/w.safetensors", {"w": jnp.arange(3)}, metadata={"step": "7"})
    ...     load(f"{folder}/w.safetensors"), read_header(f"{folder}/w.safetensors").metadata
    ({'w': Array([0, 1, 2], dtype=int32)}, {'step': '7'})
    """
    name = os.fspath(path)
    user = _check_metadata(name, metadata or {})
    skeletons = _skeletons(name, tree)
    buffers = _named(skeletons)
    planned = [Planned(b.name, b.dtype, b.shape, b.nbytes) for b in buffers]

    def head() -> bytes:
        return header_bytes(planned, _metadata(name, skeletons, user))

    # Digests have a fixed length, so the header's place is known before they are.
    length = len(head())
    if length > MAX_HEADER:
        raise CannotStore(f"{name}: the header takes {length} bytes, above {MAX_HEADER}; split it.")

    def write(file: BinaryIO) -> None:
        file.seek(length)
        for i in order(planned):
            data = leaves.bytes_of(buffers[i])
            buffers[i].digest = leaves.digest_of(data)
            file.write(data.data)
        file.seek(0)
        file.write(head())

    write_file(path, write)


def load(path: FilePath, *, like: Any = None) -> Any:
    """Reads what `save` wrote, after checking every byte of it.

    Without `like`: nested dicts (of dicts and of fields of classes, by name) and lists (of lists
    and tuples). With `like`, a tree of the wanted structure whose leaves are arrays, shapes,
    QTensors or floats of the same logical shape and dtype: that structure, functions and empty
    nodes taken from it. A float leaf in `like` fits a QTensor in the file. Arrays come back as
    they were, JAX or NumPy, JAX ones on the default device; place them with `jax.device_put`.

    Memory: the tree, one leaf more, and pages of the mapped file, which the system can drop.
    Nothing of the result depends on the file afterwards.

    Raises NotQuantjaxFile, CorruptFile, NewerVersion, or StructureMismatch if the file does not
    fit `like`, or needs it (functions; lists that cannot be told without it).
    """
    name, mapped = _open(path)
    parsed = _parse(name, mapped)
    if like is not None:
        stored = {keys.names_of(leaf_path): leaf for leaf_path, leaf in parsed}
        found, structure = match(name, stored, like)
        return jax.tree.unflatten(structure, [_read(name, mapped, leaf) for leaf in found])
    for leaf_path, leaf in parsed:
        if isinstance(leaf, Function):
            raise StructureMismatch(
                f"{name}: {_text(leaf_path)} is the function {leaf.name!r}, and no file holds "
                "code; load with like=, a tree that has it."
            )
    paths, found = [p for p, _ in parsed], [leaf for _, leaf in parsed]
    try:
        keys.nest(paths, found)
    except ValueError as error:
        raise StructureMismatch(f"{name}: {error}; load with like=, the tree's form.") from error
    return keys.nest(paths, [_read(name, mapped, leaf) for leaf in found])


class StoredLeaf(NamedTuple):
    """What a header says of one leaf. kind: array, qtensor, value, function or empty."""

    path: str
    kind: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    format: str | None = None
    nbytes: int = 0


class Header(NamedTuple):
    """What is known of a file without reading its buffers."""

    version: int
    metadata: dict[str, str]
    leaves: tuple[StoredLeaf, ...]


def read_header(path: FilePath) -> Header:
    """The user's metadata and a description of every leaf, checked, without reading the buffers.

    Raises as `load` does.
    """
    name, mapped = _open(path)
    described = tuple(_describe(_text(p), leaf) for p, leaf in _parse(name, mapped))
    user = {k: v for k, v in mapped.metadata.items() if not k.startswith(_OURS)}
    return Header(FORMAT_VERSION, user, described)


def _describe(path: str, leaf: Any) -> StoredLeaf:
    if isinstance(leaf, QTensor):
        nbytes = sum(buffer.nbytes for buffer in jax.tree.leaves(leaf))
        return StoredLeaf(path, "qtensor", leaf.shape, leaf.dtype.name, str(leaf.format), nbytes)
    if isinstance(leaf, Buffer):
        return StoredLeaf(path, "array", *leaf.facts, None, leaf.nbytes)
    return StoredLeaf(path, type(leaf).__name__.lower())


def _text(path: keys.Path) -> str:
    return keys.text_of(keys.names_of(path))


def _check_metadata(name: str, metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CannotStore(f"{name}: metadata {key!r}: expected text, got {value!r:.60}.")
        if key.startswith(_OURS) or not _is_text(key + value):
            raise CannotStore(
                f"{name}: metadata {key!r}: expected Unicode text, and a key that does not start "
                f"with {_OURS!r}."
            )
    return dict(sorted(metadata.items()))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _skeletons(name: str, tree: Any) -> list[tuple[keys.Path, Any]]:
    """Key path and skeleton of every leaf; everything that cannot be stored is found here."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=leaves.is_leaf)
    result: dict[keys.Names, tuple[keys.Path, Any]] = {}
    for key_path, leaf in flat:
        try:
            path = keys.path_of(key_path)
            names = keys.names_of(path)
            if names in result:
                raise ValueError("two leaves have this path")
            skeleton = leaves.skeleton(leaf, "/".join(map(str, names)))
            json.dumps(leaves.to_json(skeleton), allow_nan=False)
        except ValueError as error:
            where = jax.tree_util.keystr(key_path, simple=True, separator="/") or "the root"
            raise CannotStore(f"{name}: {where}: {error}.") from error
        result[names] = path, skeleton
    return list(result.values())


def _buffers(skeleton: Any) -> list[Buffer]:
    if isinstance(skeleton, Buffer | QTensor):
        return jax.tree.leaves(skeleton)
    return []


def _named(skeletons: list[tuple[keys.Path, Any]]) -> list[Buffer]:
    """All buffers, with names that differ and that every JSON reader takes."""
    buffers = [buffer for _, skeleton in skeletons for buffer in _buffers(skeleton)]
    taken = {"__metadata__"}
    for buffer in buffers:
        wanted = buffer.name.encode(errors="backslashreplace").decode()
        buffer.name, n = wanted, 1
        while buffer.name in taken:
            n += 1
            buffer.name = f"{wanted}~{n}"
        taken.add(buffer.name)
    return buffers


def _metadata(
    name: str, skeletons: list[tuple[keys.Path, Any]], user: dict[str, str]
) -> dict[str, str]:
    entries = [{"path": keys.to_json(p)} | leaves.to_json(leaf) for p, leaf in skeletons]
    text = json.dumps({"leaves": entries}, separators=(",", ":"), allow_nan=False)
    metadata = {_VERSION: str(FORMAT_VERSION), _HEADER: text} | user
    return {_DIGEST: _digest(metadata)} | metadata


def _digest(metadata: Mapping[str, str]) -> str:
    """Over version, header (and with it the buffers' digests) and the user's metadata."""
    covered = {key: value for key, value in metadata.items() if key != _DIGEST}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _open(path: FilePath) -> tuple[str, Mapped]:
    with open(path, "rb") as file:
        return os.fspath(path), map_file(os.fspath(path), file)


def _parse(name: str, mapped: Mapped) -> list[tuple[keys.Path, Any]]:
    """Key paths and skeletons, checked against digest and container; buffers not yet read."""
    metadata = mapped.metadata
    if not any(key in metadata for key in (_VERSION, _HEADER, _DIGEST)):
        raise NotQuantjaxFile(
            f"{name}: a safetensors file, but not one written by quantjax.save; read it with "
            "safetensors.flax.load_file."
        )
    version = metadata.get(_VERSION, "")
    if version.isdecimal() and len(version) < 10 and int(version) > FORMAT_VERSION:
        raise NewerVersion(
            f"{name}: written in format version {version}; this quantjax knows up to "
            f"{FORMAT_VERSION}. Upgrade quantjax."
        )
    if version != str(FORMAT_VERSION):
        raise CorruptFile(f"{name}: expected format version {FORMAT_VERSION}, got {version!r:.60}.")
    if metadata.get(_DIGEST) != _digest(metadata):
        raise CorruptFile(
            f"{name}: the header was changed or damaged: its digest is {_digest(metadata):.12}..., "
            f"expected {metadata.get(_DIGEST, '')!r:.14}. Save it or copy it again."
        )
    try:
        entries = json.loads(metadata.get(_HEADER, ""))
        if not isinstance(entries, dict) or not isinstance(entries.get("leaves"), list):
            raise ValueError("expected a list of leaves")
        parsed = [_parse_leaf(entry) for entry in entries["leaves"]]
        _check_container(mapped, [b for _, leaf in parsed for b in _buffers(leaf)])
        if len({keys.names_of(path) for path, _ in parsed}) != len(parsed):
            raise ValueError("two leaves have one path")
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{name}: the header is not in order: {error}.") from error
    return parsed


def _parse_leaf(entry: Any) -> tuple[keys.Path, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"expected a leaf, got {entry!r:.60}")
    path = keys.from_json(entry.get("path"))
    try:
        return path, leaves.from_json(entry)
    except ValueError as error:
        raise ValueError(f"{_text(path)}: {error}") from error


def _check_container(mapped: Mapped, buffers: list[Buffer]) -> None:
    names = [buffer.name for buffer in buffers]
    if sorted(names) != sorted(mapped.buffers):
        odd = sorted(set(names) ^ set(mapped.buffers)) or "one twice"
        raise ValueError(f"header and container name different buffers: {odd!s:.100}")
    for buffer in buffers:
        expected, size = declare(buffer.dtype, buffer.shape), mapped.buffers[buffer.name].size
        if mapped.declared[buffer.name] != expected or size != buffer.nbytes:
            raise ValueError(
                f"buffer {buffer.name!r}: expected {expected} of {buffer.nbytes} bytes, got "
                f"{mapped.declared[buffer.name]} of {size}"
            )


def _read(name: str, mapped: Mapped, leaf: Any) -> Any:
    """The leaf of a skeleton, its buffers checked against their digests."""

    def read_buffer(buffer: Buffer) -> Any:
        data: np.ndarray = mapped.buffers[buffer.name]
        digest = leaves.digest_of(data)
        if digest != buffer.digest:
            raise CorruptFile(
                f"{name}: buffer {buffer.name!r} was changed or damaged: its digest is "
                f"{digest:.12}..., expected {buffer.digest:.12}.... Save it or copy it again."
            )
        try:
            return leaves.array_of(buffer, data)
        except (ValueError, TypeError) as error:
            raise CorruptFile(f"{name}: buffer {buffer.name!r}: {error}.") from error

    match leaf:
        case Buffer() | QTensor():
            return jax.tree.map(read_buffer, leaf)
        case Empty(container):
            return {} if container == "dict" else []
    return leaf.leaf if isinstance(leaf, Taken) else leaf.value
