"""How is the state of any optimizer kept in 8 bits, or 4, a number? In blocks, between its steps.
Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022, arXiv:2110.02861; Li et al.,
"Memory Efficient Optimizers with 4-bit States", 2023, arXiv:2309.01507."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quantjax.fake_quantized import is_quantized
from quantjax.paths import named_leaves, path_name
from quantjax.qat.dynamic_map import dynamic_map, linear_map
from quantjax.qat.labels import FIXED, labels
from quantjax.qat.moment import Moment, again, by_axes, by_block, has_few_maxima
from quantjax.qat.optional import need_optax

# What optax calls the sums and means of squares, and of magnitudes, in the states it has.
NONNEGATIVE = frozenset(
    {"nu", "nu_max", "n", "sum_of_squares", "grad_sum_of_squares", "e_g", "e_x", "v_row", "v_col"}
)
BLOCKS = {8: 256, 4: 128}


class QuantizedState(NamedTuple):
    """inner: the state of the optimizer, with a `Moment` for every array that is quantized. step:
    how often it was rounded, where that is stochastic, else None."""

    inner: Any
    step: jax.Array | None


def _is_moment(x: Any) -> bool:
    return isinstance(x, Moment)


def quantize_state(
    optimizer: Any,
    *,
    bits: int = 8,
    block: int | None = None,
    nonnegative: Callable[[str], bool] | None = None,
    min_size: int = 4096,
    key: jax.Array | None = None,
) -> Any:
    """The same optax optimizer, whose state takes `bits` bits a number between its steps.

    s <- Q(inner(D(s), gradient)): the arrays of the state that follow the parameters (found by
    `optax.tree_map_params`, so counts and hyperparameters are not among them) are read as floats,
    updated by `optimizer`, and rounded again, with one absmax scale for `block` elements of the
    flat array: 256 at 8 bits, 128 at 4 (the first paper took 2048). Levels: at 8 bits the dynamic
    map of Dettmers et al., its unsigned variant where a value is never negative; at 4 bits, as Li
    et al., the dynamic map and, for what is never negative, equal steps without zero, whose scale
    is the least of the maxima of the row, the column and so on, in place of a block's (where an
    array has at least 16 elements for each of its maxima).

    nonnegative: whether an array of the state is, by its path, such as '0/nu'; by default those
    that optax calls nu, sum_of_squares and the like are, and the others have signed levels, which
    serve any. A negative value among the first would become the least level. At 8 bits a mean of
    squares below 1.6e-7 of the largest in its block is zero, as in the authors' code, and the next
    step of its weight is the mean gradient over `eps`: clip gradients where they are that uneven.
    min_size: smaller
    arrays stay float, as biases and normalization parameters need it. key: rounds stochastically,
    which at 4 bits keeps a mean moving whose change is less than half a level; the noise of step t
    is that of `fold_in(key, t)`, so the state holds numbers alone and a run resumes to the same
    bits.

    Returns a `GradientTransformationExtraArgs` with a `QuantizedState`. It stands in `chain`,
    `partition`, `inject_hyperparams`, `apply_if_finite` (which keeps the state where a gradient is
    not finite, and counts) and `MultiSteps`, and around all of them but the last: its sum of
    gradients is no moment, and ValueError says so. `prune.masked` goes inside it. Arrays that
    follow the parameters but are weights themselves, as the z of `schedule_free`, would be rounded
    too. NaN in a block makes the block NaN. A sharded array is flattened, so its state is gathered.

    Of a tree of FakeQuantized leaves it takes what `optax.partition(..., qat.labels)` gives it.
    init raises ValueError, naming the leaf, for codes and given scales among the parameters, and
    for a state that is quantized already.
    Raises ValueError for bits other than 8 and 4, block or min_size below 1; TypeError for anything
    but an optax GradientTransformation; ImportError without optax.

    >>> import optax
    >>> optimizer = quantize_state(optax.adam(1e-3))
    >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
    >>> state = optimizer.init(params)
    >>> state.inner[0].nu["kernel"].q
    QTensor(udynamic8, shape=(8192,), block=256, dtype=float32)
    >>> state.inner[0].nu["bias"].dtype
    dtype('float32')
    """
    optax = need_optax("quantize_state")
    if bits not in BLOCKS:
        raise ValueError(f"quantize_state: bits must be 8 or 4, got {bits!r}.")
    block = BLOCKS[bits] if block is None else block
    for name, count in (("block", block), ("min_size", min_size)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"quantize_state: {name} must be a positive integer, got {count!r}.")
    if not {"init", "update"} <= set(getattr(optimizer, "_fields", ())):
        raise TypeError(
            f"quantize_state: expected an optax GradientTransformation, got "
            f"{type(optimizer).__name__}. Call its factory (optax.adam(1e-3)); for "
            f"optax.MultiSteps, quantize the state of the optimizer in it."
        )
    inner = optax.with_extra_args_support(optimizer)

    def keep(x: Any, never_negative: bool) -> Any:
        shaped = hasattr(x, "shape") and hasattr(x, "dtype")
        if not shaped or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if math.prod(x.shape) < min_size:
            return x
        if bits == 4 and never_negative:
            linear = linear_map(bits)
            return by_axes(x, linear) if has_few_maxima(x.shape) else by_block(x, linear, block)
        return by_block(x, dynamic_map(bits, signed=not never_negative), block)

    def init(params: Any) -> QuantizedState:
        _refuse_fixed(params)
        state = inner.init(params)
        _refuse(state, optax)
        step = None if key is None else jnp.zeros((), jnp.int32)
        copies = optax.tree_map_params(inner, _Copy, state, is_leaf=lambda _: True)
        is_nonnegative = nonnegative or _by_name(copies)

        def keep_copy(path: Any, copy: Any) -> Any:
            if not isinstance(copy, _Copy):
                return copy
            never_negative = is_nonnegative(path_name(path))
            return jax.tree.map(lambda x: keep(x, never_negative), copy.tree)

        found = jax.tree_util.tree_map_with_path(
            keep_copy, copies, is_leaf=lambda x: isinstance(x, _Copy)
        )
        return QuantizedState(found, step)

    def update(
        updates: Any, state: QuantizedState, params: Any = None, **extra: Any
    ) -> tuple[Any, QuantizedState]:
        floats = jax.tree.map(
            lambda x: x.array() if _is_moment(x) else x, state.inner, is_leaf=_is_moment
        )
        updates, after = inner.update(updates, floats, params, **extra)
        structure: Any
        moments, structure = jax.tree.flatten(state.inner, is_leaf=_is_moment)
        step_key = None
        if key is not None and state.step is not None:
            step_key = jax.random.fold_in(key, state.step)
        kept = []
        for i, (old, new) in enumerate(zip(moments, structure.flatten_up_to(after), strict=True)):
            if not _is_moment(old):
                kept.append(new)
                continue
            leaf_key = None if step_key is None else jax.random.fold_in(step_key, i)
            kept.append(again(new, old, leaf_key))
        step = None if state.step is None else state.step + 1
        return updates, QuantizedState(jax.tree.unflatten(structure, kept), step)

    return optax.GradientTransformationExtraArgs(init, update)


class _Copy:
    """A part of the state that has the structure of the parameters; no pytree, so one leaf."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree


