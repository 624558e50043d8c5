"""The training loop every experiment shares. It grows by arguments, never by a copy.

The whole set lies on the device as uint8; an epoch is one shuffle by seed, cut into full batches.
The images left over by the cut, fewer than a batch and others each epoch, are not seen in that
epoch: every step then has one shape and one weight in the mean. On CPU a step of compiled code
runs at a time, as XLA computes a loop's body on fewer threads there; on accelerators a
`lax.scan` runs all steps up to the next refresh or the end of the epoch.

Several runs train as one program, by `vmap`: give their seeds, and their trees stacked along a
first axis. They may differ in what the trees or `extra` hold, such as the bounds of a bit width.
This pays on accelerators.

On Linux, `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment makes a step on CPU up to
twice as fast."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.progress import Progress

from experiments import checkpoint, describe, metrics
from experiments.evaluate import evaluate
from experiments.metrics import EpochRecord, Judged
from experiments.parts import Parts, check_runs, optimizer_of, run_of, split
from experiments.steps import epoch_order, segments
from quantjax import qat

Tree = Any  # a pytree of arrays


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What determines a run, beside the data, the initial parameters and the loss.

    seed: of the shuffles; several of them are as many runs at once. learned: the optimizer of what
    estimators learn (see `qat.labels`), by default that of the weights. skip: a step whose loss or
    gradient is not finite changes nothing and is counted; else it ends the run with an error."""

    optimizer: optax.GradientTransformation
    epochs: int
    batch_size: int = 64
    seed: int | tuple[int, ...] = 0
    learned: optax.GradientTransformation | None = None
    skip: bool = False

    def __post_init__(self):
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(
                f"epochs {self.epochs} must be >= 0, batch_size {self.batch_size} >= 1."
            )
        if self.seed == ():
            raise ValueError("seed: one or more are needed, got ().")

    @property
    def seeds(self) -> tuple[int, ...]:
        """One for each run."""
        return self.seed if isinstance(self.seed, tuple) else (self.seed,)

    @property
    def stacked(self) -> bool:
        """Whether trees have a first axis of runs."""
        return isinstance(self.seed, tuple)


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


class TrainResult(NamedTuple):
    """The trained tree, not transformed, with its collections; the last `extra`; the history; how
    each run was judged before its first step. Of several runs, trees are stacked."""

    params: Tree
    extra: Tree
    history: tuple[EpochRecord, ...]
    start: tuple[Judged, ...]


class TrainState(NamedTuple):
    parts: Parts
    opt_state: Tree
    step: Int[Array, "*runs"]


