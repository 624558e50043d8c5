"""What does one parameter in another format do to the loss? Three ways to know.

Each gives, for every item (a layer of a parameter in a format) the change of the loss, the
divergence from the float model's outputs, and for every two items what both together add to it.
dw is what quantization changes; F = E[J' S S' J] the Fisher matrix (see `distribution`).

Perturbation evaluates the model with each item alone. The change u = S'dz of its outputs gives the
pairs u_k . u_l = dw_k' F dw_l, to first order, without evaluating one (the terms that CLADO,
arXiv:2307.05657, finds from a loss a pair).
Fisher evaluates dw' F dw / 2 from one backward pass a batch, for cotangents S r, r signs at
random, whose squared gradients have the mean F (Martens 2014, arXiv:1412.1193, section 9; its
diagonal: Theis et al. 2018, arXiv:1801.05787).
Hessian evaluates tr(H) / n |dw|^2 / 2, the trace by Hutchinson's estimate from a product with
the Hessian a batch (HAWQ-V2, Dong et al. 2019, arXiv:1911.03852)."""

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quantjax.affine import dequantize_array
from quantjax.allocate.distribution import Distribution
from quantjax.interpret.pieces import arguments
from quantjax.qtensor import QTensor

Loss = Callable[[Any, Any], Any]  # (outputs, batch) -> one number an example, or their mean
SKETCH = 8192  # outputs of one batch above this are summed in so many, with signs at random
# The sketch of n batches has the relative variance 2 / n; the diagonal's bias is about a half.
PRIOR = 8.0


class Mode(enum.Enum):
    """FISHER: one backward pass a batch. PERTURBATION: exact for each item alone, one evaluation of
    the model for each of them. HESSIAN: by the trace of the Hessian, one product with it a batch.
    """

    FISHER = "Fisher"
    PERTURBATION = "perturbation"
    HESSIAN = "Hessian trace"


class Item(NamedTuple):
    """A layer of a parameter (counted over all its leading layer axes) in a format."""

    path: str
    layer: int
    format: str


class Measured(NamedTuple):
    """By item: loss, divergence if it is known, and pairs if they are. gradient: by path the mean
    squared derivative of each layer's weights, E[F_ii] or tr(H) / n."""

    loss: Float[np.ndarray, " K"]
    divergence: Float[np.ndarray, " K"] | None
    pairs: Float[np.ndarray, "K K"] | None
    gradient: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Model:
    """`apply` as a function of the leaves that are quantized, by path; `rebuild` gives the tree.

    loss: None stands for the divergence from the float model's own outputs."""

    apply: Callable[..., Any]
    rebuild: Callable[[dict[str, Any]], Any]
    loss: Loss | None
    distribution: Distribution

    def outputs(self, leaves: dict[str, Any], args: tuple[Any, ...]) -> Array:
        """The model's outputs. Raises ValueError if they are not one array of rank 1 or more."""
        out = self.apply(self.rebuild(leaves), *args)
        if not hasattr(out, "ndim") or out.ndim == 0:
            raise ValueError(
                f"sensitivity: expected apply to return one array of outputs, such as logits, got "
                f"{jax.tree.structure(out)}; wrap it in a function that returns them."
            )
        return out.astype(jnp.float32)

    def objective(self, reference: Array, outputs: Array, batch: Any) -> Array:
        """The mean loss of a batch."""
        if self.loss is None:
            return self.distribution.divergence(reference, outputs).mean()
        return jnp.mean(self.loss(outputs, batch))


Quantized = dict[str, dict[str, QTensor]]  # by label, by path


def items_of(layers: dict[str, tuple[int, ...]], labels: tuple[str, ...]) -> list[Item]:
    """All items, in the order of every vector here."""
    return [
        Item(path, layer, label)
        for path, shape in layers.items()
        for label in labels
        for layer in range(math.prod(shape))
    ]


def by_item(
    layers: dict[str, tuple[int, ...]],
    labels: tuple[str, ...],  # as jit sorts the keys of a dict
    quantized: Quantized,
    function: Callable[[str, QTensor], Sequence[Array]],
    count: int,
) -> Float[Array, "count K"]:
    """The `count` arrays that function(path, leaf) gives for every quantized leaf, each summed over
    every layer; zero for floats."""
    parts = []
    for path, shape in layers.items():
        for label in labels:
            q = quantized[label].get(path)
            if q is None:
                parts.append(jnp.zeros((count, math.prod(shape)), jnp.float32))
            else:
                sums = [layer_sums(x, shape).reshape(-1) for x in function(path, q)]
                parts.append(jnp.stack(sums))
    return jnp.concatenate(parts, 1)


