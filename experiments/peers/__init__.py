"""What do other packages make of the same network? Each is asked in its own words, one a file.

They get the arrays, the samples and the policy that ours get. What they store is read back as
floats and judged in the same network; where a package computes with quantized activations, its
own products are. A package that is not installed is a reason, not an error; none is imported
before it is asked."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from experiments.rows import NotApplicable
from quantjax.paths import named_leaves


class Network(NamedTuple):
    """model: a Flax module. params: its variables, or of NNX its state, as nested dicts. batches:
    inputs to calibrate on."""

    model: Any
    params: Any
    batches: Sequence[Any]


class Made(NamedTuple):
    """tree: the parameters, read back; with `apply`, whatever apply(tree, inputs) takes. bits: per
    quantized weight, with scales and zero points as stored and codes as narrow as they are.
    package: what made it, and its version."""

    tree: Any
    bits: float
    package: str
    apply: Callable[[Any, Any], Any] | None = None


def need(*packages: str) -> str:
    """The name and version of the first; NotApplicable where one of them is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise NotApplicable(f"{name} is not installed")
    return f"{packages[0]} {importlib.metadata.version(packages[0])}"


def asked(policy: qj.Policy, params: Any) -> Mapping[str, qj.QuantSpec]:
    """By path, the spec of every leaf that the policy quantizes, as its rule has it."""
    rules = {**dict(policy.rules), policy.otherwise_name: policy.otherwise}
    found = {path: rules[r.matched] for path, r in policy.resolve(params).items() if r.spec}
    return {path: spec for path, spec in found.items() if spec}


def each_kernel(
    policy: qj.Policy,
    params: Any,
    quantize: Callable[[str, np.ndarray, Any], tuple[np.ndarray, float]],
) -> tuple[Any, float]:
    """(the parameters, with what `quantize` makes of each kernel; bits per quantized weight).

    quantize: of a path, the kernel there with its outputs moved to the front, and its spec:
    (what the kernel becomes, the bits that takes)."""
    specs = asked(policy, params)
    leaves, structure = named_leaves(params)
    out, bits, count = [], 0.0, 0
    for path, leaf in leaves:
        if path in specs:
            kernel = np.ascontiguousarray(np.moveaxis(np.asarray(leaf, np.float32), -1, 0))
            floats, taken = quantize(path, kernel, specs[path])
            leaf = jnp.asarray(np.moveaxis(floats, 0, -1))
            bits, count = bits + taken, count + leaf.size
        out.append(leaf)
    return jax.tree.unflatten(structure, out), bits / count
