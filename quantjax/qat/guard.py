"""What if an optimizer is handed quantized parameters? It would train their scales: refuse.

A QTensor is a pytree of arrays, so `optax.adam(...).init` accepts it without a word and keeps
moments for its codes, which no gradient moves; those of a FakeQuantized would have their scales
decayed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.fake_quantized import is_quantized
from quantjax.paths import named_leaves, path_name


def refuse_quantized(params: Any, who: str = "training") -> None:
    """Raises ValueError, naming the quantized leaves of `params`; `who` opens the message.

    Integer and boolean leaves pass: step counters, masks and random keys are honest parts of
    many states, and an optimizer deals with them in its own way.
    """
    found = [(name, leaf) for name, leaf in named_leaves(params)[0] if is_quantized(leaf)]
    if found:
        shown = ", ".join(f"{name} ({leaf.format})" for name, leaf in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"{who}: expected float parameters, but these are quantized: {shown}{more}. Codes "
            f"have no gradient: train the float parameters and put fake_quantize in the loss "
            f"(qat.prepare, for activations too), or dequantize first."
        )


def guard(optimizer: Any) -> Any:
    """The same optax optimizer, whose `init` raises ValueError if the parameters hold a QTensor
    or a FakeQuantized.

    `update`, the state and the type (with or without extra arguments) are those of `optimizer`.
    To freeze quantized leaves and train others, guard the part that trains:
    `optax.masked(guard(optimizer), mask)`. Integer leaves pass, see `refuse_quantized`. Raises
    TypeError for anything but an optax `GradientTransformation`.
    """
    # Duck-typed, so that quantjax.qat needs no optax: a GradientTransformation is a named tuple.
    if not {"init", "update"} <= set(getattr(optimizer, "_fields", ())):
        raise TypeError(
            f"guard: expected an optax GradientTransformation, got {type(optimizer).__name__}. "
            f"Call its factory (optax.adam(1e-3)); for optax.MultiSteps, guard the optimizer in it."
        )
    inner = optimizer.init

    def init(params: Any) -> Any:
        refuse_quantized(params, "guard(optimizer).init")
        return inner(params)

    return optimizer._replace(init=init)


def refuse_not_finite(tree: Any, who: str = "gradient") -> None:
    """Raises FloatingPointError, naming the leaves of `tree` that hold NaN or infinity, what
    estimators learn among them; `who` opens the message.

    To stop a run at its first bad gradient: called on what a compiled step returns, outside jit,
    as only there the numbers are known; it waits for them. To go on without the step instead,
    `optax.apply_if_finite(optimizer, most)`, around whatever this room makes of an optimizer,
    leaves parameters and state as they were, counts in `state.total_notfinite`, and gives up after
    `most` such steps in a row. Raises ValueError for traced values.

    >>> refuse_not_finite({"a": {"kernel": jnp.array([1.0, jnp.nan])}})
    Traceback (most recent call last):
    FloatingPointError: gradient: not finite: a/kernel (1 of 2 numbers).
    """
    bad = []
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"{who}: refuse_not_finite looks at numbers, which are not known under jit: call "
                f"it on what the compiled step returns."
            )
        if jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact):
            count = int(np.sum(~np.isfinite(np.asarray(x).astype(np.float32))))
            if count:
                bad.append(f"{path_name(path) or 'the leaf'} ({count} of {np.size(x)} numbers)")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise FloatingPointError(f"{who}: not finite: {', '.join(bad[:5])}{more}.")
