"""Local original files: where they may lie, what is missing, which contents they are."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def find_folder(folders: Iterable[Path], files: Iterable[str]) -> Path | None:
    """Returns the first of `folders` that holds one of `files`, else None."""
    files = list(files)
    return next((folder for folder in folders if any((folder / f).is_file() for f in files)), None)


def require(folder: Path, files: Iterable[str]) -> None:
    """Raises FileNotFoundError naming those of `files` that `folder` lacks."""
    files = list(files)
    if missing := [f for f in files if not (folder / f).is_file()]:
        raise FileNotFoundError(
            f"{folder}: missing {', '.join(missing)}. The set needs all of {', '.join(files)}: "
            "copy the missing original files there."
        )


def digest(folder: Path, files: Iterable[str]) -> str:
    """Twelve hex digits of the SHA-256 of the files' names and contents."""
    total = hashlib.sha256()
    for file in files:
        with open(folder / file, "rb") as stream:
            total.update(f"{file}\n{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:12]
