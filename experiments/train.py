"""The training loop every experiment shares. It grows by arguments, never by a copy.

The whole set lies on the device as uint8; an epoch is one shuffle by seed, cut into full batches.
The images left over by the cut, fewer than a batch and others each epoch, are not seen in that
epoch: every step then has one shape and one weight in the mean. On CPU a step of compiled code
runs at a time, as XLA computes a loop's body on fewer threads there; on accelerators a
`lax.scan` runs all steps up to the next refresh or the end of the epoch.

On Linux, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment makes a step on CPU up to
twice as fast."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped
from rich.console import Console
from rich.progress import Progress

from experiments import checkpoint
from quantjax.qat import guard

Tree = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What determines a run, beside the data, the initial parameters and the loss."""

    optimizer: optax.GradientTransformation
    epochs: int
    batch_size: int = 64
    seed: int = 0  # of the shuffles

    def __post_init__(self):
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(
                f"epochs {self.epochs} must be >= 0, batch_size {self.batch_size} >= 1."
            )


class Examples(Protocol):
    """What is trained on and what is judged after each epoch: images and their classes
    (`experiments.data.Dataset`), or windows of tokens and the token after each (`wikitext`)."""

    @property
    def name(self) -> str: ...
    @property
    def train_images(self) -> np.ndarray: ...
    @property
    def train_labels(self) -> np.ndarray: ...
    @property
    def validation_images(self) -> np.ndarray: ...
    @property
    def validation_labels(self) -> np.ndarray: ...
    def normalize(self, images: Any) -> Array:
        """As the model gets them."""
        ...


