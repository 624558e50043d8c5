"""What can go wrong with a file, by name. Every message says what was expected, what came, where
and what to do."""


class StorageError(ValueError):
    """The base of what `save` and `load` raise about trees and files."""


class CannotStore(StorageError):
    """A leaf, a key or the metadata given to `save` has no form on disk."""


class NotQuantjaxFile(StorageError):
    """Something else: not a safetensors file, or one that quantjax did not write."""


class CorruptFile(StorageError):
    """Truncated, changed since it was written, or not what its own header says."""


class NewerVersion(StorageError):
    """Written by a later quantjax, in a layout that this one does not know."""


class StructureMismatch(StorageError):
    """The file is whole, but is not the tree that was asked for."""