class StepReport(NamedTuple):
    loss: Float[Array, "steps *runs"]
    finite: Bool[Array, "steps *runs"]  # the loss and all of the gradient


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
    project: Callable | None = None,
    augment: Callable | None = None,
    order: Callable[[int], Int[np.ndarray, "steps batch"]] | None = None,
    on_epoch: Callable[[EpochRecord, Tree], None] | None = None,
    run_dir: str | Path | None = None,
    scan: bool | None = None,
    evaluation_batch: int = 1000,
) -> TrainResult:
    """Trains `params` for `config.epochs` and returns them with the history of the run.

    `apply(params, x) -> logits` is the evaluation pass on normalized images; `params` is its first
    argument: any tree of arrays, or Linen variables, of which `params` is trained and the other
    collections are state. Integers are kept. `loss_fn(params, x, y) -> (loss, updates)` defaults to
    `classification_loss` of `apply`; a model with state needs its own, for instance
    `classification_loss(training_apply(model))`.

    A tree of `qat.prepare` is trained with what its estimators learn, and keeps the scales it was
    given; `apply` is then an intercepted one. Estimators that change with the training are told how
    far it is (`qat.at`), as every tree that the loss sees.

    `transform(params)` acts on the tree inside the loss and before validation; this is where
    quantization-aware training plugs in. With `extra` it is `transform(params, extra)`, and
    `extra = refresh(params, extra, step)`, compiled apart, is called before every step whose
    number divides by `refresh_every`, the first included. `project(trained)` is what a step leaves
    of the trained parameters, such as `qat.clip_values`. `augment(key, images) -> images` changes a
    batch before it is normalized; its key is made of the seed and the number of the step alone.
    `order(epoch)` gives the examples of each step of an epoch in place of a shuffle, as many steps
    every epoch, and the same for all runs.

    The tree is judged on the validation examples before the first step, so that what cannot be
    judged fails at once, and after each epoch. `on_epoch(record, params)` follows, for each run. It
    gets the untransformed tree, whose buffers the next step reuses: copy what is to be kept.

    With `run_dir` the run is saved there after each epoch, its history in `metrics.json`. A run
    found there is resumed, bit for bit as if it had not stopped, or returned if finished; it must
    be the same run. `scan` overrides how steps are dispatched, see above. `evaluation_batch`
    examples are judged at a time.

    Raises ValueError if `params` holds QTensors, if `run_dir` holds a run of another configuration,
    data, estimator or initial parameters, if the training images do not fill a batch, or if trees
    of several runs are not stacked; FloatingPointError naming epoch and step if the loss or its
    gradient is not finite, unless such steps are skipped."""
    params = jax.tree.map(jnp.array, params)  # copies: donated below
    parts, join = split(params)
    if parts.collections and loss_fn is None:
        raise ValueError(
            f"params hold the collections {sorted(parts.collections)}, which apply leaves "
            "unchanged: pass loss_fn=classification_loss(training_apply(model)) to update them."
        )
    seeds, over_runs = config.seeds, jax.vmap if config.stacked else lambda f, *_: f
    if config.stacked:
        check_runs(params, len(seeds), "params")
        check_runs(extra, len(seeds), "extra")
    optimizer = optimizer_of(params, config.optimizer, config.learned)
    shuffle = functools.partial(epoch_order, len(data.train_labels), config.batch_size)
    order_of = shuffle if order is None else lambda seed, epoch: order(epoch)
    per_epoch = len(order_of(seeds[0], 0))
    total = max(config.epochs * per_epoch, 1)
    functions = (loss_fn, transform, refresh, refresh_every, project)
    run = _describe_run(config, data, params, functions, {"augment": augment, "order": order})
    begun = jnp.zeros(len(seeds) if config.stacked else (), jnp.int32)
    state = TrainState(parts, over_runs(optimizer.init)(parts.trainable), begun)

    def seen(state: TrainState, extra: Tree) -> Tree:
        """The tree as the model gets it."""
        tree = join(state.parts)
        if transform is not None:
            tree = transform(tree) if extra is None else transform(tree, extra)
        return qat.at(tree, state.step / total)

    def trained(state: TrainState) -> Tree:
        return over_runs(lambda s: qat.at(join(s.parts), s.step / total))(state)

    def predict(state_and_extra: tuple[TrainState, Tree], x: Array) -> Array:
        return apply(seen(*state_and_extra), x)

    def judged(state: TrainState, extra: Tree) -> tuple[Judged, ...]:
        runs = (state, extra)
        each = [run_of(runs, i) for i in range(len(seeds))] if config.stacked else [runs]
        found = (evaluate(predict, one, *validation, batch_size=evaluation_batch) for one in each)
        return tuple(Judged(loss, accuracy) for loss, accuracy, _ in found)

    folder = None if run_dir is None else Path(run_dir)
    stored = folder and _restore(folder / "checkpoint", (state, extra), run)
    validation = data.normalize(data.validation_images), data.validation_labels
    history: tuple[EpochRecord, ...] = ()
    if stored:
        (state, extra), start, history = stored
    else:
        start = judged(state, extra)
    if len(history) == config.epochs * len(seeds):
        return TrainResult(trained(state), extra, history, start)

    loss_fn = loss_fn or classification_loss(lambda tree, x: (apply(tree, x), {}))
    scan = jax.default_backend() != "cpu" if scan is None else scan
    keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
    keys = keys if config.stacked else keys[0]
    step = _step(loss_fn, seen, optimizer, data.normalize, project, augment, skip=config.skip)
    advance = _compile(over_runs(step, (0, 0, 0, None, None, 0)), scan=scan)
    # Its results share no buffer with the state.
    refresh = refresh and jax.jit(over_runs(refresh, (0, 0, None)))
    images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
    with _progress() as progress:
        task = progress.add_task("epoch 1", total=config.epochs * per_epoch)
        for epoch in range(len(history) // len(seeds), config.epochs):
            began = time.perf_counter()
            orders = [order_of(seed, epoch) for seed in seeds]
            index_of = np.stack(orders, 1) if config.stacked else orders[0]
            first_step, reports = epoch * per_epoch, []
            for first, last in segments(
                first_step, per_epoch, refresh_every if refresh else 0, scan
            ):
                if refresh and first % refresh_every == 0:
                    extra = refresh(over_runs(join)(state.parts), extra, first)
                index = index_of[first - first_step : last - first_step]
                state, report = advance(state, extra, keys, images, labels, index)
                reports.append(report)
                # One behind: dispatch does not wait.
                if not config.skip and not np.asarray(reports[-2:][0].finite).all():
                    break
                progress.update(task, completed=last)
            losses, skipped = _losses(reports, epoch, first_step, skip=config.skip)
            seconds = time.perf_counter() - began
            now = judged(state, extra)
            records = tuple(
                EpochRecord(epoch, float(losses[i]), *now[i], seconds, int(skipped[i]), i)
                for i in range(len(seeds))
            )
            history = (*history, *records)
            shown = ", ".join(f"{one.accuracy:.2%}" for one in now)
            progress.update(task, description=f"epoch {epoch + 1}, validation {shown}")
            if folder is not None:
                told = {"start": start, "history": [r._asdict() for r in history]}
                meta = {"run": run, **told}
                checkpoint.save(folder / "checkpoint", epoch, (state, extra), meta)
                metrics.write(folder, start, history)
            if on_epoch is not None:
                tree = trained(state)
                for record in records:
                    on_epoch(record, run_of(tree, record.run) if config.stacked else tree)
    return TrainResult(trained(state), extra, history, start)


def _step(loss_fn, seen, optimizer, normalize, project, augment, *, skip: bool) -> Callable:
    """(state, extra, key, images, labels, index[b]) -> (state, report) of one step of one run."""

    def step(state, extra, key, images, labels, index):
        batch = images[index]
        if augment is not None:
            batch = augment(jax.random.fold_in(key, state.step), batch)

        def objective(trainable):
            tree = seen(state._replace(parts=state.parts._replace(trainable=trainable)), extra)
            return loss_fn(tree, normalize(batch), labels[index])

        trainable, fixed, collections = state.parts
        (loss, updates), grads = jax.value_and_grad(objective, has_aux=True)(trainable)
        deltas, opt_state = optimizer.update(grads, state.opt_state, trainable)
        trainable = optax.apply_updates(trainable, deltas)
        trainable = trainable if project is None else project(trainable)
        parts = Parts(trainable, fixed, {**collections, **updates})
        finite = jnp.stack([jnp.isfinite(x).all() for x in (loss, *jax.tree.leaves(grads))]).all()
        if skip:
            after = (parts, opt_state)
            before = (state.parts, state.opt_state)
            parts, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)
        return TrainState(parts, opt_state, state.step + 1), StepReport(loss, finite)

    return step