def layer_sums(x: Array, shape: tuple[int, ...]) -> Array:
    """The sum over each layer."""
    return jnp.sum(x.astype(jnp.float32), tuple(range(len(shape), x.ndim)))


class Measure(Protocol):
    """Gathers over batches what a `Measured` is made of."""

    def __init__(
        self, model: Model, layers: dict[str, tuple[int, ...]], labels: tuple[str, ...]
    ) -> None: ...

    def add(self, leaves: Any, quantized: Quantized, batch: Any, key: Array, examples: int) -> None:
        """One batch, of so many examples."""

    def result(self, sizes: dict[str, int]) -> Measured:
        """The mean over all examples; `sizes` are those of one layer of each parameter."""


class Fisher:
    """Gathers scores g . dw over batches. Mutable; it lives as long as one call."""

    def __init__(
        self, model: Model, layers: dict[str, tuple[int, ...]], labels: tuple[str, ...]
    ) -> None:
        self._model, self._layers, self._labels = model, layers, labels
        self._sums: Any = None
        self._pairs: Any = 0.0
        self._batches = self._examples = 0
        self._step = jax.jit(self._scores)

    def _scores(self, leaves: dict[str, Array], quantized: Quantized, batch: Any, key: Array):
        model, layers = self._model, self._layers
        args = arguments(batch)
        z, pull = jax.vjp(lambda p: model.outputs(p, args), leaves)
        signs = jax.random.rademacher(key, z.shape, jnp.float32)
        (g,) = pull(model.distribution.spread(z, signs))
        slope = None
        if model.loss is not None:
            (slope,) = pull(jax.grad(lambda out: model.objective(z, out, batch))(z))

        def terms(path: str, q: QTensor) -> list[Array]:
            change = dequantize_array(q).astype(jnp.float32) - leaves[path]
            along = [] if slope is None else [change * slope[path]]
            return [change * g[path], (change * g[path]) ** 2, *along]

        count = 2 if slope is None else 3
        stacked = by_item(layers, self._labels, quantized, terms, count)
        rows = {p: layer_sums(g[p] ** 2, s).reshape(-1) for p, s in layers.items()}
        return stacked, rows

    def add(self, leaves: Any, quantized: Quantized, batch: Any, key: Array, examples: int) -> None:
        """One batch."""
        stacked, rows = jax.device_get(self._step(leaves, quantized, batch, key))
        score, *others = (np.asarray(x, np.float64) for x in stacked)
        self._pairs = self._pairs + np.outer(score, score)
        if len(others) > 1:
            others[1] = others[1] * examples
        new = [*others, {p: np.asarray(x, np.float64) for p, x in rows.items()}]
        self._sums = new if self._sums is None else jax.tree.map(np.add, self._sums, new)
        self._batches, self._examples = self._batches + 1, self._examples + examples

    def result(self, sizes: dict[str, int]) -> Measured:
        """The mean over all examples."""
        n = self._examples
        pairs = self._pairs / n
        diagonal, *first, rows = self._sums
        # Both estimates of dw' F dw, each by its expected squared relative error: with few batches
        # that of the diagonal, which has next to no variance; with many that of the whole matrix.
        share = self._batches / (self._batches + PRIOR)
        divergence = (share * np.diag(pairs) + (1 - share) * diagonal / n) / 2
        loss = divergence + (first[0] / n if first else 0.0)
        return Measured(loss, divergence, pairs, {p: x / n / sizes[p] for p, x in rows.items()})


