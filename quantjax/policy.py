"""Which parameters are quantized, and how? Ordered patterns on key paths; presets by name."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.axes import block_of_sites, resolve_block
from quantjax.fake_quantized import FakeQuantized, is_quantized
from quantjax.formats import ExponentFormat, IntFormat, Levels, binary, e2m1, e4m3, nf4, ternary
from quantjax.observers import mse
from quantjax.paths import compile_pattern, named_leaves, nearest, other_collections
from quantjax.qtensor import QTensor
from quantjax.rounding import Rounding
from quantjax.spec import Granularity, QuantSpec

# What a preset leaves in float: they are few, and each is added to or multiplies a whole channel.
KEPT = frozenset({"bias", "b", "offset", "scale", "mean", "var"})

GRAMMAR = (
    "w{1..8}[g{group}][a{2..8}] (as 'w8', 'w4g64', 'w8a8', 'w4g32a8'), nf4[g{group}], fp8, "
    "mxfp4, mxfp8, nvfp4, ternary, binary"
)


def preset_spec(name: str) -> QuantSpec:
    """The QuantSpec behind a preset name; see `preset`."""
    fixed = {
        "fp8": QuantSpec(format=e4m3),
        "mxfp4": QuantSpec(format=e2m1, group=32, scale_format=ExponentFormat()),
        "mxfp8": QuantSpec(format=e4m3, group=32, scale_format=ExponentFormat()),
        "nvfp4": QuantSpec(format=e2m1, group=16, scale_format=e4m3),
        "ternary": QuantSpec(format=ternary, observer=mse()),
        "binary": QuantSpec(format=binary, observer=mse()),
    }
    if name in fixed:
        return fixed[name]
    codebook = re.fullmatch(r"nf4(?:g([1-9]\d*))?", name)
    if codebook:
        return QuantSpec(format=nf4, group=int(codebook[1] or 64))
    integer = re.fullmatch(r"w([1-8])(?:g([1-9]\d*))?(?:a([2-8]))?(?:g([1-9]\d*))?", name)
    if not integer or (integer[2] and integer[4]) or (integer[4] and not integer[3]):
        raise ValueError(f"unknown preset {name!r}. Presets are {GRAMMAR}.")
    bits, group = int(integer[1]), integer[2] or integer[4]
    # Measured in experiments/results: the search pays below 5 bits, half-integer levels below 3.
    levels = Levels.NARROW if bits > 2 else Levels.HALF
    act = None
    if integer[3]:
        act = QuantSpec(format=IntFormat(int(integer[3])), block=Granularity.ROW)
    spec = QuantSpec(format=IntFormat(bits, levels=levels), act=act)
    if group:
        spec = dataclasses.replace(spec, group=int(group))
    return dataclasses.replace(spec, observer=mse()) if bits <= 4 else spec


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What happens to one leaf. spec: with an explicit block, or None to keep it as it is.
    matched: the pattern or preset that decided. reason: why it is kept, or what was assumed."""

    spec: QuantSpec | None
    matched: str
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Resolved(Mapping):
    """An explicit decision for every leaf of one tree, in its order; a mapping by path."""

    leaves: tuple[tuple[str, Resolution], ...]

    def __getitem__(self, name: str) -> Resolution:
        for path, resolution in self.leaves:
            if path == name:
                return resolution
        raise KeyError(f"{name!r}; nearest: {nearest(name, self)}")

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def explain(self, tree: Any) -> "Resolved":
        """Itself, if `tree`, in which leaves may be quantized already, has the same paths."""
        names = [name for name, _ in named_leaves(tree)[0]]
        if names != list(self):
            odd = sorted(set(names) ^ set(self)) or names
            raise ValueError(f"this policy was resolved for another tree; it differs in {odd[:5]}.")
        return self

    def resolve(self, params: Any, sites: Sequence[Any] = ()) -> "Resolved":
        """Itself, if it fits `params`: the same paths, and floats of the rank it was resolved for
        where it quantizes. ValueError if not, or if `sites` come too late."""
        if sites:
            raise ValueError("the policy is resolved already: give sites= to its resolve.")
        self.explain(params)
        named = named_leaves(params)[0]
        for (name, leaf), (_, resolution) in zip(named, self.leaves, strict=True):
            if resolution.spec is None:
                continue
            _refuse_quantized(name, leaf)
            facts, spec = _facts(leaf), resolution.spec
            why = _unfit(facts)
            rank = len(spec.block_shape) + spec.stacked
            if facts is not None and not why and len(facts.shape) != rank:
                why = f"its rank is not {rank}, but its shape {facts.shape}"
            if why:
                raise ValueError(f"{name}: this policy was resolved for another leaf: {why}.")
        return self