def _by_name(copies: Any) -> Callable[[str], bool]:
    """By what optax calls an array; `v` are squares in Adafactor's state, where `v_row` is beside
    it, and differences of gradients in Adan's."""
    named = jax.tree_util.tree_leaves_with_path(copies, is_leaf=lambda x: isinstance(x, _Copy))
    paths = {path_name(path) for path, _ in named}

    def holds(path: str) -> bool:
        state, _, name = path.rpartition("/")
        return name in NONNEGATIVE or (name == "v" and f"{state}/v_row".lstrip("/") in paths)

    return holds


def _refuse_fixed(params: Any) -> None:
    """Raises ValueError for quantized leaves, unless what is not trained of them is masked out."""
    for name, leaf in named_leaves(params)[0]:
        if is_quantized(leaf) and FIXED in jax.tree.leaves(labels(leaf)):
            raise ValueError(
                f"quantize_state(optimizer).init: {name} ({leaf.format}) is quantized, and codes "
                f"and given scales are not trained. Train float parameters, or give this optimizer "
                f"the weights of the tree alone: optax.partition(..., qat.labels)."
            )


def _refuse(state: Any, optax: Any) -> None:
    """Raises ValueError for a state that is quantized, or that sums up gradients over steps."""

    def odd(x: Any) -> bool:
        return isinstance(x, Moment | optax.MultiStepsState)

    for x in jax.tree.leaves(state, is_leaf=odd):
        if isinstance(x, Moment):
            raise ValueError(f"quantize_state: the state of this optimizer is quantized: {x.q!r}.")
        if isinstance(x, optax.MultiStepsState):
            raise ValueError(
                "quantize_state: optax.MultiSteps sums up gradients in its state, and a sum that "
                "is rounded at each step loses them: optax.MultiSteps(quantize_state(adam), k)."
            )
