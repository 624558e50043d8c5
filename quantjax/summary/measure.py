"""From a tree to the rows of its summary: what each leaf is, weighs and loses."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import scale_values
from quantjax.blocks import sizes
from quantjax.paths import named_leaves
from quantjax.policy import Policy, Resolution, Resolved, preset
from quantjax.qtensor import QTensor, is_qtensor
from quantjax.scales import HUGE, TINY
from quantjax.summary.report import Summary
from quantjax.summary.rows import Row
from quantjax.transform import as_float, dequantize


def summary(
    tree: Any, *, reference: Any = None, policy: Policy | Resolved | str | None = None
) -> Summary:
    """A report on every leaf of a tree, quantized or not; print it.

    reference: the float tree that `tree` came from, for the error of each leaf in dB. policy:
    what quantized it, for the pattern that matched and the reason a leaf stayed as it is; a leaf
    that is not what the policy asks for is noted. Trees of shapes work, as from
    `jax.eval_shape(partial(quantize, policy=policy), params)`, and traced ones: what needs values
    (errors, checks of scales) is then absent. As everywhere in JAX, None is no leaf.

    Raises ValueError, naming the paths, if the reference has others or other shapes, and for a
    policy that does not fit the tree.

    >>> from quantjax import quantize
    >>> w = {"kernel": jnp.eye(4), "bias": jnp.ones(4)}
    >>> print(summary(quantize(w, "w8"), policy="w8"))
    path    shape  format   block        bytes   bits  matched by
    ------  -----  -------  -----------  -----  -----  ----------
    bias    4      float32                  16  32.00
    kernel  4x4    int8     per channel     32  16.00  w8
    ------  -----  -------  -----------  -----  -----  ----------
    total                                   48  19.20
    <BLANKLINE>
    1 of 2 leaves quantized: 20 parameters in 48 B, 1.67x smaller than 80 B in float32; 16 B are
    in leaves not quantized.
    Not quantized:
      a bias; name it in a rule to quantize it: bias
    """
    named, _ = named_leaves(tree)
    references = _references(named, reference)
    decisions = _decisions(named, tree, policy)
    return Summary(
        tuple(
            _row(name, leaf, other, decision)
            for (name, leaf), other, decision in zip(named, references, decisions, strict=True)
        )
    )


def granularity(shape: tuple[int, ...], block: tuple[int | None, ...]) -> str:
    """Which elements share a scale, in words. An axis is named where it is not the usual one.

    >>> granularity((128, 32), (None, 1)), granularity((12, 128, 32), (64, 1))
    ('per channel', '12 x group 64')
    """
    lead, rank = len(shape) - len(block), len(block)
    size, length = sizes(shape, block)[lead:], shape[lead:]
    cut = [axis for axis in range(rank) if size[axis] < length[axis]]
    long = [axis for axis in range(rank) if size[axis] > 1]
    if not cut:
        text = "per tensor"
    elif not long:
        text = "per element"
    elif len(cut) == 1 and size[cut[0]] == 1:
        text = "per channel" if cut[0] == rank - 1 else f"per axis {cut[0] + lead}"
    elif len(long) == 1:
        usual = long[0] == max(rank - 2, 0)
        text = f"group {size[long[0]]}" + ("" if usual else f", axis {long[0] + lead}")
    else:
        text = "block " + "x".join(map(str, size))
    return text if math.prod(shape[:lead]) == 1 else f"{math.prod(shape[:lead])} x {text}"


def _references(named: Sequence[tuple[str, Any]], reference: Any) -> list[Any]:
    """The leaf of the reference beside each leaf; None where there is nothing to compare."""
    if reference is None:
        return [None] * len(named)
    others, _ = named_leaves(reference)
    here, there = [name for name, _ in named], [name for name, _ in others]
    if here != there:
        missing = [name for name in here if name not in set(there)][:5]
        extra = [name for name in there if name not in set(here)][:5]
        raise ValueError(
            f"summary: reference= must have the paths of the tree. Only in the tree: {missing}; "
            f"only in the reference: {extra}; in another order or number otherwise."
        )
    wrong = []
    for (name, leaf), (_, other) in zip(named, others, strict=True):
        if is_qtensor(other):
            wrong.append(f"{name}: quantized ({other.format}); the reference is the float tree")
        elif _is_array(leaf) != _is_array(other):
            wrong.append(f"{name}: {type(leaf).__name__}, in the reference {type(other).__name__}")
        elif _is_array(leaf) and leaf.shape != other.shape:
            wrong.append(f"{name}: shape {leaf.shape}, in the reference {other.shape}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"summary: reference= does not fit. {'; '.join(wrong[:5])}{more}.")
    return [other for _, other in others]


def _decisions(
    named: Sequence[tuple[str, Any]], tree: Any, policy: Policy | Resolved | str | None
) -> Sequence[Resolution | None]:
    if policy is None:
        return [None] * len(named)
    policy = preset(policy) if isinstance(policy, str) else policy
    return [resolution for _, resolution in policy.explain(tree).leaves]


def _is_array(leaf: Any) -> bool:
    """Whether it has a shape and a dtype, with or without values."""
    if isinstance(leaf, QTensor):  # jax.tree.map may have put anything in place of its arrays
        return leaf.qvalue is not None and all(map(_is_array, jax.tree.leaves(leaf)))
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _has_values(leaf: Any) -> bool:
    return not any(
        isinstance(a, jax.core.Tracer | jax.ShapeDtypeStruct) for a in jax.tree.leaves(leaf)
    )


def _row(name: str, leaf: Any, reference: Any, decision: Resolution | None) -> Row:
    matched = "" if decision is None else decision.matched
    if not _is_array(leaf):
        kind = type(leaf).__name__
        if isinstance(leaf, QTensor):
            inside = sorted({type(a).__name__ for a in jax.tree.leaves(leaf)})
            kind = f"{kind} of {', '.join(inside) or 'nothing'}"
        return Row(path=name, matched=matched, note=f"not an array: {kind}")
    shape, dtype = tuple(leaf.shape), str(leaf.dtype)
    float_bytes = math.prod(shape) * leaf.dtype.itemsize
    sqnr = None
    if reference is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
        sqnr = sqnr_db(reference, leaf) if _has_values((leaf, reference)) else None
    if not isinstance(leaf, QTensor):
        return Row(
            path=name,
            shape=shape,
            format=dtype,
            dtype=dtype,
            bytes=float_bytes,
            float_bytes=float_bytes,
            sqnr_db=sqnr,
            matched=matched,
            note=_note(leaf, decision),
        )
    nan, infinite, zero = _bad_scales(leaf)
    return Row(
        path=name,
        shape=shape,
        format=str(leaf.format),
        scale=_scale_format(leaf.scale),
        act="" if leaf.act is None else str(leaf.act.format),
        input_scale=leaf.input_scale is not None,
        rank=leaf.rank,
        block=leaf.block,
        granularity=granularity(shape, leaf.block),
        dtype=dtype,
        quantized=True,
        bytes=leaf.nbytes,
        float_bytes=float_bytes,
        sqnr_db=sqnr,
        nan_blocks=nan,
        infinite_blocks=infinite,
        zero_blocks=zero,
        matched=matched,
        note="; ".join(filter(None, (_note(leaf, decision), _narrowed(leaf, reference)))),
    )


def _narrowed(leaf: QTensor, reference: Any) -> str:
    wide = getattr(reference, "dtype", None) == np.float64 and leaf.dtype != np.float64
    return f"float64 in the reference, computed and returned as {leaf.dtype}" if wide else ""


def _note(leaf: Any, decision: Resolution | None) -> str:
    """Why the leaf is as it is, what was assumed, and where the policy wants something else."""
    if decision is None:
        return "" if jnp.issubdtype(leaf.dtype, jnp.floating) else f"{leaf.dtype}, not a float"
    spec = decision.spec
    if not isinstance(leaf, QTensor):
        return decision.reason if spec is None else f"not quantized; the policy asks for {spec}"
    if spec is None:
        return f"quantized, but the policy keeps it: {decision.reason}"
    notes = [decision.reason] if decision.reason else []
    above = spec.scale_spec.format if spec.scale_spec else spec.scale_format
    have = (leaf.format, leaf.act, leaf.zero_point is None, _scale_format(leaf.scale))
    want = (spec.format, spec.act, spec.symmetric, "float32" if above is None else str(above))
    if have != want:
        notes.append(f"the policy asks for {spec}")
    elif isinstance(spec.block, tuple):
        asked = granularity(leaf.shape, spec.block)
        if asked != granularity(leaf.shape, leaf.block):
            notes.append(f"the policy asks for {asked}")
    return "; ".join(notes)


def _scale_format(scale: Any) -> str:
    if scale is None:
        return ""
    return str(scale.format) if isinstance(scale, QTensor) else str(scale.dtype)


def sqnr_db(reference: Any, leaf: Any) -> float:
    """10 log10(sum x^2 / sum (x - xhat)^2) of one leaf; infinite where x equals xhat.

    xhat comes from its own program, so that no fused multiply-add changes it. Sums are float32
    along the last axis and float64 over the rest.
    """
    xhat = jnp.asarray(dequantize(leaf))
    x = jax.device_put(as_float(reference), xhat.sharding)
    signal, error = (np.asarray(e, np.float64).sum() for e in _energies(x, xhat))
    if math.isnan(signal) or math.isnan(error):
        return math.nan
    if error == 0:
        return math.inf
    ratio = signal / error  # 0 where there is no signal, or where the error is infinite
    return 10 * math.log10(ratio) if ratio else -math.inf


@jax.jit
def _energies(x: Array, xhat: Array) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    x, xhat = (jnp.atleast_1d(a).astype(jnp.float32) for a in (x, xhat))
    # Relative to the largest: squares of small numbers stay normal.
    top = jnp.clip(jnp.max(jnp.abs(x), initial=0), TINY, HUGE)
    return jnp.sum((x / top) ** 2, -1), jnp.sum(((x - xhat) / top) ** 2, -1)


@jax.jit
def _count_bad(scale: Any) -> tuple[Array, Array, Array]:
    values = scale_values(scale)
    return jnp.isnan(values).sum(), jnp.isinf(values).sum(), (values == 0).sum()


def _bad_scales(q: QTensor) -> tuple[int | None, int | None, int | None]:
    """How many blocks have a NaN, an infinite and a zero scale; None where there are no values."""
    if q.scale is None or not _has_values(q.scale):
        return None, None, None
    nan, infinite, zero = (int(n) for n in _count_bad(q.scale))
    return nan, infinite, zero