def _compile(step: Callable, *, scan: bool) -> Callable:
    """(state, *given, order[s, ...]) -> (state, report[s]), compiled; donates state.

    Without `scan`, s must be 1."""

    def advance(state, *given):
        *same, order = given
        if not scan:
            state, report = step(state, *same, order[0])
            return state, jax.tree.map(lambda x: x[None], report)
        return jax.lax.scan(lambda s, index: step(s, *same, index), state, order)

    return jax.jit(advance, donate_argnums=0)


def _losses(
    reports: list[StepReport], epoch: int, start: int, *, skip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of each run, the mean loss of the steps that count, and the number of those that do not."""
    found = jax.tree.map(lambda *parts: np.concatenate(parts), *reports)
    losses, finite = (x.reshape(len(found.loss), -1) for x in found)
    if not skip and not finite.all():
        at, run = np.argwhere(~finite)[0]
        what = "its gradient is not finite" if np.isfinite(losses[at, run]) else "no step follows"
        raise FloatingPointError(
            f"the loss is {losses[at, run]} in epoch {epoch} at step {start + at}, and {what}: "
            "lower the learning rate, look at the batch and the scales of that step, or have such "
            "steps skipped."
        )
    totals = np.where(finite, losses, 0).sum(0, dtype=np.float64)
    counts = finite.sum(0)
    return np.where(counts, totals / np.maximum(counts, 1), np.nan), len(finite) - counts


def _describe_run(
    config: TrainConfig, data: Examples, params: Tree, functions: tuple, apart: dict[str, Any]
) -> dict:
    """What must agree for a stored run to stand for this one. apart: arguments that are younger
    than some stored runs, which have none."""
    parts = (data.train_images, data.train_labels, data.validation_images, data.validation_labels)
    return {
        "config": describe.describe(config),
        "data": {"name": data.name, "digest": describe.digest(parts)},
        "initial": describe.fingerprint(params),
        "rounding": describe.rounding(params),
        "functions": describe.describe(functions),
        **describe.describe(apart),
    }


Stored = tuple[Tree, tuple[Judged, ...], tuple[EpochRecord, ...]]


def _restore(folder: Path, like: Tree, run: dict) -> Stored | None:
    """The state that is stored there, how the run began, and its history; None if there is none."""
    meta = checkpoint.load_meta(folder)
    if meta is None:
        return None
    # As JSON has it: tuples are lists.
    if lines := describe.differences(meta["run"], json.loads(json.dumps(run))):
        raise ValueError(
            f"{folder} is of another run (stored != asked): {'; '.join(lines[:5])}. "
            "Choose another run_dir, or delete this one."
        )
    history = tuple(EpochRecord(**record) for record in meta["history"])
    start = tuple(Judged(*judged) for judged in meta["start"])
    return checkpoint.load(folder, like), start, history


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal)
