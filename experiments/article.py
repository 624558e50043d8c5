"""What do bits cost the article's network, and what does training win back?
Run: python -m experiments.article [--dataset fashion_mnist --data-dir DIR --seeds 0 1 2]
Time: a minute or two on the digits; on two cores half an hour for three seeds of Fashion-MNIST.
Result: the README's tables, from results/article_<dataset>.json; figures beside them.

Trains the network, quantizes it from 8 bits to 1 with three kinds of scales, fine-tunes it through
the quantizer, saves the best of each format, reloads it and compares predictions. An interrupted
run goes on where it stopped; no file is ever half written."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import quantjax as qj
from experiments import fine_tune, plots, post_training
from experiments.data import load
from experiments.models import ArticleCNN, initialize, training_apply
from experiments.post_training import Judge, fitting, policy
from experiments.report import environment, print_table, write_json
from experiments.steps import steps_per_epoch
from experiments.tables import aggregate, table_rows
from experiments.train import (
    TrainConfig,
    TrainResult,
    classification_loss,
    train,
)

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """The defaults are the demonstration: scikit-learn's digits, one seed, a minute or two.

    optimizer: momentum is SGD with momentum 0.9; sgd is the article's plain SGD; adam decays on
    a cosine. epochs, batch_size, learning_rate and fine_tune_epochs default per dataset and
    optimizer (see `settings`). out: where results/, figures/ and checkpoints go; publish: results
    and figures go to experiments/, from where the README is made, instead."""

    dataset: str = "digits"
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0,)
    optimizer: Literal["momentum", "sgd", "adam"] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    fine_tune_epochs: int | None = None
    batch_norm: bool = False
    out: Path = Path("runs")
    publish: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was left open in `Config`, filled in."""

    optimizer: str
    epochs: int
    batch_size: int
    learning_rate: float
    fine_tune_epochs: int


def settings(config: Config) -> Settings:
    """Fills in what depends on the dataset and the optimizer. The article gives SGD, 0.01 and 10
    epochs; the rest was chosen on validation images."""
    small = config.dataset == "digits"
    optimizer = config.optimizer or ("momentum" if small else "adam")
    epochs = 10 if optimizer == "sgd" else 30 if small else 3 if config.dataset == "mnist" else 6
    rate = {"momentum": 0.05, "sgd": 0.01, "adam": 1e-3}[optimizer]
    tuning = 20 if small else 2 if config.dataset == "mnist" else 4
    return Settings(
        optimizer=optimizer,
        epochs=epochs if config.epochs is None else config.epochs,
        batch_size=config.batch_size or (32 if small else 64),
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
        fine_tune_epochs=tuning if config.fine_tune_epochs is None else config.fine_tune_epochs,
    )


def make_optimizer(config: Settings, steps: int) -> optax.GradientTransformation:
    """The optimizer of the float network."""
    if config.optimizer == "adam":
        return optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))
    momentum = 0.9 if config.optimizer == "momentum" else None
    return optax.sgd(config.learning_rate, momentum)


def trained(config: Config, chosen: Settings, seed: int) -> tuple[Judge, TrainResult]:
    """The float network of one seed, and what evaluates it. Kept on disk, so trained once."""
    data = load(config.dataset, data_dir=config.data_dir, seed=seed)
    model = ArticleCNN(batch_norm=config.batch_norm, classes=data.classes)
    # One folder for each way to train, so that another one does not meet its checkpoints.
    name = f"{chosen.optimizer}{chosen.learning_rate:g}_{chosen.epochs}x{chosen.batch_size}"
    name += "_bn" if config.batch_norm else ""
    folder = config.out / config.dataset / name / f"seed{seed}"
    steps = chosen.epochs * steps_per_epoch(len(data.train_labels), chosen.batch_size)
    console.print(f"{config.dataset}, seed {seed}: the float network, {chosen.epochs} epochs")
    result = train(
        model.apply,
        initialize(model, data.image_shape, seed=seed),
        data,
        TrainConfig(make_optimizer(chosen, steps), chosen.epochs, chosen.batch_size, seed),
        loss_fn=_loss(config, model),
        run_dir=folder,
    )
    return Judge(model, data, folder), result


def _loss(config: Config, model: nn.Module) -> Callable[..., Any] | None:
    """Without state the default serves; batch statistics need the training pass."""
    return classification_loss(training_apply(model)) if config.batch_norm else None