class EpochRecord(NamedTuple):
    """One line of a run's history. `seconds` are those of training, without the validation."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


class TrainResult(NamedTuple):
    """The trained tree, not transformed, with its collections; the last `extra`; the history."""

    params: Tree
    extra: Tree
    history: tuple[EpochRecord, ...]


class TrainState(NamedTuple):
    trainable: Tree
    collections: dict  # of a Linen tree, all but `params`: batch statistics
    opt_state: Tree


def classification_loss(forward: Callable) -> Callable:
    """Returns (params, x, y) -> (loss, updates) for `forward(params, x) -> (logits, updates)`.

    loss = mean_i -log softmax(logits_i)[y_i]; `updates` are new state collections, {} if none."""

    def loss_fn(params: Tree, x: Array, y: Array) -> tuple[Float[Array, ""], dict]:
        logits, updates = forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

    return loss_fn


def train(
    apply: Callable,
    params: Tree,
    data: Examples,
    config: TrainConfig,
    *,
    loss_fn: Callable | None = None,
    transform: Callable | None = None,
    extra: Tree = None,
    refresh: Callable | None = None,
    refresh_every: int = 1,
    on_epoch: Callable[[EpochRecord, Tree], None] | None = None,
    run_dir: str | Path | None = None,
    scan: bool | None = None,
    evaluation_batch: int = 1000,
) -> TrainResult:
    """Trains `params` for `config.epochs` and returns them with the history of the run.

    `apply(params, x) -> logits` is the evaluation pass on normalized images; `params` is its first
    argument: any tree of arrays, or Linen variables, of which `params` is trained and the other
    collections are state. `loss_fn(params, x, y) -> (loss, updates)` defaults to
    `classification_loss` of `apply`; a model with state needs its own, for instance
    `classification_loss(training_apply(model))`.

    `transform(params)` acts on the tree inside the loss and before validation; this is where
    quantization-aware training plugs in. With `extra` it is `transform(params, extra)`, and
    `extra = refresh(params, extra, step)`, compiled apart, is called before every step whose
    number divides by `refresh_every`, the first included.

    `on_epoch(record, params)` is called after each epoch. It gets the untransformed tree, whose
    buffers the next step reuses: copy what is to be kept.

    With `run_dir` the run is saved there after each epoch. A run found there is resumed, bit for
    bit as if it had not stopped, or returned if finished; it must be the same run.
    `scan` overrides how steps are dispatched, see above. `evaluation_batch` examples are judged
    at a time after each epoch.

    Raises ValueError if `params` holds quantized leaves, if `run_dir` holds a run of another
    configuration, data or initial parameters, or if the training images do not fill a batch;
    FloatingPointError naming epoch and step if the loss is not finite."""
    optimizer = guard(config.optimizer)
    trainable, collections, join = _split(jax.tree.map(jnp.array, params))  # copies: donated below
    if collections and loss_fn is None:
        raise ValueError(
            f"params hold the collections {sorted(collections)}, which apply leaves unchanged: "
            "pass loss_fn=classification_loss(training_apply(model)) to update them."
        )
    run = _describe_run(config, data, params, (loss_fn, transform, refresh, refresh_every))
    file = None if run_dir is None else Path(run_dir) / "checkpoint.npz"
    state = TrainState(trainable, collections, optimizer.init(trainable))
    history: tuple[EpochRecord, ...] = ()
    if file is not None and file.exists():
        (state, extra), history = _restore(file, (state, extra), run)
    if len(history) == config.epochs:
        return TrainResult(join(state), extra, history)

    def seen(state: TrainState, extra: Tree) -> Tree:
        """The tree as the model gets it."""
        if transform is None:
            return join(state)
        return transform(join(state)) if extra is None else transform(join(state), extra)

    def predict(state_and_extra: tuple[TrainState, Tree], x: Array) -> Array:
        return apply(seen(*state_and_extra), x)

    loss_fn = loss_fn or classification_loss(lambda tree, x: (apply(tree, x), {}))
    scan = jax.default_backend() != "cpu" if scan is None else scan
    advance = _compile(loss_fn, seen, optimizer, data.normalize, scan=scan)
    refresh = refresh and jax.jit(refresh)  # its results share no buffer with the state
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    validation = data.normalize(data.validation_images), data.validation_labels
    per_epoch = steps_per_epoch(len(labels), config.batch_size)
    with _progress() as progress:
        task = progress.add_task("epoch 1", total=config.epochs * per_epoch)
        for epoch in range(len(history), config.epochs):
            began = time.perf_counter()
            order = _epoch_order(len(labels), config, epoch)
            start, losses = epoch * per_epoch, []
            for first, last in _segments(start, per_epoch, refresh_every if refresh else 0, scan):
                if refresh and first % refresh_every == 0:
                    extra = refresh(join(state), extra, first)
                index = order[first - start : last - start]
                state, loss = advance(state, extra, images, labels, index)
                losses.append(loss)
                if not np.isfinite(losses[-2:][0]).all():  # one behind: dispatch does not wait
                    break
                progress.update(task, completed=last)
            train_loss = _finite_mean(losses, epoch, start)
            seconds = time.perf_counter() - began
            loss, accuracy, _ = evaluate(
                predict, (state, extra), *validation, batch_size=evaluation_batch
            )
            record = EpochRecord(epoch, train_loss, loss, accuracy, seconds)
            history = (*history, record)
            progress.update(task, description=f"epoch {epoch + 1}, validation {accuracy:.2%}")
            if file is not None:
                meta = {"run": run, "history": [r._asdict() for r in history]}
                checkpoint.save(file, (state, extra), meta)
            if on_epoch is not None:
                on_epoch(record, join(state))
    return TrainResult(join(state), extra, history)


def evaluate(
    apply: Callable,
    params: Tree,
    images: Shaped[Array, "n ..."] | Shaped[np.ndarray, "n ..."],
    labels: Int[Array, "n *t"] | Int[np.ndarray, "n *t"],
    *,
    batch_size: int = 1000,
) -> tuple[float, float, Int[np.ndarray, "n *t"]]:
    """Returns mean cross-entropy, accuracy and predicted classes of `apply(params, images)`.

    The last batch is filled up with images of the first to keep one shape; what it gives for them
    is dropped, so every image counts once. Compiled once per `apply`: build it outside a loop.
    A label may be one class or an array of them, as for each token of a window. Without images the
    loss and the accuracy are nan."""
    losses, predictions = [], []
    for start in range(0, len(images), batch_size):
        index = np.arange(start, min(start + batch_size, len(images)))
        filled = np.resize(index, min(batch_size, len(images)))
        filled[: len(index)] = index
        x, y = jnp.asarray(images[filled]), jnp.asarray(np.asarray(labels)[filled])
        loss, prediction = _scores(apply, params, x, y)
        losses.append(np.asarray(loss, np.float64)[: len(index)])
        predictions.append(np.asarray(prediction)[: len(index)])
    if not losses:
        return float("nan"), float("nan"), np.zeros(0, np.int32)
    predicted = np.concatenate(predictions)
    accuracy = np.mean(predicted == np.asarray(labels))
    return float(np.concatenate(losses).mean()), float(accuracy), predicted


@partial(jax.jit, static_argnums=0)
def _scores(apply: Callable, params: Tree, x: Array, y: Array) -> tuple[Array, Array]:
    logits = apply(params, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), y)
    return losses, logits.argmax(-1)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Full batches in an epoch. Raises ValueError if there is none."""
    if examples < batch_size:
        raise ValueError(f"{examples} training images do not fill a batch of {batch_size}.")
    return examples // batch_size


