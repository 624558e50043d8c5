"""What does a fake-quantized parameter ask of the products that use it?

The evaluator carries it as its rounded array, which any operation may transpose, slice or cast, and
this beside it, up to the products."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from quantjax.fake_quantized import FakeQuantized, fake_array
from quantjax.formats import Format
from quantjax.ops import Backward
from quantjax.spec import QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """How what meets the parameter is rounded, forward and backward; see FakeQuantized.

    act_scale, act_zero_point and key have one entry for each of the leading layers that no scan
    took off yet; what is learned leads with them. rule: how an activation is rounded instead of to
    nearest, see `Rounded`; learned: what it trains, by name, in place of the scales.
    """

    act_scale: jax.Array | None
    act_zero_point: jax.Array | None
    key: jax.Array | None
    format: Format = dataclasses.field(metadata=dict(static=True))
    act: QuantSpec | None = dataclasses.field(metadata=dict(static=True))
    backward: Backward | None = dataclasses.field(metadata=dict(static=True))
    rule: Callable[..., Any] | None = dataclasses.field(default=None, metadata=dict(static=True))
    learned: Mapping[str, jax.Array] | None = None

    @property
    def layers(self) -> int:
        """How many leading axes of what is learned are layers: one of them has no other axes."""
        return min((a.ndim for a in (self.learned or {}).values()), default=0)

    def at(self, axis: int, take: Callable[[jax.Array], jax.Array]) -> "Trained":
        """With what `take` makes of each array that has this axis of the parameter."""

        def each(a: jax.Array | None) -> Any:
            return a if a is None or a.ndim <= axis else take(a)

        key = self.key
        if key is not None and key.ndim > axis:
            key = jax.random.wrap_key_data(
                take(jax.random.key_data(key)), impl=jax.random.key_impl(key)
            )
        learned = self.learned if axis >= self.layers else jax.tree.map(take, self.learned)
        return self._each(each, key, learned)

    def stacked(self, n: int) -> "Trained":
        """With a leading axis on every array, for a scan over n layers."""

        def each(a: jax.Array | None) -> Any:
            return a if a is None or a.ndim else jnp.broadcast_to(a, (n,))

        key = self.key
        if key is not None and not key.ndim:
            key = jax.random.split(key, n)
        learned = self.learned
        if learned is not None and not self.layers:
            learned = {name: jnp.broadcast_to(a, (n, *a.shape)) for name, a in learned.items()}
        return self._each(each, key, learned)

    def _each(self, change: Callable[[Any], Any], key: Any, learned: Any) -> "Trained":
        return dataclasses.replace(
            self,
            act_scale=change(self.act_scale),
            act_zero_point=change(self.act_zero_point),
            learned=learned,
            key=key,
        )


def trained(x: FakeQuantized) -> tuple[jax.Array, Trained]:
    """Its rounded array, and what it asks of products."""
    rule = None if x.estimator is None else x.estimator.activations
    asks = Trained(
        x.act_scale, x.act_zero_point, x.key, x.format, x.spec.act, x.backward, rule,
        x.act_learned,
    )  # fmt: skip
    return fake_array(x), asks
