"""How is a model quantized that is larger than memory? Leaf by leaf, from file to file."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.paths import path_name
from quantjax.policy import Policy, Resolution, Resolved, preset
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec
from quantjax.storage import leaves, statics
from quantjax.storage.atomic import place_of
from quantjax.storage.container import room_for
from quantjax.storage.header import FilePath, buffers_of
from quantjax.storage.layout import plan
from quantjax.storage.leaves import Buffer, Empty, Function, Value
from quantjax.storage.pieces import write_pieces
from quantjax.storage.source import Stored, open_source, read_buffer
from quantjax.transform import quantize

OneLeaf = Callable[[str, Any, QuantSpec], QTensor]  # (name, float array, spec)


@runtime_checkable
class DataFree(Protocol):
    """A method, a frozen dataclass, that looks at one leaf at a time and at no samples."""

    @property
    def policy(self) -> Policy | Resolved | str:
        """Which leaves it quantizes, and into what."""

    def on_leaf(self, path: str, x: Any, spec: QuantSpec, /) -> QTensor:
        """One leaf under its resolved spec."""


def quantize_file(
    source: FilePath | Sequence[FilePath],
    target: FilePath,
    policy: Any,
    *,
    key: jax.Array | None = None,
) -> Resolved:
    """Writes `save(target, quantize(load(source), policy, key=key))`, holding one leaf at a time.

    source: float parameters in a file of `save`, or in any safetensors file; an index
    (`model.safetensors.index.json`) that names several; or a list of files. Names of other tools
    are split at dots and slashes: `model.layers.0.mlp.weight` is the path
    `model/layers/0/mlp/weight`, and `load` gives nested dicts.
    policy: a Policy, a preset name, or a resolved policy: shapes are enough to resolve one with the
    sites of a model. Or `ptq.hqq(policy)`, which needs no samples either.

    Gives back what was decided for each leaf, with the reasons for those that were kept. Policy,
    shapes and the target are checked before any data is read. `target` appears at the end, in one
    step. A call that was interrupted leaves `target.partial` and `target.partial.json`; the same
    call again goes on after the last leaf that was finished, to the same bytes. (Files of other
    tools have no digests; they are known by header, size and time of change.)

    Memory: a leaf before and after, and what finding its scales takes beside them (none for the
    range, some twice the leaf for the MSE search); nothing of it grows with the file.

    Raises ValueError as `quantize` does (a leaf of NaN when it comes to it), the errors of `load`
    for a damaged source, and StorageError if an interrupted call left another source, policy or
    key; TypeError for a method that needs samples.

    >>> import tempfile, quantjax as qj
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     source, target = f"{folder}/float.safetensors", f"{folder}/int8.safetensors"
    ...     qj.save(source, {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}})
    ...     print(quantize_file(source, target, "w8")["dense/bias"].reason)
    ...     qj.load(target)["dense"]["kernel"]
    a bias; name it in a rule to quantize it
    QTensor(int8, shape=(4, 2), block=allx1, dtype=float32)
    """
    method, one = _method(policy, key)
    place, stored = place_of(target), open_source(source)
    _check_apart(place.target, [*stored.files, source])
    resolved = method.resolve(jax.tree.map(_facts, stored.tree))
    decisions = iter(resolved.leaves)
    flat, tasks = [], []
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(stored.tree)[0]:
        spec = None if _vanishes(leaf.skeleton) else next(decisions)[1].spec
        task = _Task(path_name(key_path), leaf, spec, one)
        tasks.append(task)
        flat.append((key_path, task.skeleton()))
    layout = plan(os.fspath(target), flat, {})
    pieces = [buffers_of(skeleton) for _, skeleton in layout.skeletons]
    identity = {
        "source": stored.identity,
        "policy": _hash([[task.name, _written(task.spec)] for task in tasks] + [_label(policy)]),
        "key": _hash(None if key is None else _key_data(key)),
        "JAX": f"{jax.__version__} on {jax.default_backend()}",
    }
    # JAX lets go of borrowed memory when it likes, so all leaves are read into the same. By then
    # the one before is written, so its program has ended.
    sizes = [b.nbytes for task in tasks for b in buffers_of(task.stored.skeleton)]
    room = room_for(max(sizes, default=0))
    write_pieces(place, layout, pieces, lambda i: tasks[i].data(room), identity)
    return resolved


class _Task(NamedTuple):
    """A leaf to be copied, or quantized under `spec`."""

    name: str
    stored: Stored
    spec: QuantSpec | None
    one: OneLeaf

    def skeleton(self) -> Any:
        """What will be in the target, but for its bytes."""
        source, spec = self.stored.skeleton, self.spec
        if spec is None:
            return source
        wide = source.dtype.itemsize > 4
        floats = jax.ShapeDtypeStruct(source.shape, np.float32 if wide else source.dtype)
        q = jax.eval_shape(lambda x: self.one(self.name, x, spec), floats)
        return jax.tree.map(lambda a: Buffer("", np.dtype(a.dtype), a.shape, "jax"), q)

    def data(self, room: np.ndarray) -> list[np.ndarray]:
        """The bytes of every buffer of it; what is read comes into `room`."""
        source, spec = self.stored.skeleton, self.spec
        if spec is None:
            return [read_buffer(self.stored.file, b, room) for b in buffers_of(source)]
        x = read_buffer(self.stored.file, source, room).view(source.dtype).reshape(source.shape)
        if x.dtype.itemsize <= 4:  # JAX has the type, and borrows the memory
            x = jax.device_put(x, may_alias=True)
        q = self.one(self.name, x, spec)
        return [leaves.raw_bytes(child) for child in jax.tree.leaves(q)]


def _method(policy: Any, key: jax.Array | None) -> tuple[Policy | Resolved, OneLeaf]:
    """The policy, and what quantizes one leaf."""
    if isinstance(policy, DataFree):
        if key is not None:
            raise ValueError("key= is for stochastic rounding by a policy, not for a method.")
        rules, one = policy.policy, policy.on_leaf
    elif isinstance(policy, Policy | Resolved | str):
        rules, one = policy, functools.partial(_rounded, key=key)
    else:
        raise TypeError(
            f"quantize_file: expected a Policy, a preset name, a resolved policy or a method that "
            f"needs no samples, ptq.hqq, got {policy!r}. With samples, it is calibrate."
        )
    return preset(rules) if isinstance(rules, str) else rules, one


def _rounded(name: str, x: Any, spec: QuantSpec, *, key: jax.Array | None) -> QTensor:
    """The leaf as `quantize` gives it in whatever tree."""
    return quantize({name: x}, Resolved(((name, Resolution(spec, "")),)), key=key)[name]


def _check_apart(target: Any, sources: Sequence[Any]) -> None:
    for file in sources:
        if isinstance(file, str | os.PathLike) and os.path.realpath(file) == os.fspath(target):
            raise ValueError(
                f"{target}: is the source too, which is read while the target is written; choose "
                f"another name."
            )


def _vanishes(skeleton: Any) -> bool:
    """Whether a tree that holds this has no leaf there."""
    return isinstance(skeleton, Empty) or skeleton == Value(None)


def _facts(leaf: Stored) -> Any:
    """What a policy needs to know of a leaf."""
    match leaf.skeleton:
        case Buffer() as buffer:
            dtype = buffer.dtype if buffer.holder in leaves.PLAIN else np.uint32
            return jax.ShapeDtypeStruct(buffer.facts[0], dtype)
        case Value(value):
            return value
        case Function(name):
            return name
        case Empty():
            return None
    return leaf.skeleton


def _written(spec: QuantSpec | None) -> Any:
    """The spec to the last digit, or as it shows itself, if it holds an observer of the user's."""
    try:
        return statics.to_json(spec)
    except ValueError:
        return repr(spec)


def _label(policy: Any) -> str:
    """What a method is besides its policy, which counts as it was resolved."""
    is_method = isinstance(policy, DataFree)
    return repr(dataclasses.replace(policy, policy="")) if is_method else ""


def _key_data(key: jax.Array) -> Any:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return [str(jax.random.key_impl(key)), jax.random.key_data(key).tolist()]
    return key.tolist()


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
