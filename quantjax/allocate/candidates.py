"""Which parameters can take which formats, at which cost? The options, and the trees in each."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from quantjax.formats import ExponentFormat
from quantjax.interpret.record import Site
from quantjax.paths import named_leaves
from quantjax.policy import Policy, Resolved, preset
from quantjax.qtensor import QTensor
from quantjax.spec import Granularity, QuantSpec
from quantjax.transform import quantize

FLOAT = "float"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One parameter in one format. spec: with an explicit block, or None for floats. bytes: codes,
    scales, zero points and codebook. operations: of its products, in one call on the first batch:
    multiply-adds times bits of the weight."""

    path: str
    format: str
    spec: QuantSpec | None
    bytes: int
    operations: int


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The formats by label, the parameters that any of them quantizes with their layers, the
    options of each, and by label the quantized leaves of those it quantizes."""

    labels: tuple[str, ...]
    layers: dict[str, tuple[int, ...]]
    options: tuple[Option, ...]
    leaves: dict[str, dict[str, QTensor]]
    kept_bytes: int


def named_policies(formats: Any) -> dict[str, Policy | None]:
    """A policy for every label; None keeps floats.

    Raises ValueError for none, for two of one label, and for what is no format."""
    if isinstance(formats, Mapping):
        pairs = list(formats.items())
    else:
        several = isinstance(formats, Sequence) and not isinstance(formats, str)
        pairs = [(_label(f), f) for f in (formats if several else [formats])]
    labels = [label for label, _ in pairs]
    if not pairs or len(set(labels)) < len(labels):
        raise ValueError(
            f"sensitivity: expected formats of different names, got {labels}; a mapping of names "
            f"to formats tells them apart."
        )
    return {label: _policy(candidate, label) for label, candidate in pairs}


def _label(candidate: Any) -> str:
    if candidate is None:
        return FLOAT
    if isinstance(candidate, str):
        return candidate
    if isinstance(candidate, Policy):
        return candidate.otherwise_name or "policy"
    if not isinstance(candidate, QuantSpec):
        return repr(candidate)
    parts = [str(candidate.format)]
    if candidate.group is not None:
        parts.append(f"g{candidate.group}")
    if isinstance(candidate.block, Granularity) and candidate.block is not Granularity.CHANNEL:
        parts.append(candidate.block.value)
    if isinstance(candidate.scale_format, ExponentFormat):
        parts.append("e8m0")
    return " ".join([*parts, *([] if candidate.symmetric else ["asymmetric"])])


def _policy(candidate: Any, label: str) -> Policy | None:
    if candidate is None or isinstance(candidate, Policy):
        return candidate
    if isinstance(candidate, str):
        return preset(candidate)
    if isinstance(candidate, QuantSpec):
        return Policy(otherwise=candidate)
    raise ValueError(
        f"sensitivity: {label}: expected a preset name, a QuantSpec, a Policy or None for floats, "
        f"got {candidate!r}."
    )


def candidates(params: Any, formats: Any, sites: Sequence[Site]) -> Candidates:
    """Everything quantized in every format.

    Raises ValueError for a format that quantizes activations, for stacked layers that formats
    disagree on, and where no format quantizes anything."""
    policies = named_policies(formats)
    named, _ = named_leaves(params)
    found: dict[str, Resolved] = {}
    for label, policy in policies.items():
        if policy is not None:
            found[label] = policy.resolve(params, sites)
            _weights_only(label, found[label])
    layers: dict[str, tuple[int, ...]] = {}
    for name, leaf in named:
        specs = [spec for r in found.values() if (spec := r[name].spec) is not None]
        if len({spec.stacked for spec in specs}) > 1:
            raise ValueError(f"{name}: the formats disagree on how many leading axes are layers.")
        if specs:
            layers[name] = tuple(leaf.shape[: specs[0].stacked])
    if not layers:
        raise ValueError("sensitivity: no format quantizes any parameter.")
    flops = {name: sum(s.flops for s in sites if s.path == name) for name in layers}
    options, leaves = [], {}
    for label, policy in policies.items():
        tree = params if policy is None else quantize(params, found[label])
        quantized = dict(named_leaves(tree)[0])
        leaves[label] = {n: q for n, q in quantized.items() if isinstance(q, QTensor)}
        for name, leaf in named:
            if name in layers:
                q = leaves[label].get(name)
                bits = 8 * leaf.dtype.itemsize if q is None else q.format.bits
                options.append(
                    Option(
                        path=name,
                        format=label,
                        spec=None if q is None else found[label][name].spec,
                        bytes=_bytes(leaf) if q is None else q.nbytes,
                        operations=flops[name] // 2 * bits,
                    )
                )
    kept = sum(_bytes(x) for n, x in named if n not in layers and hasattr(x, "dtype"))
    return Candidates(tuple(policies), layers, tuple(options), leaves, kept)


def _weights_only(label: str, resolved: Resolved) -> None:
    for path, decision in resolved.leaves:
        if decision.spec is not None and decision.spec.act is not None:
            raise ValueError(
                f"{path}: {label} also quantizes activations ({decision.spec.act.format}); the "
                f"sensitivity is that of weights. Use a weight-only format, as 'w4' for 'w4a8'."
            )


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


@functools.partial(jax.jit, static_argnames="axes")
def sum_after(x: jax.Array, axes: int) -> jax.Array:
    """The sum over all but the first axes."""
    return x.sum(tuple(range(axes, x.ndim)))
