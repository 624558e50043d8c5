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
from quantjax.interpret.once import Frame, jit_once
from quantjax.interpret.pieces import arguments
from quantjax.qtensor import QTensor

Loss = Callable[[Any, Any], Any]  # (outputs, batch) -> one number an example, or their mean
Layers = tuple[tuple[str, tuple[int, ...]], ...]  # leading axes of every leaf that is quantized
Labels = tuple[str, ...]  # of the formats
Quantized = dict[str, dict[str, QTensor]]  # by label, by path
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


class Params(NamedTuple):
    """leaves: what any format quantizes, by path; rest: the other arrays of the tree, in order."""

    leaves: dict[str, Array]
    rest: list[Array]


@dataclasses.dataclass(frozen=True)
class Model:
    """`apply` as a function of arrays; hashable, so that what is compiled for it is kept.

    frame: of the tree of parameters. names: of its arrays, where any format quantizes them. loss:
    None stands for the divergence from the float model's own outputs."""

    apply: Callable[..., Any]
    frame: Frame
    names: tuple[str | None, ...]
    loss: Loss | None
    distribution: Distribution

    def outputs(self, params: Params, args: tuple[Any, ...]) -> Array:
        """The model's outputs. Raises ValueError if they are not one array of rank 1 or more."""
        rest = iter(params.rest)
        arrays = [next(rest) if name is None else params.leaves[name] for name in self.names]
        out = self.apply(self.frame.filled(arrays), *args)
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


def items_of(layers: dict[str, tuple[int, ...]], labels: tuple[str, ...]) -> list[Item]:
    """All items, in the order of every vector here."""
    return [
        Item(path, layer, label)
        for path, shape in layers.items()
        for label in labels
        for layer in range(math.prod(shape))
    ]


def by_item(
    layers: Layers,
    labels: Labels,  # as jit sorts the keys of a dict
    quantized: Quantized,
    function: Callable[[str, QTensor], Sequence[Array]],
    count: int,
) -> Float[Array, "count K"]:
    """The `count` arrays that function(path, leaf) gives for every quantized leaf, each summed over
    every layer; zero for floats."""
    parts = []
    for path, shape in layers:
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

    def __init__(self, model: Model, params: Params, layers: Layers, labels: Labels) -> None: ...

    def add(self, quantized: Quantized, batch: Any, key: Array, examples: int) -> None:
        """One batch, of so many examples."""

    def result(self, sizes: dict[str, int]) -> Measured:
        """The mean over all examples; `sizes` are those of one layer of each parameter."""


def _scores(
    model: Model,
    layers: Layers,
    labels: Labels,
    params: Params,
    quantized: Quantized,
    batch: Any,
    key: Array,
) -> tuple[Array, dict[str, Array]]:
    """g . dw of every item and its squares by element (with the slope of a loss along dw), and the
    squares of g."""
    args = arguments(batch)
    z, pull = jax.vjp(lambda p: model.outputs(params._replace(leaves=p), args), params.leaves)
    signs = jax.random.rademacher(key, z.shape, jnp.float32)
    (g,) = pull(model.distribution.spread(z, signs))
    slope = None
    if model.loss is not None:
        (slope,) = pull(jax.grad(lambda out: model.objective(z, out, batch))(z))

    def terms(path: str, q: QTensor) -> list[Array]:
        change = dequantize_array(q).astype(jnp.float32) - params.leaves[path]
        along = [] if slope is None else [change * slope[path]]
        return [change * g[path], (change * g[path]) ** 2, *along]

    stacked = by_item(layers, labels, quantized, terms, 2 if slope is None else 3)
    return stacked, {p: layer_sums(g[p] ** 2, s).reshape(-1) for p, s in layers}


class Fisher:
    """Gathers scores g . dw over batches. Mutable; it lives as long as one call."""

    def __init__(self, model: Model, params: Params, layers: Layers, labels: Labels) -> None:
        self._sums: Any = None
        self._pairs: Any = 0.0
        self._batches = self._examples = 0
        self._step = jit_once(_scores, model, layers, labels)
        self._params = params

    def add(self, quantized: Quantized, batch: Any, key: Array, examples: int) -> None:
        """One batch."""
        stacked, rows = jax.device_get(self._step(self._params, quantized, batch, key))
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


