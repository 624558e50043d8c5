"""How does a mask outlive training? Momentum, weight decay and averages move a pruned weight even
where its gradient is zero: its update and its state are zero instead.
Zhu and Gupta 2017, arXiv:1710.01878, section 3; Mishra et al. 2021, arXiv:2104.08378, section 5."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from quantjax.fake_quantized import FakeQuantized, is_quantized
from quantjax.paths import named_leaves
from quantjax.prune.apply import pruned
from quantjax.prune.select import by_name
from quantjax.qat.quantize_state import QuantizedState
from quantjax.qtensor import QTensor


def masked(optimizer: Any, masks: Any) -> Any:
    """The same optax optimizer, with weights that stay pruned: after every step they are zero to
    the bit, and so is all that its state keeps for them.

    The gradients and parameters that `optimizer` sees are zero where a mask is False, so norms that
    it takes are of the weights that are there; its updates are -p there, which takes a weight that
    is not zero yet to zero, whatever momentum or weight decay say; and leaves of its state that
    have the parameters' shapes are set to zero (`optax.tree_map_params`). The state is that of
    `optimizer`, so checkpoints are the same, and masks may change from step to step: make it anew,
    which costs nothing, in the step function, where masks may be traced.

    masks: as in `prune.apply`, for trees of floats and of FakeQuantized leaves, whose scales train
    on. `update` needs the parameters. Raises ImportError without optax, TypeError for anything but
    an optax `GradientTransformation`, ValueError for a mask that does not fit its leaf and for an
    optimizer whose state is quantized: `qat.quantize_state(masked(optimizer, masks))` it is.

    >>> import optax
    >>> w, masks = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([True, False])}
    >>> optimizer = masked(optax.adamw(0.1, weight_decay=0.5), masks)
    >>> state = optimizer.init(w)
    >>> updates, state = optimizer.update({"w": jnp.ones(2)}, state, w)
    >>> optax.apply_updates(w, updates)["w"].tolist(), state[0].mu["w"].tolist()
    ([2.750000..., 0.0], [0.1..., 0.0])
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError("prune.masked needs optax: pip install 'quantjax[qat]'.") from error
    if not {"init", "update"} <= set(getattr(optimizer, "_fields", ())):
        raise TypeError(
            f"masked: expected an optax GradientTransformation, got {type(optimizer).__name__}. "
            f"Call its factory, as in optax.adam(1e-3)."
        )
    inner = optax.with_extra_args_support(optimizer)

    def whole(x: Any) -> bool:
        return isinstance(x, QTensor | optax.MaskedNode)

    def without(state: Any, params: Any, found: dict[str, Any]) -> Any:
        """The state, with zeros for pruned weights."""
        wanted = _like(params, found)

        def one(x: Any, mask: Any) -> Any:
            own = isinstance(mask, jax.Array) and getattr(x, "shape", None) == mask.shape
            return pruned("a pruned weight's state", x, mask) if own else x

        return optax.tree_map_params(inner, one, state, wanted, is_leaf=whole)

    def init(params: Any) -> Any:
        if not jax.tree.leaves(params):  # as tree_map_params asks what the state is like
            return inner.init(params)
        found = by_name(params, masks)
        state = inner.init(_each(_kept, params, found))
        _refuse_quantized(state)
        return without(state, params, found)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("masked: update needs the parameters: update(grads, state, params).")
        _refuse_quantized(state)
        found = by_name(params, masks)
        seen = _each(_kept, params, found)
        updates, state = inner.update(_each(_kept, updates, found), state, seen, **extra)
        return _each(_kept, updates, found, params), without(state, params, found)

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse_quantized(state: Any) -> None:
    """Codes of a state in blocks have no place for a mask."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedState))
    if any(isinstance(x, QuantizedState) for x in leaves):
        raise ValueError(
            "masked: the state of this optimizer is quantized, and the zeros of pruned weights can "
            "not be set in it: put the masks inside, quantize_state(masked(optimizer, masks))."
        )


def _kept(x: jax.Array, mask: jax.Array, params: jax.Array | None) -> jax.Array:
    """x where the mask is True, elsewhere 0 or what takes the parameters there."""
    x = jnp.asarray(x)
    return jnp.where(mask, x, jnp.zeros((), x.dtype) if params is None else -params.astype(x.dtype))


def _each(change: Any, tree: Any, found: dict[str, Any], params: Any = None) -> Any:
    """A tree of floats like the parameters, changed where there are masks; of FakeQuantized leaves
    the values alone."""
    named, structure = named_leaves(tree)
    own = dict(named_leaves(params)[0])
    leaves = []
    for name, x in named:
        p = own.get(name)
        if name not in found:
            leaves.append(x)
        elif isinstance(x, FakeQuantized):
            value = change(x.value, found[name], None if p is None else p.value)
            leaves.append(dataclasses.replace(x, value=value))
        else:
            leaves.append(change(x, found[name], p))
    return jax.tree.unflatten(structure, leaves)


def _like(params: Any, found: dict[str, Any]) -> Any:
    """A tree with the parameters' structure, of masks, and True at whatever has none."""
    named, structure = named_leaves(params)
    leaves = []
    for name, x in named:
        own: Any = jax.tree.map(lambda _: True, x) if is_quantized(x) else True
        if name in found and isinstance(x, FakeQuantized):
            own = dataclasses.replace(own, value=found[name])
        leaves.append(found.get(name, own) if not is_quantized(x) else own)
    return jax.tree.unflatten(structure, leaves)
