"""What did the teacher answer? Run once, kept in a file, and read again only for the same network
and the same data."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.interpret.pieces import arguments
from quantjax.storage import load, read_header, save
from quantjax.storage.errors import StorageError

FilePath = str | os.PathLike[str]
_LOWEST = float(np.finfo(np.float16).min)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredLogits:
    """A teacher's logits, batch by batch: `logits[i]` are those of batch i, float32.

    classes: of a row. Only differences within a row are kept, as a softmax sees no others."""

    classes: int
    batches: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Float[Array, "*batch classes"]:
        found = {name: jnp.asarray(x) for name, x in self.batches[i].items()}
        values = found["values"].astype(jnp.float32)
        if "index" not in found:
            return values
        rest = jnp.broadcast_to(found["rest"].astype(jnp.float32)[..., None], self._shape(values))
        index = found["index"].astype(jnp.int32)
        return jnp.put_along_axis(rest, index, values, -1, inplace=False)

    def _shape(self, values: jax.Array) -> tuple[int, ...]:
        return (*values.shape[:-1], self.classes)


def store_logits(
    path: FilePath,
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    top: int | None = None,
) -> None:
    """Runs the teacher over the batches and writes its logits to one file, in float16.

    Without `top`: z - max z, all classes. With it: the log-probabilities of the `top` largest
    classes, and what is left of the probability, spread evenly over the others; probabilities at
    temperature 1 are those of the teacher, of the others their sum. A plain tuple in `batches` is
    spread over `apply(params, *batch)`, anything else is one argument.

    The same network and data give the same bytes. Beside the logits stand digests of the
    parameters and of every batch, see `load_logits`. Raises ValueError without batches, for outputs
    that are not (..., classes) logits of the same classes, that are not finite, and for a `top`
    that is not below the classes.
    """
    run = jax.jit(apply)
    stored, digests, classes = [], [], None
    for i, batch in enumerate(batches):
        logits = run(params, *arguments(batch))
        shape: tuple[int, ...] = getattr(logits, "shape", ())
        if len(shape) < 1 or classes not in (None, shape[-1]):
            raise ValueError(
                f"store_logits: batch {i}: expected logits (..., {classes or 'classes'}), got "
                f"{shape or logits!r}."
            )
        classes = int(shape[-1])
        if top is not None and not 0 < top < classes:
            raise ValueError(f"store_logits: top={top} must lie between 0 and {classes} classes.")
        if not bool(jnp.isfinite(logits).all()):
            raise ValueError(f"store_logits: batch {i}: the logits hold NaN or infinity.")
        kept = _reduced(logits, top)
        stored.append({name: np.asarray(x) for name, x in kept.items()})
        digests.append(digest(batch))
    if not stored:
        raise ValueError("store_logits: no batches.")
    about = {"params": digest(params), "batches": json.dumps(digests), "classes": str(classes)}
    save(path, stored, metadata={f"teacher {name}": text for name, text in about.items()})


def load_logits(path: FilePath, params: Any, batches: Iterable[Any]) -> StoredLogits:
    """The logits that `store_logits` wrote for this network and these batches.

    Raises ValueError if the parameters or a batch, which it names, are not those that the file is
    of, to the bit, and where it holds no logits; else as `quantjax.load`. The function itself has
    no digest: two that take the same parameters are not told apart.

    >>> import tempfile
    >>> apply, w, data = lambda p, x: x @ p, jnp.array([[1.0, 3.0]]), [jnp.ones((2, 1))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store_logits(f"{folder}/teacher.safetensors", apply, w, data)
    ...     logits = load_logits(f"{folder}/teacher.safetensors", w, data)
    >>> logits[0].tolist()
    [[-2.0, 0.0], [-2.0, 0.0]]
    """
    name, metadata = os.fspath(path), read_header(path).metadata
    about = {key: metadata.get(f"teacher {key}") for key in ("params", "batches", "classes")}
    if any(x is None for x in about.values()):
        raise StorageError(f"{name}: holds no teacher's logits; expected a file of store_logits.")
    if digest(params) != about["params"]:
        raise ValueError(f"{name}: the logits are of another network: its parameters differ.")
    known = json.loads(str(about["batches"]))
    given = [digest(batch) for batch in batches]
    if len(given) != len(known):
        raise ValueError(f"{name}: holds logits of {len(known)} batches, got {len(given)}.")
    odd = [i for i, (a, b) in enumerate(zip(given, known, strict=True)) if a != b]
    if odd:
        raise ValueError(f"{name}: the logits are of other data: batches {odd[:5]} differ.")
    return StoredLogits(int(str(about["classes"])), tuple(load(path)))


def digest(tree: Any) -> str:
    """Of the paths, dtypes, shapes and bytes of all arrays in a tree."""
    total = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        total.update(repr((jax.tree_util.keystr(path), str(array.dtype), array.shape)).encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


@functools.partial(jax.jit, static_argnames="top")
def _reduced(logits: jax.Array, top: int | None) -> dict[str, jax.Array]:
    """What of a batch is kept. The values of float16 reach to about -65,504; nothing is below."""
    z = logits.astype(jnp.float32)
    if top is None:
        return {"values": _half(z - z.max(-1, keepdims=True))}
    log_p = jax.nn.log_softmax(z)
    values, index = jax.lax.top_k(log_p, top)
    others = jnp.put_along_axis(log_p, index, -jnp.inf, -1, inplace=False)
    rest = jax.nn.logsumexp(others, -1) - jnp.log(jnp.float32(z.shape[-1] - top))
    small = jnp.uint16 if z.shape[-1] <= 2**16 else jnp.uint32
    return {"values": _half(values), "index": index.astype(small), "rest": _half(rest)}


def _half(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, _LOWEST).astype(jnp.float16)