def _compared(
    model: Model, reference: Array, outputs: Array, batch: Any, key: Array
) -> tuple[Array, Array, Array]:
    """By how much the loss is more, the divergence, and the change of the outputs in units of it,
    sketched."""
    change = model.distribution.half(reference, outputs - reference).reshape(-1)
    if change.size > SKETCH:
        signs = jax.random.rademacher(key, change.shape, jnp.float32)
        # Neighbours go to different sums, as the outputs of one token are not independent.
        padded = jnp.pad(change * signs, (0, -change.size % SKETCH))
        change = padded.reshape(-1, SKETCH).sum(0)
    divergence = model.distribution.divergence(reference, outputs).mean()
    now = model.objective(reference, outputs, batch)
    return now - model.objective(reference, reference, batch), divergence, change


class Perturbation:
    """Gathers the outputs with each item alone. Mutable; it lives as long as one call."""

    def __init__(self, model: Model, params: Params, layers: Layers, labels: Labels) -> None:
        self._params, self._layers = params, dict(layers)
        self._items = items_of(self._layers, labels)
        self._loss: Any = 0.0
        self._divergence: Any = 0.0
        self._pairs: Any = 0.0
        self._examples = 0
        self._run = jit_once(Model.outputs, model)
        self._compare = jit_once(_compared, model)

    def add(self, quantized: Quantized, batch: Any, key: Array, examples: int) -> None:
        """One batch."""
        args, leaves = arguments(batch), self._params.leaves
        reference = self._run(self._params, args)
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
                outputs = self._run(self._params._replace(leaves=swapped), args)
                found.append(self._compare(reference, outputs, batch, key))
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


def _traces(
    model: Model,
    layers: Layers,
    labels: Labels,
    params: Params,
    quantized: Quantized,
    batch: Any,
    key: Array,
) -> tuple[Array, Array, dict[str, Array]]:
    """|dw|^2 of every item, the slope along dw, and an estimate of the trace of the Hessian."""
    args, leaves = arguments(batch), params.leaves
    reference = jax.lax.stop_gradient(model.outputs(params, args))

    def objective(p: dict[str, Array]) -> Array:
        return model.objective(reference, model.outputs(params._replace(leaves=p), args), batch)

    keys = dict(zip(leaves, jax.random.split(key, len(leaves)), strict=True))
    v = {p: jax.random.rademacher(keys[p], x.shape, x.dtype) for p, x in leaves.items()}
    slope, product = jax.jvp(jax.grad(objective), (leaves,), (v,))
    traces = {p: layer_sums(v[p] * product[p], s).reshape(-1) for p, s in layers}

    def terms(path: str, q: QTensor) -> list[Array]:
        change = dequantize_array(q).astype(jnp.float32) - leaves[path]
        return [change**2, change * slope[path]]

    squares, first = by_item(layers, labels, quantized, terms, 2)
    return squares, first, traces


class Hessian:
    """Gathers the traces of the Hessian. Mutable; it lives as long as one call."""

    def __init__(self, model: Model, params: Params, layers: Layers, labels: Labels) -> None:
        self._params, self._layers, self._labels = params, layers, labels
        self._has_loss = model.loss is not None
        self._sums: Any = None
        self._examples = 0
        self._step = jit_once(_traces, model, layers, labels)

    def add(self, quantized: Quantized, batch: Any, key: Array, examples: int) -> None:
        """One batch."""
        found = jax.device_get(self._step(self._params, quantized, batch, key))
        new = jax.tree.map(lambda x: np.asarray(x, np.float64) * examples, found)
        self._sums = new if self._sums is None else jax.tree.map(np.add, self._sums, new)
        self._examples += examples

    def result(self, sizes: dict[str, int]) -> Measured:
        """The mean over all examples. A negative trace, which only noise or a saddle gives, counts
        as zero: no rounding is predicted to gain."""
        squares, first, traces = jax.tree.map(lambda x: x / self._examples, self._sums)
        mean = {p: np.maximum(x, 0.0) / sizes[p] for p, x in traces.items()}
        weight = np.concatenate([np.tile(mean[p], len(self._labels)) for p, _ in self._layers])
        curvature = weight * squares / 2
        if self._has_loss:
            return Measured(first + curvature, None, None, mean)
        return Measured(curvature, curvature, None, mean)


MEASURES: dict[Mode, type[Measure]] = {
    Mode.FISHER: Fisher,
    Mode.PERTURBATION: Perturbation,
    Mode.HESSIAN: Hessian,
}
