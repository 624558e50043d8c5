"""What if weights jump to and fro between two levels? Draw them to a level, or hold them there.

Nagel, Fournarakis, Bondarenko and Blankevoort, "Overcoming Oscillations in Quantization-Aware
Training", ICML 2022, arXiv:2203.11086, sections 4.1 and 4.2; frozen codes are as in the authors'
code."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.affine import Scales, decoded, encoded
from quantjax.fake_quantized import FakeQuantized, fake_array, rounded_value
from quantjax.formats import IntFormat
from quantjax.paths import named_leaves
from quantjax.qat.optional import need_optax


class Oscillation(NamedTuple):
    """Of the codes of one leaf, and of its shape: code, as it is now; direction of its last change,
    -1, 0 or 1; frequency, a running mean of how often it turned round; mean, one of the codes;
    frozen."""

    code: jax.Array
    direction: jax.Array
    frequency: jax.Array
    mean: jax.Array
    frozen: jax.Array


class FreezeState(NamedTuple):
    """inner: the state of the optimizer; step; leaves: an `Oscillation` by path."""

    inner: Any
    step: jax.Array
    leaves: dict[str, Oscillation]


def dampening(tree: Any) -> jax.Array:
    """sum |stop(D(Q(w))) - clip(w, s n, s p)|^2 over all FakeQuantized leaves, n and p the
    outermost levels: draws weights to the middle of their cells, where they do not oscillate.

    To be added to the loss, times a factor, which the paper lets grow as training goes on, as
    `optax.cosine_decay_schedule` of the steps that are left. The gradient to a weight is
    2 (w - D(Q(w))) in the grid and 0 beyond; none reaches scales. float32. Raises ValueError,
    naming the leaf, as `freeze_oscillations` does. Source: Nagel et al. 2022, arXiv:2203.11086.

    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.array([[3.0], [-0.8]])}, "w3", estimator=qat.lsq())
    >>> tree = jax.tree.map(lambda x: x * 0 + 1 if x.shape == (1, 1) else x, tree)  # a step of 1
    >>> round(float(dampening(tree)), 3)
    0.04
    """
    total = jnp.float32(0)
    for name, x in named_leaves(tree)[0]:
        if not isinstance(x, FakeQuantized):
            continue
        format, scales = _grid(name, x)
        w = x.value.astype(jnp.float32)
        block = x.spec.block_shape
        ends = (jnp.full(x.shape, np.float32(q)) for q in (format.qmin, format.qmax))
        low, high = (decoded(q, scales, format, block, np.dtype(np.float32)) for q in ends)
        rounded = fake_array(x).astype(jnp.float32)
        clipped = jnp.clip(w, *jax.lax.stop_gradient((low, high)))
        total += jnp.sum((jax.lax.stop_gradient(rounded) - clipped) ** 2)
    return total


def freeze_oscillations(
    optimizer: Any, threshold: float | Callable[[Any], Any], momentum: float = 0.01
) -> Any:
    """The same optax optimizer, which holds weights whose codes oscillate where they mostly were.

    A code oscillates in a step in which it changes against its last change:
    f <- m o + (1 - m) f, m = `momentum`. A weight with f > `threshold` is frozen for good: its code
    is the rounded running mean of its codes until then, whatever the scale does later, and its
    gradient is 0 in what `optimizer` sees. threshold: a number, or a schedule of optax over the
    steps; the paper lets it fall along a cosine, from 0.04 or so to 0.01.

    For trees of FakeQuantized leaves as parameters, all leaves of them; outermost, around
    `optax.partition(..., qat.labels)`, `prune.masked` and all else. `update` needs the parameters.
    The state is a `FreezeState`, and `state.leaves[path].frozen` says which are held; where
    `optax.apply_if_finite` stands around it, a step that is skipped counts nothing.

    init raises ValueError, naming the leaf, for formats that are not integers, and for estimators
    that round something made of the weight, as `dorefa` does: what is held would not be the code.
    Raises ValueError for a momentum outside (0, 1] or a threshold below 0; TypeError for anything
    but an optax GradientTransformation; ImportError without optax.
    Source: Nagel et al. 2022, arXiv:2203.11086, algorithm 1.

    >>> import optax
    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.ones((4, 2))}, "w3", estimator=qat.lsq())
    >>> fall = optax.cosine_decay_schedule(0.04, 1000, alpha=0.25)
    >>> optimizer = freeze_oscillations(optax.sgd(0.1), fall)
    >>> optimizer.init(tree).leaves["kernel"].frozen.any()
    Array(False, dtype=bool)
    """
    optax = need_optax("freeze_oscillations")
    if not 0 < momentum <= 1 or (not callable(threshold) and threshold < 0):
        raise ValueError(
            f"freeze_oscillations: momentum must lie in (0, 1] and threshold be at least 0, got "
            f"{momentum} and {threshold}."
        )
    if not {"init", "update"} <= set(getattr(optimizer, "_fields", ())):
        raise TypeError(
            f"freeze_oscillations: expected an optax GradientTransformation, got "
            f"{type(optimizer).__name__}. Call its factory, as in optax.adam(1e-3)."
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> FreezeState:
        leaves = {
            name: _begun(name, x)
            for name, x in named_leaves(params)[0]
            if isinstance(x, FakeQuantized)
        }
        if not leaves:
            raise ValueError(
                "freeze_oscillations: no leaf of the parameters is FakeQuantized: train a tree of "
                "qat.prepare."
            )
        return FreezeState(inner.init(params), jnp.zeros((), jnp.int32), leaves)

    def update(
        updates: Any, state: FreezeState, params: Any = None, **extra: Any
    ) -> tuple[Any, FreezeState]:
        if params is None:
            raise ValueError(
                "freeze_oscillations: update needs the parameters: update(grads, state, params)."
            )
        frozen = {name: own.frozen for name, own in state.leaves.items()}
        updates = _with_values(updates, lambda name, g: jnp.where(frozen[name], 0, g))
        updates, after = inner.update(updates, state.inner, params, **extra)
        limit = threshold(state.step) if callable(threshold) else threshold
        leaves, held = {}, {}
        before = dict(named_leaves(params)[0])
        for name, x in named_leaves(optax.apply_updates(params, updates))[0]:
            if not isinstance(x, FakeQuantized):
                continue
            format, scales = _grid(name, x)
            old, code = state.leaves[name], _codes(x, format, scales)
            new = _observed(old, code, momentum, limit)
            level = decoded(new.code, scales, format, x.spec.block_shape, x.dtype)
            leaves[name], held[name] = new, level - before[name].value
        updates = _with_values(
            updates, lambda name, u: jnp.where(leaves[name].frozen, held[name], u)
        )
        return updates, FreezeState(after, state.step + 1, leaves)

    return optax.GradientTransformationExtraArgs(init, update)


def _begun(name: str, x: FakeQuantized) -> Oscillation:
    format, scales = _grid(name, x)
    code = _codes(x, format, scales)
    zeros = jnp.zeros(x.shape, jnp.float32)
    return Oscillation(
        code.astype(format.code_dtype), zeros.astype(jnp.int8), zeros, code, zeros.astype(bool)
    )


def _observed(old: Oscillation, code: jax.Array, momentum: float, limit: Any) -> Oscillation:
    """After a step that would lead to these codes."""
    last = old.code.astype(jnp.float32)
    code = jnp.where(old.frozen, last, code)
    turn = jnp.sign(code - last)
    oscillates = (turn * old.direction.astype(jnp.float32)) < 0
    m = np.float32(momentum)
    frequency = m * oscillates + (1 - m) * old.frequency
    new = (frequency > limit) & ~old.frozen
    kept = jnp.where(new, jnp.round(old.mean), code)
    return Oscillation(
        kept.astype(old.code.dtype),
        jnp.where(turn != 0, turn, old.direction).astype(jnp.int8),
        frequency,
        m * code + (1 - m) * old.mean,
        old.frozen | new,
    )


def _grid(name: str, x: FakeQuantized) -> tuple[IntFormat, Scales]:
    """Format and scales of a leaf whose weights are rounded as they are; else ValueError."""
    estimator = None if x.estimator is None else x.estimator.weights
    if not isinstance(x.format, IntFormat):
        raise ValueError(f"{name}: oscillations are those of integer codes, not of {x.format}.")
    if estimator is not None and not estimator.rounds_the_weight:
        raise ValueError(
            f"{name}: {type(estimator).__name__} rounds something made of the weight, and not the "
            f"weight itself, which oscillations are damped for."
        )
    return x.format, jax.lax.stop_gradient(rounded_value(x)[1])


def _codes(x: FakeQuantized, format: IntFormat, scales: Scales) -> jax.Array:
    return encoded(x.value, scales, format, x.spec.block_shape)


def _with_values(tree: Any, change: Callable[[str, jax.Array], jax.Array]) -> Any:
    """The tree with the values of its FakeQuantized leaves changed, by path."""
    named, structure = named_leaves(tree)
    leaves = [
        dataclasses.replace(x, value=change(name, x.value)) if isinstance(x, FakeQuantized) else x
        for name, x in named
    ]
    return jax.tree.unflatten(structure, leaves)
