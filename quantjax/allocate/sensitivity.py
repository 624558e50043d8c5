"""Which layer hurts, in which format? Losses by perturbation, Fisher matrix or Hessian trace, the
SQNR of products, and the weights themselves, in one report."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from quantjax.allocate.candidates import Candidates, candidates
from quantjax.allocate.distribution import Distribution, categorical
from quantjax.allocate.measures import (
    MEASURES,
    Item,
    Loss,
    Measured,
    Mode,
    Model,
    Params,
    items_of,
)
from quantjax.allocate.products import product_errors
from quantjax.allocate.report import Cell, Row, Sensitivity
from quantjax.allocate.weights import facts, forms, matrix, rounded
from quantjax.formats import is_learned
from quantjax.interpret.intercept import is_array, sites
from quantjax.interpret.once import taken_apart
from quantjax.interpret.pieces import arguments
from quantjax.observers import absmax, mse
from quantjax.paths import named_leaves
from quantjax.policy import Policy
from quantjax.qtensor import QTensor
from quantjax.transform import dequantize, quantize

WORST = 3  # layers of each format for which it is tried what clipping would gain


def sensitivity(
    apply: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    formats: Any,
    *,
    mode: Mode = Mode.FISHER,
    loss: Loss | None = None,
    distribution: Distribution = categorical,
    products: int = 1,
    key: jax.Array | None = None,
) -> Sensitivity:
    """What quantizing each layer's weights does to the loss, and why.

    For every layer of every parameter (the layers of a scan apart) and every format: the change
    of the loss and of the divergence from the float model, the SQNR of its products, what became
    of its weights. `mode` says how the loss is known: `Mode.FISHER` predicts it,
    dL = g . dw + dw' F dw / 2, from one backward pass a batch; `Mode.HESSIAN` predicts
    g . dw + tr(H) / n |dw|^2 / 2; `Mode.PERTURBATION` evaluates the model with each layer in each
    format. See `quantjax.allocate.measures`. Fisher draws one random vector a batch: many small
    batches tell more than few large ones.

    apply, batches: as in `quantjax.calibrate`. formats: preset names, QuantSpecs, Policies or None
    for float: one, a sequence, or a mapping from names of your own. loss: loss(outputs, batch),
    one number an example or their mean. Without it, the loss is the divergence from the float
    model's own outputs and no labels are needed: for trained models it ranks layers as well, and
    its slope is zero. distribution: what the outputs are, `categorical` logits or `gaussian`
    means. products: how many batches the SQNR of products is measured on, 0 for none. key: of the
    random vectors, jax.random.key(0) if not given.

    Raises ValueError for no batches, for a format that quantizes activations or that nothing
    takes, where outputs are not one array, and where a loss is NaN or infinite.

    >>> import jax.numpy as jnp
    >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> params = {
    ...     n: {"kernel": jax.random.normal(jax.random.key(i), (16, 16))}
    ...     for i, n in enumerate("ab")
    ... }
    >>> batches = jax.random.normal(jax.random.key(2), (8, 4, 16))
    >>> report = sensitivity(apply, params, list(batches), ["w4", "w8"])
    >>> report.ranking("w4")[0].cell("w4").loss > report.ranking("w8")[0].cell("w8").loss
    True
    """
    if is_array(batches) or isinstance(batches, Mapping | str):
        raise TypeError(
            f"sensitivity: batches must be an iterable of batches, got one "
            f"{type(batches).__name__}; a single batch is [batch]."
        )
    batches = iter(batches)
    seen = list(itertools.islice(batches, max(products, 1)))
    if not seen:
        raise ValueError("sensitivity: expected at least one batch, got none.")
    found = sites(apply, params, *arguments(seen[0]))
    options = candidates(params, formats, found)
    model, arrays = _model(apply, params, options, loss, distribution)
    key = jax.random.key(0) if key is None else key

    gather = MEASURES[mode](model, arrays, tuple(options.layers.items()), options.labels)
    count = examples = 0
    for count, batch in enumerate(itertools.chain(seen, batches), start=1):
        n = _examples(model, arrays, batch)
        gather.add(options.leaves, batch, jax.random.fold_in(key, count), n)
        examples += n
    sizes = {p: arrays.leaves[p].size // math.prod(s) for p, s in options.layers.items()}
    measured = gather.result(sizes)
    _check_finite(options, measured)
    errors = _product_errors(apply, params, options, seen[:products])
    rows = _rows(params, options, forms(options.layers, tuple(found)), measured, errors)
    return Sensitivity(
        rows=rows,
        options=options.options,
        formats=options.labels,
        items=tuple(items_of(options.layers, options.labels)),
        pairs=measured.pairs,
        mode=mode,
        kept_bytes=options.kept_bytes,
        examples=examples,
        batches=count,
    )


def _model(
    apply: Callable[..., Any],
    params: Any,
    options: Candidates,
    loss: Loss | None,
    distribution: Distribution,
) -> tuple[Model, Params]:
    """The model as a function of arrays: of the leaves that any format quantizes, and the rest."""
    named, _ = named_leaves(params)
    names = [name for name, _ in named]
    double = sorted({n for n in names if names.count(n) > 1 and n in options.layers})
    if double:
        raise ValueError(f"{double[0]}: two parameters of one name can not be told apart.")
    moved = {name: jax.numpy.asarray(x) for name, x in named if name in options.layers}
    arrays, frame = taken_apart(params)
    of_arrays = [name if name in moved else None for name, x in named if is_array(x)]
    rest = [x for name, x in zip(of_arrays, arrays, strict=True) if name is None]
    return Model(apply, frame, tuple(of_arrays), loss, distribution), Params(moved, rest)


def _examples(model: Model, params: Params, batch: Any) -> int:
    """How many outputs a batch gives, each a distribution."""
    shape = jax.eval_shape(lambda p: model.outputs(p, arguments(batch)), params).shape
    return math.prod(shape[:-1])


def _check_finite(options: Candidates, measured: Measured) -> None:
    items = items_of(options.layers, options.labels)
    bad = [item for item, x in zip(items, measured.loss, strict=True) if not np.isfinite(x)]
    if bad:
        names = ", ".join(f"{item.path} in {item.format}" for item in bad[:3])
        raise ValueError(
            f"sensitivity: the loss is NaN or infinite with {names}: the float model gives such "
            f"outputs, or a batch holds NaN."
        )


def _product_errors(
    apply: Callable[..., Any], params: Any, options: Candidates, batches: list[Any]
) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """By format and layer, the SQNRs on each of the batches."""
    named, structure = named_leaves(params)
    trees = {}
    for label, leaves in options.leaves.items():
        swapped = dequantize({name: leaves.get(name, x) for name, x in named})
        trees[label] = jax.tree.unflatten(structure, [swapped[name] for name, _ in named])
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {label: {} for label in trees}
    for batch in batches:
        for label, layers in product_errors(apply, params, trees, batch).items():
            for name, pair in layers.items():
                found[label].setdefault(name, []).append(pair)
    return found


def _rows(
    params: Any,
    options: Candidates,
    forms: dict[str, Any],
    measured: Measured,
    errors: dict[str, dict[str, list[tuple[float, ...]]]],
) -> tuple[Row, ...]:
    """One row a layer, with a cell for each format."""
    named = dict(named_leaves(params)[0])
    items = items_of(options.layers, options.labels)
    at = {item: k for k, item in enumerate(items)}
    gains = _clipping_gains(named, options, items, measured.loss)
    rows = []
    for path, shape in options.layers.items():
        w = np.asarray(named[path])
        matrices = matrix(w, forms.get(path), len(shape))
        changed = {
            label: rounded(w, leaves[path], len(shape))
            for label, leaves in options.leaves.items()
            if path in leaves
        }
        for layer in range(len(matrices)):
            index = tuple(map(int, np.unravel_index(layer, shape))) if shape else ()
            name = "/".join([path, *(f"[{i}]" for i in index)])
            cells = []
            for label in options.labels:
                k = at[Item(path, layer, label)]
                pairs = errors.get(label, {}).get(name)
                local, accumulated = np.mean(pairs, 0) if pairs else (None, None)
                divergence = measured.divergence
                cells.append(
                    Cell(
                        format=label,
                        loss=float(measured.loss[k]),
                        divergence=None if divergence is None else float(divergence[k]),
                        local_db=None if local is None else float(local),
                        accumulated_db=None if accumulated is None else float(accumulated),
                        rounded=changed[label][layer] if label in changed else None,
                        clipping_gain_db=gains.get(items[k]),
                    )
                )
            gradient = measured.gradient.get(path)
            rows.append(
                Row(
                    path=path,
                    layer=index,
                    weights=facts(matrices[layer], w.shape[len(shape) :]),
                    gradient=None if gradient is None else float(gradient[layer]),
                    cells=tuple(cells),
                )
            )
    return tuple(rows)


def _clipping_gains(
    named: dict[str, Any], options: Candidates, items: list[Any], loss: np.ndarray
) -> dict[Any, float]:
    """For the worst layers of each format whose range is the largest magnitude: by how much an MSE
    search would raise the SQNR of their weights."""
    specs = {(o.path, o.format): o.spec for o in options.options}
    gains = {}
    for label in options.labels:
        order = sorted(
            (k for k, item in enumerate(items) if item.format == label), key=lambda k: -loss[k]
        )
        for k in order[:WORST]:
            path, layer, _ = items[k]
            spec = specs[path, label]
            if spec is None or spec.observer != absmax() or not _searchable(spec):
                continue
            searched = dataclasses.replace(spec, observer=mse())
            tree = quantize({"w": named[path]}, Policy([("w", searched)]))
            q: QTensor = tree["w"]
            w, layers = np.asarray(named[path]), spec.stacked
            before = rounded(w, options.leaves[label][path], layers)[layer].sqnr_db
            gains[items[k]] = rounded(w, q, layers)[layer].sqnr_db - before
    return gains


def _searchable(spec: Any) -> bool:
    return not is_learned(spec.format) and spec.scale_format is None
