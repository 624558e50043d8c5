"""Which run is this? Descriptions of configurations, data and parameters, to tell two apart."""

import dataclasses
import enum
import functools
import hashlib
import math
import sys
import types
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from quantjax.fake_quantized import FakeQuantized
from quantjax.paths import named_leaves

Tree = Any  # a pytree of arrays


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Sixteen hex digits of the SHA-256 of the arrays' dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()[:16]


def digest_of(tree: Tree) -> str:
    """That of a tree's leaves."""
    return digest(np.asarray(leaf) for leaf in jax.tree.leaves(tree))


def fingerprint(tree: Tree) -> dict[str, list]:
    """Dtype, shape, sum of magnitudes and Euclidean norm of each leaf, by key path.

    Unlike a digest it forgives the last bits, in which initial values may differ between
    versions of JAX and devices; `differences` compares numbers to 4 digits."""
    found = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        values = np.asarray(leaf).astype(np.float64)
        norms = [float(np.abs(values).sum()), float(np.sqrt((values**2).sum()))]
        found[jax.tree_util.keystr(key_path)] = [str(leaf.dtype), list(leaf.shape), *norms]
    return found


def rounding(tree: Tree) -> dict[str, Any]:
    """How each leaf of `qat.prepare` is rounded, by key path: what its arrays do not tell."""
    return {
        name: describe({"spec": x.spec, "estimator": x.estimator, "backward": x.backward})
        for name, x in named_leaves(tree)[0]
        if isinstance(x, FakeQuantized)
    }


def describe(value: Any) -> Any:
    """A JSON-able account of a value, the same in every process, to tell two runs apart.

    A function is named, with the values it closes over: that tells `optax.sgd(0.1)` from
    `optax.sgd(0.01)`. Two lambdas of one scope with equal closures are not told apart.

    >>> import optax
    >>> describe(optax.sgd(0.1)) == describe(optax.sgd(0.1))
    True
    >>> describe(optax.sgd(0.1)) == describe(optax.sgd(0.01))
    False
    """
    return _describe(value, ())


def differences(stored: Any, asked: Any, path: str = "") -> list[str]:
    """The places where two descriptions differ, as lines `path: stored != asked`.

    Floats agree within a ten-thousandth.

    >>> differences({"epochs": 3}, {"epochs": 5})
    ['/epochs: 3 != 5']
    """
    if isinstance(stored, dict) and isinstance(asked, dict):
        keys = [*stored, *(k for k in asked if k not in stored)]
        parts = [(stored.get(k), asked.get(k), f"{path}/{k}") for k in keys]
    elif isinstance(stored, list) and isinstance(asked, list) and len(stored) == len(asked):
        parts = [(a, b, f"{path}/{i}") for i, (a, b) in enumerate(zip(stored, asked, strict=True))]
    else:
        close = isinstance(stored, float) and isinstance(asked, float | int)
        same = math.isclose(stored, asked, rel_tol=1e-4) if close else stored == asked
        return [] if same else [f"{path}: {stored} != {asked}"]
    return [line for part in parts for line in differences(*part)]


def _describe(value: Any, above: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in above:  # a function that closes over itself
        return "..."
    inner = functools.partial(_describe, above=(*above, id(value)))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return f"{array.dtype}{list(array.shape)} {digest([array])}"
    if isinstance(value, types.MethodType):
        return {"method": value.__func__.__qualname__, "of": inner(value.__self__)}
    if isinstance(value, functools.partial):
        return {"partial": inner(value.func), "args": inner((value.args, value.keywords))}
    if isinstance(value, types.FunctionType):
        names, cells = value.__code__.co_freevars, value.__closure__ or ()
        closed = {name: inner(_contents(cell)) for name, cell in zip(names, cells, strict=True)}
        return {"function": f"{_module(value)}.{value.__qualname__}", **closed}
    if hasattr(value, "__wrapped__"):  # jax.jit and its like
        return inner(value.__wrapped__)
    if isinstance(value, enum.Enum | type):
        return str(value)
    if isinstance(value, tuple | list):
        return [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(inner(item)) for item in value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: inner(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **fields}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: inner(value[key]) for key in sorted(value)}
    return type(value).__qualname__  # a cache, a client, ...: not what makes a run


def _module(function: types.FunctionType) -> str:
    """Its module, by the same name whether that was imported or run with `python -m`."""
    spec = getattr(sys.modules.get(function.__module__), "__spec__", None)
    return spec.name if function.__module__ == "__main__" and spec else function.__module__


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
