"""A run on disk, kept by Orbax: the arrays of its state, and what says which run it is.

Each state is a step of its own; the one before is removed when it is whole, so an interrupted write
leaves the last one. Leaves are stored bit for bit, under their numbers: their key paths, dtypes and
shapes stand beside the description, and are compared when they are read."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

Tree = Any  # a pytree of arrays


def save(folder: Path, step: int, tree: Tree, meta: dict) -> None:
    """Writes the leaves of `tree` and the JSON-able `meta`, in place of those of earlier steps."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    header = {"meta": meta, "leaves": [_entry(*item) for item in leaves]}
    # Orbax refuses arrays without elements; their entries say all of them.
    arrays = {str(i): _plain(leaf) for i, (_, leaf) in enumerate(leaves) if leaf.size}
    what = {"header": ocp.args.JsonSave(header), "arrays": ocp.args.StandardSave(arrays)}
    with _manager(folder) as manager:
        manager.save(step, args=ocp.args.Composite(**what))


def load_meta(folder: Path) -> dict | None:
    """The `meta` of the last step that was saved whole; None where there is none."""
    if not folder.is_dir():
        return None
    with _manager(folder) as manager:
        step = manager.latest_step()
        return None if step is None else _header(manager, step)["meta"]


def load(folder: Path, like: Tree) -> Tree:
    """Returns a tree of the structure of `like` with the stored leaves.

    Raises ValueError naming the first leaf whose path, dtype or shape differs."""
    expected, treedef = jax.tree_util.tree_flatten_with_path(like)
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"{folder}: holds no checkpoint.")
        entries = _header(manager, step)["leaves"]
        if len(entries) != len(expected):
            raise ValueError(f"{folder}: holds {len(entries)} leaves, expected {len(expected)}.")
        for i, (entry, item) in enumerate(zip(entries, expected, strict=True)):
            if entry != _entry(*item):
                raise ValueError(f"{folder}: leaf {i} is {entry}, expected {_entry(*item)}.")
        # Onto this device, whichever it was saved from.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        plain = {str(i): _plain(leaf) for i, (_, leaf) in enumerate(expected) if leaf.size}
        asked = {
            i: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for i, x in plain.items()
        }
        what = ocp.args.Composite(arrays=ocp.args.StandardRestore(asked))
        arrays = manager.restore(step, args=what).arrays
    leaves = [_as(leaf, arrays.get(str(i))) for i, (_, leaf) in enumerate(expected)]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _manager(folder: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _header(manager: ocp.CheckpointManager, step: int) -> dict:
    return manager.restore(step, args=ocp.args.Composite(header=ocp.args.JsonRestore())).header


def _entry(key_path: tuple, leaf: Any) -> list:
    # The name of a typed key's dtype says its generator.
    return [jax.tree_util.keystr(key_path), str(leaf.dtype), list(leaf.shape)]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> jax.Array:
    """An array of numbers: a random key's own."""
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _as(like: Any, stored: jax.Array | None) -> Any:
    if stored is None:
        return like  # without elements
    if not _is_key(like):
        return stored
    return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(like))