@dataclasses.dataclass(frozen=True)
class Policy:
    """Ordered (pattern, spec) rules on '/'-joined paths; the first that matches decides.

    Patterns are anchored globs: `*` stays within a part, `**` spans any number of parts. A spec
    is a `QuantSpec`, a preset name, or None to keep the leaf in float. A rule is taken at its
    word: a bias that it matches is quantized. Leaves that no rule matches go to `otherwise`, a
    QuantSpec or preset name that spares what presets spare (see `preset`), or stay in float.

    >>> Policy([("head/kernel", "w8"), ("**/norm/*", None)], otherwise="w4g64").rules[1]
    ('**/norm/*', None)
    """

    rules: tuple[tuple[str, QuantSpec | None], ...]
    otherwise: QuantSpec | None = None
    otherwise_name: str = ""

    def __init__(
        self,
        rules: Sequence[tuple[str, QuantSpec | str | None]] = (),
        *,
        otherwise: QuantSpec | str | None = None,
    ) -> None:
        compiled = []
        for rule in rules:
            if not isinstance(rule, tuple) or len(rule) != 2 or not isinstance(rule[0], str):
                raise ValueError(f"Policy: a rule is a pair (pattern, spec), got {rule!r}.")
            compile_pattern(rule[0])
            compiled.append((rule[0], _as_spec(rule[1], rule[0])))
        object.__setattr__(self, "rules", tuple(compiled))
        object.__setattr__(self, "otherwise", _as_spec(otherwise, "otherwise"))
        name = otherwise if isinstance(otherwise, str) else "otherwise"
        object.__setattr__(self, "otherwise_name", name if otherwise is not None else "")

    def resolve(self, params: Any, sites: Sequence[Any] = ()) -> Resolved:
        """The explicit spec of every leaf of `params` (arrays or ShapeDtypeStructs).

        With the `sites` of a model, blocks lie along the axes that its products sum over, and
        the axes that a scan takes off are layers; without, names decide (see `quantjax.axes`).

        Raises ValueError for a pattern that no path matches, with the nearest names, for a block
        that does not fit a leaf, and for a leaf that is a QTensor already.
        """
        named, _ = named_leaves(params)
        for name, leaf in named:
            _refuse_quantized(name, leaf)
        return self._decide([(name, _facts(leaf)) for name, leaf in named], params, sites)

    def explain(self, tree: Any) -> Resolved:
        """As `resolve`, on a tree in which leaves may be quantized already."""
        return self._decide([(name, _facts(leaf)) for name, leaf in named_leaves(tree)[0]], tree)

    def _decide(
        self, named: list[tuple[str, Any]], tree: Any, sites: Sequence[Any] = ()
    ) -> Resolved:
        names = [name for name, _ in named]
        regexes = [(pattern, compile_pattern(pattern), spec) for pattern, spec in self.rules]
        for pattern, regex, _ in regexes:
            if not any(regex.fullmatch(name) for name in names):
                raise ValueError(
                    f"pattern {pattern!r} matches no parameter. Nearest: {nearest(pattern, names)}."
                )
        spared = other_collections(tree)
        uses = {name: [site for site in sites if site.path == name] for name in names}
        out = []
        for name, facts in named:
            found = next(((p, s) for p, regex, s in regexes if regex.fullmatch(name)), None)
            if found is not None:
                out.append((name, _resolution(name, facts, found[1], found[0], uses[name])))
                continue
            why = "no pattern matches"
            if self.otherwise is not None:
                why = _spared(name, facts, self.otherwise, spared)
            spec, label = (None, "") if why else (self.otherwise, self.otherwise_name)
            resolution = _resolution(name, facts, spec, label, uses[name])
            if spec is None and not _unfit(facts):
                resolution = dataclasses.replace(resolution, reason=why)
            out.append((name, resolution))
        return Resolved(tuple(out))