def _compile(loss_fn, seen, optimizer, normalize, *, scan: bool) -> Callable:
    """(state, extra, images, labels, order[s, b]) -> (state, losses[s]), compiled; donates state.

    Without `scan`, s must be 1."""

    def step(state, extra, images, labels, index):
        def objective(trainable):
            tree = seen(state._replace(trainable=trainable), extra)
            return loss_fn(tree, normalize(images[index]), labels[index])

        (loss, updates), grads = jax.value_and_grad(objective, has_aux=True)(state.trainable)
        deltas, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, deltas)
        return TrainState(trainable, {**state.collections, **updates}, opt_state), loss

    def advance(state, extra, images, labels, order):
        if not scan:
            state, loss = step(state, extra, images, labels, order[0])
            return state, loss[None]
        return jax.lax.scan(lambda s, index: step(s, extra, images, labels, index), state, order)

    return jax.jit(advance, donate_argnums=0)


def _split(params: Tree) -> tuple[Tree, dict, Callable[[TrainState], Tree]]:
    """Parts Linen variables into the trained and the rest; `join` puts a state together again."""
    if isinstance(params, Mapping) and "params" in params:
        rest = {name: tree for name, tree in params.items() if name != "params"}
        return params["params"], rest, lambda s: {"params": s.trainable, **s.collections}
    return params, {}, lambda s: s.trainable


def _epoch_order(examples: int, config: TrainConfig, epoch: int) -> np.ndarray:
    """The shuffle of one epoch, as (steps, batch). It depends on seed and epoch alone."""
    order = np.random.RandomState([config.seed, epoch]).permutation(examples).astype(np.int32)
    steps = steps_per_epoch(examples, config.batch_size)
    return order[: steps * config.batch_size].reshape(steps, config.batch_size)


def _segments(start: int, steps: int, every: int, scan: bool) -> Iterator[tuple[int, int]]:
    """Cuts the steps from `start` on into what one call runs: one step, or up to a refresh.

    >>> list(_segments(10, 5, 4, True)), list(_segments(10, 5, 0, True))
    ([(10, 12), (12, 15)], [(10, 15)])
    """
    stop = start + steps
    while start < stop:
        length = 1 if not scan else every - start % every if every else steps
        yield start, min(start + length, stop)
        start += length


def _finite_mean(losses: list[Array], epoch: int, start: int) -> float:
    values = np.concatenate(losses)
    if bad := np.flatnonzero(~np.isfinite(values)).tolist():
        raise FloatingPointError(
            f"the loss is {values[bad[0]]} in epoch {epoch} at step {start + bad[0]}: lower the "
            "learning rate, or look at the batch and the scales of that step."
        )
    return float(values.mean(dtype=np.float64))


def _describe_run(config: TrainConfig, data: Examples, params: Tree, functions: tuple) -> dict:
    """What must agree for a stored run to stand for this one."""
    parts = (data.train_images, data.train_labels, data.validation_images, data.validation_labels)
    return {
        "config": checkpoint.describe(config),
        "data": {"name": data.name, "digest": checkpoint.digest(parts)},
        "initial": checkpoint.fingerprint(params),
        "functions": checkpoint.describe(functions),
    }


def _restore(file: Path, like: Tree, run: dict) -> tuple[Tree, tuple[EpochRecord, ...]]:
    meta = checkpoint.load_meta(file)
    if lines := checkpoint.differences(meta["run"], run):
        raise ValueError(
            f"{file} is of another run (stored != asked): {'; '.join(lines[:5])}. "
            "Choose another run_dir, or delete this one."
        )
    return checkpoint.load(file, like), tuple(EpochRecord(**r) for r in meta["history"])


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal)
