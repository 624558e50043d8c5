"""Where in its file does every buffer of a tree lie? Settled before any of them is fetched."""

import json
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from quantjax.storage import keys, leaves
from quantjax.storage.container import MAX_HEADER, Planned, header_bytes, rank
from quantjax.storage.errors import CannotStore
from quantjax.storage.header import Skeletons, buffers_of, metadata_of
from quantjax.storage.leaves import Buffer


class Layout(NamedTuple):
    """A file to be written: key paths and skeletons of its leaves, the user's metadata, and the
    buffers in the order in which they lie."""

    skeletons: Skeletons
    user: dict[str, str]
    buffers: list[Buffer]

    def head(self) -> bytes:
        """What comes before the buffers, with the digests that are known by now."""
        planned = [Planned(b.name, b.dtype, b.shape, b.nbytes) for b in self.buffers]
        return header_bytes(planned, metadata_of(self.skeletons, self.user))


def write_buffer(file: BinaryIO, buffer: Buffer, data: np.ndarray) -> None:
    """Puts the bytes of a buffer in their place, and notes their digest."""
    buffer.digest = leaves.digest_of(data)
    file.seek(buffer.start)
    file.write(data.data)


def plan(name: str, flat: Iterable[tuple[Any, Any]], user: dict[str, str]) -> Layout:
    """The layout of the file `name` for leaves with their key paths, in the order of the tree.

    Raises CannotStore for what cannot be stored, naming its path.
    """
    skeletons = _skeletons(name, flat)
    buffers = sorted(_named(skeletons), key=lambda buffer: rank(buffer.name, buffer.dtype))
    layout = Layout(skeletons, user, buffers)
    # Digests have a fixed length, so the header's place is known before they are.
    start = len(layout.head())
    if start > MAX_HEADER:
        raise CannotStore(f"{name}: the header takes {start} bytes, above {MAX_HEADER}; split it.")
    for buffer in buffers:
        buffer.start = start
        start += buffer.nbytes
    return layout


def _skeletons(name: str, flat: Iterable[tuple[Any, Any]]) -> Skeletons:
    """Key path and skeleton of every leaf; everything that cannot be stored is found here."""
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


def _named(skeletons: Skeletons) -> list[Buffer]:
    """All buffers, with names that differ and that every JSON reader takes."""
    buffers = [buffer for _, skeleton in skeletons for buffer in buffers_of(skeleton)]
    taken = {"__metadata__"}
    for buffer in buffers:
        wanted = buffer.name.encode(errors="backslashreplace").decode()
        buffer.name, n = wanted, 1
        while buffer.name in taken:
            n += 1
            buffer.name = f"{wanted}~{n}"
        taken.add(buffer.name)
    return buffers
