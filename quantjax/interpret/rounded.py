"""How is the activation that meets a parameter rounded at a product? As its leaf says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax import lax

from quantjax.affine import Scales
from quantjax.interpret.param import Param
from quantjax.interpret.trained import Trained
from quantjax.ops import fake_activation
from quantjax.qtensor import QTensor
from quantjax.spec import QuantSpec


class Rounded(NamedTuple):
    """How the activation that meets a parameter is rounded; `given` are its static scales. rule: in
    training, what rounds it instead, rule(x, given, spec, summed, key), where `given` may also be
    what an estimator learns of it, by name."""

    spec: QuantSpec
    given: Scales | Mapping[str, Any] | None
    rule: Callable[..., Any] | None = None
    key: Any = None

    def fake(self, x: Any, summed: Sequence[int]) -> Any:
        """x as the product sees it, in floats."""
        if self.rule is not None:
            return self.rule(x, self.given, self.spec, summed, self.key)
        assert not isinstance(self.given, Mapping)
        return fake_activation(x, self.spec, self.given, summed)

    def __str__(self) -> str:
        how = str(self.spec.format) if self.spec.symmetric else f"{self.spec.format} asymmetric"
        if isinstance(self.given, Scales) and self.given.thresholds is not None:
            how = f"{how} by thresholds"
        return f"{how}, static" if self.given else how


def keeps_floats(eqn: Any) -> bool:
    """Whether the model asks for the highest precision of a product."""
    precision = eqn.params.get("precision")
    return lax.Precision.HIGHEST in (precision if isinstance(precision, tuple) else (precision,))


def rounded_activation(eqn: Any, x: Param) -> Rounded | None:
    """Not at all where the model asks for the highest precision. Raises ValueError, naming the
    parameter, where the scale is static and was never found."""
    q = x.value if isinstance(x.value, QTensor) else x.trained
    if q is None or q.act is None or keeps_floats(eqn):
        return None
    own = (q.rule, q.key) if isinstance(q, Trained) else (None, None)
    if isinstance(q, Trained) and q.learned is not None:
        for name, a in q.learned.items():
            if a.ndim == q.layers:
                _check_single(x.path, f"learned {name} of its activation", a)
        return Rounded(q.act, q.learned, *own)
    if q.act_scale is None:
        if q.act.static:
            raise ValueError(
                f"{x.path}: the scale of its activation is static, but was not found yet: pass the "
                f"policy to quantjax.calibrate with some batches, or give the activation "
                f"static=False."
            )
        return Rounded(q.act, None, *own)
    _check_single(x.path, "activation scale", q.act_scale)
    thresholds = q.act_thresholds if isinstance(q, QTensor) else None
    return Rounded(q.act, Scales(q.act_scale, q.act_zero_point, thresholds=thresholds), *own)


def _check_single(path: str, what: str, a: Any) -> None:
    if a.shape:
        raise ValueError(
            f"{path}: expected one {what} at this product, got {a.shape}: its leading axes are "
            f"layers, but no scan or index takes them off."
        )
