"""How does a file change from old to new with nothing in between?"""

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from quantjax.storage.errors import CannotStore


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Calls `write` on a temporary file beside `path`, which then takes its place in one step.

    Whatever happens before that step leaves the old file whole, and the temporary one is removed;
    only a killed process leaves it behind (`.name.….tmp`). Data and directory are flushed to disk.
    A link is followed: what it points to is replaced. Permissions are those of the old file, or
    of any new one.
    """
    place = place_of(path)
    target = place.target
    temporary = target.parent / f".{target.name[:40]}.{secrets.token_hex(8)}.tmp"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        put(temporary, place)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class Place(NamedTuple):
    """Where a file goes, links followed, and the permissions of the one it replaces."""

    target: Path
    permissions: int | None


def place_of(path: str | os.PathLike[str]) -> Place:
    """The place of a file to be written; raises OSError or CannotStore if none can be there."""
    target = Path(os.path.realpath(path))
    return Place(target, _permissions(target))


def put(temporary: Path, place: Place) -> None:
    """Gives a finished file, flushed to disk, its place in one step."""
    if place.permissions is not None:
        os.chmod(temporary, place.permissions)
    os.replace(temporary, place.target)
    if os.name == "posix":  # elsewhere a directory cannot be opened
        directory = os.open(place.target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _permissions(target: Path) -> int | None:
    """Those of the file to be replaced, or None; raises if the path cannot be written."""
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: there is no directory {target.parent}; make it first.")
    if not target.exists():
        return None
    if target.is_dir():
        raise IsADirectoryError(f"{target}: a directory; expected the name of a file.")
    if not target.is_file():
        raise CannotStore(f"{target}: neither a file nor new; it would be replaced by one.")
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{target}: read-only; remove it or choose another name.")
    return stat.S_IMODE(target.stat().st_mode)