def _refuse_quantized(name: str, leaf: Any) -> None:
    if is_quantized(leaf):
        raise ValueError(
            f"{name}: is quantized already ({leaf.format}). Dequantize it first, or quantize the "
            f"float parameters."
        )


def _as_spec(spec: object, where: str) -> QuantSpec | None:
    if isinstance(spec, str):
        return preset_spec(spec)
    if isinstance(spec, QuantSpec):
        _check_act(spec, where)
        return spec
    if spec is None:
        return None
    raise ValueError(f"Policy: {where}: expected a QuantSpec, a preset name or None, got {spec!r}.")


def _check_act(spec: QuantSpec, where: str) -> None:
    """Raises ValueError for what a spec says of an activation and no product would heed."""
    if spec.static:
        raise ValueError(f"Policy: {where}: static is for activations; give it to act=.")
    act = spec.act
    if act is None:
        return
    odd = act.act is not None or act.group is not None or act.scale_format is not None
    if odd or not isinstance(act.block, Granularity) or act.rounding is not Rounding.NEAREST:
        raise ValueError(
            f"Policy: {where}: an activation is rounded to nearest with one float scale a row or a "
            f"tensor (Granularity), without an act of its own; got {act!r}."
        )


def _facts(leaf: Any) -> jax.ShapeDtypeStruct | None:
    """Shape and dtype of an array leaf; None for anything else."""
    if isinstance(leaf, np.ndarray | np.generic):  # of any byte order
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype.newbyteorder("="))
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | QTensor | FakeQuantized):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return None


def _unfit(facts: jax.ShapeDtypeStruct | None) -> str:
    """Why a leaf can not be quantized at all; empty if it can."""
    if facts is None:
        return "not an array"
    if not jnp.issubdtype(facts.dtype, jnp.floating) or jnp.dtype(facts.dtype).itemsize < 2:
        return f"{facts.dtype}, not a float of 16 bits or more"
    if len(facts.shape) == 0:
        return "a scalar"
    if 0 in facts.shape:
        return "no elements"
    return ""


def _resolution(
    name: str, facts: Any, spec: QuantSpec | None, matched: str, uses: Sequence[Any]
) -> Resolution:
    unfit = _unfit(facts)
    if unfit or spec is None:
        return Resolution(None, matched, unfit or "kept by the policy")
    if uses:
        spec, remark = block_of_sites(name, facts.shape, spec, uses), ""
    else:
        block, remark = resolve_block(name, facts.shape, spec)
        spec = spec.with_block(block)
    if facts.dtype == np.float64:
        remark = "; ".join(r for r in (remark, "float64, computed and returned as float32") if r)
    return Resolution(spec, matched, remark)


def _spared(name: str, facts: Any, spec: QuantSpec | None, collections: frozenset[str]) -> str:
    """Why `otherwise` leaves this leaf in float; empty if it does not."""
    parts = name.split("/")
    if facts is None or spec is None:
        return ""
    if parts[0] in collections:
        return f"collection {parts[0]}, not params"
    if parts[-1] in KEPT:
        return f"a {parts[-1]}; name it in a rule to quantize it"
    if len(facts.shape) - spec.stacked <= 1:
        return "rank 1; name it in a rule to quantize it"
    return ""


def preset(name: str) -> Policy:
    """A whole policy by name: w{bits}[g{group}][a{bits}], nf4[g{group}], fp8, mxfp4, mxfp8,
    nvfp4, ternary, binary.

    Symmetric, one scale per output channel, or per group of so many weights of one output.
    Levels: narrow from 3 to 8 bits, half-integer for 2 and 1. Ranges: absmax from 5 bits up, the
    MSE search at 4 and below. a{bits}: activations too, one dynamic scale per row. mxfp4 and
    mxfp8: groups of 32 with E8M0 scales; nvfp4: groups of 16 with e4m3 scales and one float32
    scale above; nf4: groups of 64 unless said otherwise. Biases, normalization parameters,
    leaves of rank 1 or less and collections other than `params` stay in float.

    Raises ValueError, with the grammar, for an unknown name.

    >>> preset("w4g64").otherwise
    QuantSpec(int4, group=64, observer=mse(2, steps=100, lowest=0.02))
    """
    preset_spec(name)
    return Policy((), otherwise=name)