class Perturbation:
    """Gathers the outputs with each item alone. Mutable; it lives as long as one call."""

    def __init__(
        self, model: Model, layers: dict[str, tuple[int, ...]], labels: tuple[str, ...]
    ) -> None:
        self._model, self._layers, self._labels = model, layers, labels
        self._items = items_of(layers, labels)
        self._loss: Any = 0.0
        self._divergence: Any = 0.0
        self._pairs: Any = 0.0
        self._examples = 0
        self._run = jax.jit(model.outputs)
        self._compare = jax.jit(self._compared)

    def _compared(self, reference: Array, outputs: Array, batch: Any, key: Array):
        model = self._model
        change = model.distribution.half(reference, outputs - reference).reshape(-1)
        if change.size > SKETCH:
            signs = jax.random.rademacher(key, change.shape, jnp.float32)
            # Neighbours go to different sums, as the outputs of one token are not independent.
            padded = jnp.pad(change * signs, (0, -change.size % SKETCH))
            change = padded.reshape(-1, SKETCH).sum(0)
        divergence = model.distribution.divergence(reference, outputs).mean()
        now = model.objective(reference, outputs, batch)
        return now - model.objective(reference, reference, batch), divergence, change

    def add(self, leaves: Any, quantized: Quantized, batch: Any, key: Array, examples: int) -> None:
        """One batch."""
        args = arguments(batch)
        reference = self._run(leaves, args)
        found = []
        for item in self._items:
            q = quantized[item.format].get(item.path)
            swapped = leaves
            if q is not None:
                swapped = leaves | {
                    item.path: _with_layer(
                        leaves[item.path], q, item.layer, self._layers[item.path]
                    )
                }
                found.append(self._compare(reference, self._run(swapped, args), batch, key))
            else:
                found.append(self._compare(reference, reference, batch, key))
        loss, divergence, changes = (
            np.asarray(jnp.stack(x), np.float64) for x in zip(*found, strict=True)
        )
        self._loss = self._loss + loss * examples
        self._divergence = self._divergence + divergence * examples
        self._pairs = self._pairs + changes @ changes.T
        self._examples += examples

    def result(self, sizes: dict[str, int]) -> Measured:
        """The mean over all examples."""
        n = self._examples
        return Measured(self._loss / n, self._divergence / n, self._pairs / n, {})


@jax.jit
def _dequantized(q: QTensor) -> Array:
    return dequantize_array(q)


def _with_layer(w: Array, q: QTensor, layer: int, shape: tuple[int, ...]) -> Array:
    """The float leaf with one layer quantized."""
    if not shape:
        return _dequantized(q)
    at = np.unravel_index(layer, shape)
    return w.at[at].set(_dequantized(q)[at])


class Hessian:
    """Gathers the traces of the Hessian. Mutable; it lives as long as one call."""

    def __init__(
        self, model: Model, layers: dict[str, tuple[int, ...]], labels: tuple[str, ...]
    ) -> None:
        self._model, self._layers, self._labels = model, layers, labels
        self._sums: Any = None
        self._examples = 0
        self._step = jax.jit(self._traces)

    def _traces(self, leaves: dict[str, Array], quantized: Quantized, batch: Any, key: Array):
        model, layers = self._model, self._layers
        args = arguments(batch)
        reference = jax.lax.stop_gradient(model.outputs(leaves, args))

        def objective(p: dict[str, Array]) -> Array:
            return model.objective(reference, model.outputs(p, args), batch)

        keys = dict(zip(leaves, jax.random.split(key, len(leaves)), strict=True))
        v = {p: jax.random.rademacher(keys[p], x.shape, x.dtype) for p, x in leaves.items()}
        slope, product = jax.jvp(jax.grad(objective), (leaves,), (v,))
        traces = {p: layer_sums(v[p] * product[p], s).reshape(-1) for p, s in layers.items()}

        def terms(path: str, q: QTensor) -> list[Array]:
            change = dequantize_array(q).astype(jnp.float32) - leaves[path]
            return [change**2, change * slope[path]]

        squares, first = by_item(layers, self._labels, quantized, terms, 2)
        return squares, first, traces

    def add(self, leaves: Any, quantized: Quantized, batch: Any, key: Array, examples: int) -> None:
        """One batch."""
        found = jax.device_get(self._step(leaves, quantized, batch, key))
        new = jax.tree.map(lambda x: np.asarray(x, np.float64) * examples, found)
        self._sums = new if self._sums is None else jax.tree.map(np.add, self._sums, new)
        self._examples += examples

    def result(self, sizes: dict[str, int]) -> Measured:
        """The mean over all examples. A negative trace, which only noise or a saddle gives, counts
        as zero: no rounding is predicted to gain."""
        squares, first, traces = jax.tree.map(lambda x: x / self._examples, self._sums)
        mean = {p: np.maximum(x, 0.0) / sizes[p] for p, x in traces.items()}
        weight = np.concatenate([np.tile(mean[p], len(self._labels)) for p in self._layers])
        curvature = weight * squares / 2
        if self._model.loss is None:
            return Measured(curvature, curvature, None, mean)
        return Measured(first + curvature, None, None, mean)


MEASURES: dict[Mode, type[Measure]] = {
    Mode.FISHER: Fisher,
    Mode.PERTURBATION: Perturbation,
    Mode.HESSIAN: Hessian,
}
