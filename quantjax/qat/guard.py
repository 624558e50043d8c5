"""What if an optimizer is handed quantized parameters? It would train their scales: refuse.

A QTensor is a pytree of arrays, so `optax.adam(...).init` accepts it without a word and keeps
moments for its codes, which no gradient moves; those of a FakeQuantized would have their scales
decayed."""

from typing import Any

from quantjax.fake_quantized import is_quantized
from quantjax.paths import named_leaves


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
