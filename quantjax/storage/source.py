"""Which leaves do files hold, ours or another tool's, and how is one read without the rest?

Other tools keep one flat table of tensors in a safetensors file, or in several, which an index
names: https://huggingface.co/docs/safetensors."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantjax.storage import keys, leaves
from quantjax.storage.container import CODES, Mapped, read_bytes
from quantjax.storage.errors import CorruptFile, StorageError, StructureMismatch
from quantjax.storage.header import FilePath, Skeletons, is_ours, open_file, parse, text_of
from quantjax.storage.leaves import DTYPES, Buffer

_DTYPES = {code: DTYPES[name] for name, code in CODES.items()}
_SEPARATOR = re.compile(r"[./]")  # between the parts of other tools' names


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A leaf that lies in a file: what `quantjax.storage.leaves` calls its skeleton."""

    file: str
    skeleton: Any


class Source(NamedTuple):
    """A tree that lies in files: nested dicts and lists of `Stored`, as `load` would give them.
    identity: changes with the contents."""

    tree: Any
    files: tuple[str, ...]
    identity: str


def open_source(source: FilePath | Sequence[FilePath]) -> Source:
    """The leaves of a file, of all files that an index (`.json`) names, or of several files.

    The parts of other tools' names, between dots or slashes, become keys of nested dicts. Their
    tensors are JAX arrays, or NumPy's where JAX by default has no type of 64 bits.

    Raises OSError for a file that is not there, what `load` raises for one that is damaged, and
    StructureMismatch where the files together are no tree.
    """
    found: dict[keys.Names, tuple[keys.Path, Stored]] = {}
    names, identities = [], []
    for path in _files(source):
        name, mapped = open_file(path)
        skeletons, identity = _contents(name, mapped)
        names.append(name)
        identities.append(identity)
        for key_path, skeleton in skeletons:
            other = found.get(keys.names_of(key_path))
            if other is not None:
                raise StructureMismatch(
                    f"{name}: {text_of(key_path)} is there, and in {other[1].file}; expected one "
                    "of that name."
                )
            found[keys.names_of(key_path)] = key_path, Stored(name, skeleton)
    try:
        tree = keys.nest([p for p, _ in found.values()], [leaf for _, leaf in found.values()])
    except ValueError as error:
        raise StructureMismatch(f"{', '.join(names)}: {error}.") from error
    return Source(tree, tuple(names), _hash(sorted(identities)))


def read_buffer(file: str, buffer: Buffer, room: np.ndarray) -> np.ndarray:
    """The bytes of a buffer, put into `room`; checked against its digest if the file has one."""
    with open(file, "rb") as opened:
        data = read_bytes(opened, buffer.start, room[: buffer.nbytes])
    if data.size != buffer.nbytes:
        raise CorruptFile(
            f"{file}: buffer {buffer.name!r}: expected {buffer.nbytes} bytes, got {data.size}: the "
            "file was cut short meanwhile."
        )
    if buffer.digest not in (leaves.NO_DIGEST, leaves.digest_of(data)):
        raise CorruptFile(
            f"{file}: buffer {buffer.name!r} was changed or damaged: its digest is not "
            f"{buffer.digest:.12}.... Save it or copy it again."
        )
    return data


def _files(source: FilePath | Sequence[FilePath]) -> list[FilePath]:
    if isinstance(source, str | os.PathLike):
        return list(_indexed(source)) if os.fspath(source).endswith(".json") else [source]
    if not source:
        raise ValueError("expected the name of a file, or of several; got none.")
    return list(source)


def _indexed(index: FilePath) -> Iterator[FilePath]:
    """The files that an index names, which hold what it says."""
    name = os.fspath(index)
    tensors: dict[str, set[str]] = {}
    try:
        entries = json.loads(Path(index).read_bytes())["weight_map"]
        for tensor, file in entries.items():
            tensors.setdefault(_text(file), set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            f"{name}: expected an index, JSON with a weight_map from tensors to files: {error!r}."
        ) from error
    for file, expected in sorted(tensors.items()):
        path = Path(index).parent / file
        if not path.exists():
            raise FileNotFoundError(
                f"{name}: names {file}, which is not there: {path}. It should hold "
                f"{len(expected)} tensors, such as {min(expected)!r}."
            )
        odd = sorted(expected ^ set(open_file(path)[1].declared))
        if odd:
            raise StructureMismatch(
                f"{name}: it and {file} name different tensors: {odd[:5]}. Copy both again, or "
                "give the files themselves."
            )
        yield path


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected the name of a file, got {value!r:.60}")
    return value


def _contents(name: str, mapped: Mapped) -> tuple[Skeletons, str]:
    """Key paths and skeletons, and what tells these contents from others."""
    if is_ours(mapped):
        return parse(name, mapped), _hash(sorted(mapped.metadata.items()))
    skeletons: Skeletons = []
    for tensor, (code, shape) in sorted(mapped.declared.items()):
        if code not in _DTYPES:
            raise StorageError(
                f"{name}: {tensor}: elements of type {code!r:.20}; known are {', '.join(_DTYPES)}."
            )
        dtype, start = _DTYPES[code], mapped.starts[tensor]
        holder = "numpy" if dtype.itemsize == 8 else "jax"
        buffer = Buffer(tensor, dtype, shape, holder, start=start)
        if buffer.nbytes != mapped.buffers[tensor].size:
            raise CorruptFile(
                f"{name}: {tensor}: {dtype}{list(shape)} takes {buffer.nbytes} bytes, got "
                f"{mapped.buffers[tensor].size}."
            )
        skeletons.append((tuple(("dict", part) for part in _SEPARATOR.split(tensor)), buffer))
    # Such files have no digests, and to hash all of one takes as long as to read it.
    stat = os.stat(name)
    return skeletons, _hash(
        [sorted(mapped.declared.items()), sorted(mapped.starts.items()), stat.st_size,
         stat.st_mtime_ns]
    )  # fmt: skip


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
