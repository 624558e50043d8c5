"""How does a user teach the evaluator an operation? One function, registered by operand types."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from quantjax.interpret.param import Param, as_qtensor
from quantjax.qtensor import QTensor

Types = tuple[type, ...]
_RULES: dict[str, dict[Types, Callable[..., Any]]] = {}


def register_rule(primitive: Primitive, *types: type) -> Callable[[Callable], Callable]:
    """Decorates `rule(*operands, **params)`, to stand for a primitive on these operand types.

    types: `jax.Array` or `QTensor` for each operand, at least one of them QTensor. A QTensor comes
    in the layout in which the model uses it. params: those of the primitive. The rule returns the
    output, or a list of them where the primitive has several. It comes before the rules of
    quantjax; the last one registered for the same types holds.

    Raises ValueError for other types, or if none is QTensor.

    >>> import quantjax
    >>> from jax.extend.core import primitives
    >>> @register_rule(primitives.neg_p, QTensor)
    ... def negative(x):
    ...     return -quantjax.dequantize(x)
    """
    if QTensor not in types or any(t not in (jax.Array, QTensor) for t in types):
        raise ValueError(
            f"register_rule: types must be jax.Array or QTensor, one of them QTensor; got {types}."
        )

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.setdefault(primitive.name, {})[types] = rule
        return rule

    return register


def registered(name: str, inputs: Sequence[Any]) -> Callable[..., list[Any]] | None:
    """The user's rule for these inputs, to be called with the parameters; None if there is none."""
    found = _RULES.get(name)
    if not found:
        return None
    kinds = tuple(QTensor if isinstance(x, Param) and x.quantized else jax.Array for x in inputs)
    rule = found.get(kinds)
    if rule is None:
        return None
    operands = []
    for x in inputs:
        value = x
        if isinstance(x, Param):
            value = as_qtensor(x) if x.quantized else x.array()
        if value is None:
            return None
        operands.append(value)

    def call(**params: Any) -> list[Any]:
        out = rule(*operands, **params)
        return list(out) if isinstance(out, list | tuple) else [out]

    return call