def run_seed(config: Config, chosen: Settings, seed: int) -> dict[str, Any]:
    """Everything for one seed, as it goes into the JSON."""
    judge, result = trained(config, chosen, seed)
    params, folder = result.params, judge.scratch
    qj.save(folder / "float.qj.safetensors", params)
    scores, _ = judge.test(params)
    float_row = {
        "format": "float32",
        "method": "trained",
        **scores,
        "validation_accuracy": judge.validation(params),
        "bytes": (folder / "float.qj.safetensors").stat().st_size,
    }
    print(article_line(float_row))

    note = f"{config.dataset}, seed {seed}"
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        say = lambda text: progress.update(task, description=f"{note}: {text}")  # noqa: E731
        make = post_training.prepare(judge, params)
        rows = post_training.quantized_rows(judge, params, make, say)
        say("sweep of S")
        sweep = post_training.sweep_scale(judge, params)
    for row in rows:
        print(article_line(row))

    tuned = {}
    ft, loss_fn = _fine_tuning(chosen), _loss(config, judge.model)
    # Training longer helps by itself: the float network is trained on as well, for comparison.
    for fmt in ("float32", *fine_tune.FORMATS) if chosen.fine_tune_epochs else ():
        console.print(f"{note}: fine-tuning {fmt}, {ft.epochs} epochs")
        rules = None if fmt == "float32" else fitting(policy(fmt, qj.mse()), params)
        tuned[fmt] = fine_tune.fine_tune(
            judge.apply, params, rules, judge.data, ft,
            seed=seed, loss_fn=loss_fn, run_dir=folder / f"{fmt}-tuned{ft.epochs}",
        )  # fmt: skip
        rows.append(judge.row(fmt, "fine-tuned", tuned[fmt], params))
        print(article_line(rows[-1]))

    def tree_of(fmt: str, method: str) -> Any:
        return tuned[fmt] if method == "fine-tuned" else make(fmt, method)

    best = [store_best(judge, params, rows, tree_of, fmt) for fmt in post_training.FORMATS]
    return {
        "seed": seed,
        "float": float_row,
        "history": [record._asdict() for record in result.history],
        "rows": rows,
        "sweep": sweep,
        "stored": best,
        "histograms": post_training.weight_histograms(params),
    }


def _fine_tuning(chosen: Settings) -> fine_tune.FineTuneConfig:
    return fine_tune.FineTuneConfig(chosen.fine_tune_epochs, batch_size=chosen.batch_size)


def store_best(
    judge: Judge, params: Any, rows: list[dict], tree_of: Callable[[str, str], Any], fmt: str
) -> dict[str, Any]:
    """Saves the best tree of a format, by validation, and evaluates it again from the file."""
    candidates = [row for row in rows if row["format"] == fmt and row["method"] in METHODS]
    best = max(candidates, key=lambda row: row["validation_accuracy"])
    tree = tree_of(fmt, best["method"])
    path = judge.scratch / f"best_{fmt}.qj.safetensors"
    qj.save(path, tree)
    _, before = judge.test(qj.dequantize(tree))
    scores, after = judge.test(qj.dequantize(qj.load(path, like=params)))
    if not np.array_equal(before, after):
        raise AssertionError(f"{path}: predictions from the file differ from those before saving.")
    return {"format": fmt, "method": best["method"], **scores, "identical_predictions": True}


METHODS = (*post_training.METHODS, "fine-tuned")


def article_line(row: dict[str, Any]) -> str:
    """The article's own line of output, headed by the row's name."""
    counts = f"({row['correct']}/{row['total']})"
    head = f"{row['format']:8s}{row['method']:22s}"
    return f"{head}Test Loss: {row['loss']:.3f} | Acc: {100 * row['accuracy']:.3f}% {counts}"


def main(config: Config) -> None:
    """Runs all seeds; prints the table; writes one JSON and the figures."""
    chosen = settings(config)
    name = f"article_{config.dataset}"
    name += "_bn" if config.batch_norm else ""
    name += "_sgd" if chosen.optimizer == "sgd" else ""
    shown = {
        k: str(v) if isinstance(v, Path) else v for k, v in (vars(config) | vars(chosen)).items()
    }
    for place in ("data_dir", "out", "publish"):  # where files lie is no part of a result
        del shown[place]
    payload = {"question": (__doc__ or "").splitlines()[0], "config": shown, **environment()}
    payload["fine_tune"] = dataclasses.asdict(_fine_tuning(chosen))
    payload["seeds"] = [run_seed(config, chosen, seed) for seed in config.seeds]
    payload["summary"] = aggregate(payload["seeds"])
    home = Path(__file__).parent if config.publish else config.out
    write_json(home / "results" / f"{name}.json", payload)
    files = plots.article_figures(payload, home / "figures", name)
    print_table(f"{config.dataset}, test split, {len(config.seeds)} seed(s)", *table_rows(payload))
    print(home / "results" / f"{name}.json", *files, sep="\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        console.print("\nInterrupted. The same command goes on where this one stopped.")
        sys.exit(130)
    except (FileNotFoundError, ValueError) as error:
        console.print(f"[red]{error}[/red]")
        sys.exit(2)
