"""Which range do the activations take that meet a parameter? Observed as the evaluator runs.

The observers are those of `quantjax.observers`, over the whole activation at each product and over
batches: Jacob et al. 2018, arXiv:1712.05877, section 3.1."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from quantjax.affine import Scales
from quantjax.blocks import whole
from quantjax.formats import IntFormat
from quantjax.interpret import jax_compat as compat
from quantjax.interpret.beside import taken_apart
from quantjax.interpret.param import Param
from quantjax.interpret.rounded import keeps_floats
from quantjax.observers import Grid, magnitude
from quantjax.paths import key_name
from quantjax.scales import scale_of_range
from quantjax.spec import QuantSpec

State = dict[str, Any]


class Met(NamedTuple):
    """A product of a parameter, its operand `side`, and an activation."""

    eqn: Any
    inputs: Sequence[Any]
    side: int

    @property
    def param(self) -> Param:
        """The parameter."""
        return self.inputs[self.side]

    @property
    def activation(self) -> Any:
        """The other operand."""
        return self.inputs[1 - self.side]


@runtime_checkable
class Watcher(Protocol):
    """Gathers something of the activations that meet one parameter, apart for each entry of its
    leading axes, `layers`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axes that scans take off."""

    def update(self, state: State, slot: jax.Array, met: Met) -> State:
        """The state after the product of the layer whose number is `slot`."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """How the activation that meets one parameter is observed: as `act` says, and with statistics
    of its own for each entry of the parameter's leading axes, `layers`.

    Its state holds, for each layer, how many products were seen (`count`), whether all they saw
    was finite (`finite`), and the state of the observer (`observed`).
    """

    act: QuantSpec
    layers: tuple[int, ...] = ()

    @property
    def grid(self) -> Grid:
        """What the observer needs to know of the quantizer."""
        return Grid(self.act.format, self.act.symmetric)

    def first(self, x: jax.Array) -> Any:
        """The observer's state after one activation."""
        return self.act.observer.update(self.act.observer.init(self.grid), whole(x), self.grid)

    def empty(self) -> State:
        """The state before the first product."""
        n = math.prod(self.layers)
        shapes = jax.eval_shape(self.first, jax.ShapeDtypeStruct((2,), np.float32))
        observed = jax.tree.map(lambda s: jnp.zeros((n, *s.shape), s.dtype), shapes)
        return {
            "count": jnp.zeros(n, jnp.int32),
            "finite": jnp.ones(n, bool),
            "observed": observed,
        }

    def update(self, state: State, slot: jax.Array, met: Met) -> State:
        """The state after the product of one layer."""
        if keeps_floats(met.eqn):
            return state
        met_codes = taken_apart(*met).activation  # scaled, where the leaf has an input scale
        x = compat.gathered(lax.stop_gradient(met_codes).astype(jnp.float32))
        layer = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, slot, keepdims=False), state)

        def later() -> Any:
            return self.act.observer.update(layer["observed"], whole(x), self.grid)

        new = {
            "count": layer["count"] + np.int32(1),
            "finite": layer["finite"] & jnp.isfinite(magnitude(whole(x))),
            "observed": lax.cond(layer["count"] == 0, lambda: self.first(x), later),
        }
        return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, slot, 0), state, new)

    def scales(self, state: State) -> Scales:
        """The static scale, and zero point if asymmetric, of every layer."""
        low, high = jax.vmap(self.act.observer.finalize)(state["observed"])
        scale, zero = scale_of_range(low, high, self.act.format, symmetric=self.act.symmetric)
        if zero is not None and isinstance(self.act.format, IntFormat):
            zero = zero.astype(self.act.format.code_dtype).reshape(self.layers)
        return Scales(scale.reshape(self.layers), zero)


