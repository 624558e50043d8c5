"""How is a tree kept on disk, so that what comes back is what was saved, or an error?

One safetensors file; see `quantjax.storage.header` for what it says beside the buffers."""

import os
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from quantjax.qtensor import QTensor
from quantjax.storage import keys, leaves
from quantjax.storage.atomic import write_file
from quantjax.storage.container import Mapped
from quantjax.storage.errors import CannotStore, CorruptFile, StructureMismatch
from quantjax.storage.header import FORMAT_VERSION, OURS, FilePath, open_file, parse, text_of
from quantjax.storage.layout import plan, write_buffer
from quantjax.storage.leaves import Buffer, Empty, Function
from quantjax.storage.like import Taken, match


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
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=leaves.is_leaf)
    layout = plan(name, flat, user)

    def write(file: BinaryIO) -> None:
        for buffer in layout.buffers:
            write_buffer(file, buffer, leaves.bytes_of(buffer))
        file.seek(0)
        file.write(layout.head())

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
    name, mapped = open_file(path)
    parsed = parse(name, mapped)
    if like is not None:
        stored = {keys.names_of(leaf_path): leaf for leaf_path, leaf in parsed}
        found, structure = match(name, stored, like)
        return jax.tree.unflatten(structure, [_read(name, mapped, leaf) for leaf in found])
    for leaf_path, leaf in parsed:
        if isinstance(leaf, Function):
            raise StructureMismatch(
                f"{name}: {text_of(leaf_path)} is the function {leaf.name!r}, and no file holds "
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
    name, mapped = open_file(path)
    described = tuple(_describe(text_of(p), leaf) for p, leaf in parse(name, mapped))
    user = {k: v for k, v in mapped.metadata.items() if not k.startswith(OURS)}
    return Header(FORMAT_VERSION, user, described)


def _describe(path: str, leaf: Any) -> StoredLeaf:
    if isinstance(leaf, QTensor):
        nbytes = sum(buffer.nbytes for buffer in jax.tree.leaves(leaf))
        return StoredLeaf(path, "qtensor", leaf.shape, leaf.dtype.name, str(leaf.format), nbytes)
    if isinstance(leaf, Buffer):
        return StoredLeaf(path, "array", *leaf.facts, None, leaf.nbytes)
    return StoredLeaf(path, type(leaf).__name__.lower())


def _check_metadata(name: str, metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CannotStore(f"{name}: metadata {key!r}: expected text, got {value!r:.60}.")
        if key.startswith(OURS) or not _istext_of(key + value):
            raise CannotStore(
                f"{name}: metadata {key!r}: expected Unicode text, and a key that does not start "
                f"with {OURS!r}."
            )
    return dict(sorted(metadata.items()))


def _istext_of(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
