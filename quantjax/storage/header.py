"""What does the header of our files say, and does it agree with itself?

The metadata of a safetensors file holds `quantjax.version`, `quantjax.header` (JSON: for every
leaf its key path, format, block, logical shape, dtype, and the digest of each buffer) and
`quantjax.digest`, over that header and the user's metadata, so every byte that matters is covered.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax

from quantjax.qtensor import QTensor
from quantjax.storage import keys, leaves
from quantjax.storage.container import Mapped, declare, map_file
from quantjax.storage.errors import CorruptFile, NewerVersion, NotQuantjaxFile
from quantjax.storage.leaves import Buffer

FORMAT_VERSION = 1
OURS = "quantjax."
_VERSION, _HEADER, _DIGEST = "quantjax.version", "quantjax.header", "quantjax.digest"

FilePath = str | os.PathLike[str]
Skeletons = list[tuple[keys.Path, Any]]


def open_file(path: FilePath) -> tuple[str, Mapped]:
    """The name of a file, and its mapped contents."""
    with open(path, "rb") as file:
        return os.fspath(path), map_file(os.fspath(path), file)


def metadata_of(skeletons: Skeletons, user: dict[str, str]) -> dict[str, str]:
    """All that a file says beside its buffers."""
    entries = [{"path": keys.to_json(p)} | leaves.to_json(leaf) for p, leaf in skeletons]
    text = json.dumps({"leaves": entries}, separators=(",", ":"), allow_nan=False)
    metadata = {_VERSION: str(FORMAT_VERSION), _HEADER: text} | user
    return {_DIGEST: digest_of(metadata)} | metadata


def digest_of(metadata: Mapping[str, str]) -> str:
    """Over version, header (and with it the buffers' digests) and the user's metadata."""
    covered = {key: value for key, value in metadata.items() if key != _DIGEST}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def is_ours(mapped: Mapped) -> bool:
    """Whether quantjax wrote the file, or somebody who says so."""
    return any(key in mapped.metadata for key in (_VERSION, _HEADER, _DIGEST))


def parse(name: str, mapped: Mapped) -> Skeletons:
    """Key paths and skeletons, checked against digest and container; buffers not yet read."""
    metadata = mapped.metadata
    if not is_ours(mapped):
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
    found = digest_of(metadata)
    if metadata.get(_DIGEST) != found:
        raise CorruptFile(
            f"{name}: the header was changed or damaged: its digest is {found:.12}..., "
            f"expected {metadata.get(_DIGEST, '')!r:.14}. Save it or copy it again."
        )
    try:
        entries = json.loads(metadata.get(_HEADER, ""))
        if not isinstance(entries, dict) or not isinstance(entries.get("leaves"), list):
            raise ValueError("expected a list of leaves")
        parsed = [_parse_leaf(entry) for entry in entries["leaves"]]
        _place(mapped, [b for _, leaf in parsed for b in buffers_of(leaf)])
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
        raise ValueError(f"{text_of(path)}: {error}") from error


def _place(mapped: Mapped, buffers: list[Buffer]) -> None:
    names = [buffer.name for buffer in buffers]
    if sorted(names) != sorted(mapped.buffers):
        odd = sorted(set(names) ^ set(mapped.buffers)) or "one twice"
        raise ValueError(f"header and container name different buffers: {odd!s:.100}")
    for buffer in buffers:
        buffer.start = mapped.starts[buffer.name]
        expected, size = declare(buffer.dtype, buffer.shape), mapped.buffers[buffer.name].size
        if mapped.declared[buffer.name] != expected or size != buffer.nbytes:
            raise ValueError(
                f"buffer {buffer.name!r}: expected {expected} of {buffer.nbytes} bytes, got "
                f"{mapped.declared[buffer.name]} of {size}"
            )


def text_of(path: keys.Path) -> str:
    """A key path for a reader."""
    return keys.text_of(keys.names_of(path))


def buffers_of(skeleton: Any) -> list[Buffer]:
    """The buffers of a leaf, in the order of its children."""
    if isinstance(skeleton, Buffer | QTensor):
        return jax.tree.leaves(skeleton)
    return []