class Statistics:
    """What one trace gathers: `state` by path, of the parameters that `watches` names, and `seen`,
    the paths of all that meet an activation. Mutable; it lives as long as the trace."""

    def __init__(
        self, watches: Mapping[str, Watcher] | None = None, state: Mapping[str, State] | None = None
    ) -> None:
        self.watches = dict(watches or {})
        self.state = dict(state or {})
        self.seen: set[str] = set()

    def slot(self, path: str) -> jax.Array | None:
        """Where the layers of a parameter keep their statistics; None if it is not watched."""
        if path not in self.watches:
            return None
        layers = self.watches[path].layers
        return jnp.arange(math.prod(layers), dtype=jnp.int32).reshape(layers)

    def see(self, eqn: Any, inputs: Sequence[Any]) -> None:
        """Takes note of a product, and of its activation where the parameter is watched.

        Raises ValueError where a parameter of several layers is used as a whole."""
        met = _met(eqn, inputs)
        if met is None:
            return
        x = met.param
        if not keeps_floats(eqn):
            self.seen.add(x.path)
        if x.slot is None or met.activation.size == 0:
            return
        if x.slot.ndim:
            raise ValueError(
                f"{x.path}: its leading axes {x.slot.shape} are layers, with an activation scale "
                f"each, but this product uses them all at once: neither a scan nor an index takes "
                f"them off. Give the policy the sites of the model instead of stacked=."
            )
        new = self.watches[x.path].update(self.state[x.path], x.slot, met)
        self.state = {**self.state, x.path: new}


def _met(eqn: Any, inputs: Sequence[Any]) -> Met | None:
    """The parameter and the activation of a product of one each, as `products` has it."""
    used = [i for i, x in enumerate(inputs) if isinstance(x, Param)]
    dot = eqn.primitive is p.dot_general_p
    if len(used) > 1 or not (dot or used[0] == 1):
        return None
    return Met(eqn, inputs, used[0])


def empty(watches: dict[str, Watch]) -> dict[str, State]:
    """The state before the first batch."""
    return {path: watch.empty() for path, watch in watches.items()}


def restored(state: Any, expected: dict[str, State]) -> dict[str, State]:
    """A state, in whatever containers a file gave it, in those that it had.

    Raises ValueError if it is not one of these parameters and observers."""
    given = {
        tuple(map(key_name, path)): jnp.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    wanted, structure = jax.tree_util.tree_flatten_with_path(expected)
    names = [tuple(map(key_name, path)) for path, _ in wanted]
    odd = sorted("/".join(name) for name in set(names) ^ set(given))
    if not odd:
        pairs = [
            ("/".join(name), given[name], x) for name, (_, x) in zip(names, wanted, strict=True)
        ]
        odd = [name for name, a, b in pairs if (a.shape, a.dtype) != (b.shape, b.dtype)]
    if odd:
        raise ValueError(
            f"calibrate: state= is of other parameters or another observer; it differs "
            f"in {odd[:5]}."
        )
    return jax.tree.unflatten(structure, [given[name] for name in names])


def check_finite(state: dict[str, State], watches: dict[str, Watch], i: int) -> None:
    """Raises ValueError, naming parameters and batch, if an activation was not finite."""
    flags = jax.device_get({path: one["finite"] for path, one in state.items()})
    bad = [path + _layers(watches[path], ~ok) for path, ok in flags.items() if not ok.all()]
    if bad:
        raise ValueError(
            f"{', '.join(bad)}: batch {i}: the activation holds NaN or infinity; no scale covers "
            f"that."
        )


def check_reached(state: dict[str, State], watches: dict[str, Watch], met: set[str]) -> None:
    """Raises ValueError, naming parameters and layers, where nothing was observed."""
    counts = jax.device_get({path: one["count"] for path, one in state.items()})
    absent = [path for path, n in counts.items() if not n.any() and path not in met]
    if absent:
        raise ValueError(
            f"{', '.join(absent)}: the policy quantizes the activation, but the model has no "
            f"product of one with this parameter (see quantjax.sites). Give it a weight-only "
            f"spec, or None to keep it in float."
        )
    bad = [path + _layers(watches[path], n == 0) for path, n in counts.items() if not n.all()]
    if bad:
        raise ValueError(
            f"{', '.join(bad)}: no batch came to its product, so its activation has no range. "
            f"Calibrate with batches that do, or give it a weight-only spec."
        )


def _layers(watch: Watch, which: np.ndarray) -> str:
    """Names some of the layers, if there are layers."""
    if not watch.layers:
        return ""
    index = np.argwhere(which.reshape(watch.layers))
    shown = ", ".join("/".join(map(str, i)) for i in index[:5])
    return f" (layer {shown}{', ...' if len(index) > 5 else ''})"
