"""How does a file that is written piece by piece survive an interruption?

The data goes to `name.partial` beside the file, and after each piece a line with the digests of
its buffers to `name.partial.json`, whose first line says what is written. A later call of the same
looks whether what the lines say is there, goes on, and gives the file its place in one step."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quantjax.storage import leaves
from quantjax.storage.atomic import Place, put, write_file
from quantjax.storage.container import read_bytes, room_for
from quantjax.storage.errors import StorageError
from quantjax.storage.layout import Layout, write_buffer
from quantjax.storage.leaves import Buffer

Make = Callable[[int], Sequence[np.ndarray]]  # the bytes of every buffer of one piece


def write_pieces(
    place: Place,
    layout: Layout,
    pieces: Sequence[Sequence[Buffer]],
    make: Make,
    identity: Mapping[str, str],
) -> None:
    """Writes a file of which `make(i)` gives piece i, holding one piece at a time.

    A piece that an interrupted call of the same `identity` finished is not made again. If `make`
    raises ValueError nothing is left; after any other exception a later call goes on.
    Raises StorageError if what was left is of another identity, naming what differs.
    """
    data = place.target.with_name(place.target.name + ".partial")
    progress = data.with_name(data.name + ".json")
    finished = _finished(progress, data, identity)
    try:
        with (
            open(data, "r+b" if finished else "w+b") as file,
            open(progress, "a", encoding="utf-8") as lines,
        ):
            for i, buffers in enumerate(pieces):
                if not _holds(file, buffers, finished.get(i, [])):
                    _write(file, buffers, make(i))
                    # Not flushed to the disk: what a crash of the system loses, `_holds` finds.
                    file.flush()
                    # A line feed first: the line before may be torn.
                    lines.write("\n" + json.dumps([i, [buffer.digest for buffer in buffers]]))
                    lines.flush()
            file.seek(0)
            file.write(layout.head())
            file.flush()
            os.fsync(file.fileno())
    except ValueError:
        with contextlib.suppress(OSError):
            data.unlink(missing_ok=True)
            progress.unlink(missing_ok=True)
        raise
    put(data, place)
    progress.unlink()


def _finished(progress: Path, data: Path, identity: Mapping[str, str]) -> dict[int, list[str]]:
    """The digests of all pieces that an interrupted call finished, or the first line anew."""
    if not progress.exists():
        write_file(progress, lambda file: _all(file, json.dumps(dict(identity)).encode()))
        return {}
    first, *lines = progress.read_text(encoding="utf-8", errors="replace").split("\n")
    before = _parsed(first)
    if not isinstance(before, dict):
        raise StorageError(f"{progress}: in the way: not what an interrupted call left. Remove it.")
    differ = sorted(k for k in {*before, *identity} if before.get(k) != identity.get(k))
    if differ:
        raise StorageError(
            f"{progress}: what an interrupted call left is of another {' and '.join(differ)}. "
            f"Repeat that call, or remove this file and {data.name} to begin anew."
        )
    finished = {}
    for line in lines if data.exists() else ():
        match _parsed(line):
            case [int(i), list(digests)]:
                finished[i] = digests
    return finished


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _holds(file: BinaryIO, buffers: Sequence[Buffer], digests: Sequence[str]) -> bool:
    """Whether the buffers are there with these digests, which are then noted."""
    if len(digests) != len(buffers):
        return False
    for buffer, digest in zip(buffers, digests, strict=True):
        if leaves.digest_of(read_bytes(file, buffer.start, room_for(buffer.nbytes))) != digest:
            return False
        buffer.digest = digest
    return True


def _write(file: BinaryIO, buffers: Sequence[Buffer], data: Sequence[np.ndarray]) -> None:
    for buffer, own in zip(buffers, data, strict=True):
        write_buffer(file, buffer, own)
