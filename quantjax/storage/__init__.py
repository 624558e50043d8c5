"""Trees on disk: `save`, `load`, `read_header`, and the errors they raise."""

from quantjax.storage.errors import (
    CannotStore,
    CorruptFile,
    NewerVersion,
    NotQuantjaxFile,
    StorageError,
    StructureMismatch,
)
from quantjax.storage.file import FORMAT_VERSION, Header, StoredLeaf, load, read_header, save

__all__ = [
    "FORMAT_VERSION",
    "CannotStore",
    "CorruptFile",
    "Header",
    "NewerVersion",
    "NotQuantjaxFile",
    "StorageError",
    "StoredLeaf",
    "StructureMismatch",
    "load",
    "read_header",
    "save",
]
