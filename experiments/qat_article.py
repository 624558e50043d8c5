"""Which estimator trains the article's network in the fewest bits, weights and activations?
Run: python -m experiments.qat_article --data-dir DIR [--estimators lsq --weights w2 --publish]
Time: a row is a training of two epochs, three minutes of one core, for each learning rate that is
tried, see `seconds` there; rows that are there are not computed again, and a row that was stopped
goes on at its last epoch.
Result: results/qat_article.json, accuracy on the 10,000 test images of Fashion-MNIST and MNIST.

Fine-tunes the network that `article` trains. The second and the third layer have the row's bits,
the image, the first and the last layer 8, with learned steps. Estimators of weights alone round
activations as LSQ does. The float network is trained on for as long, by the same choice of rates.
A rate is chosen on validation images, with the first seed; the test images are seen once."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

import quantjax as qj
from experiments.activations import Config as Networks
from experiments.activations import judges
from experiments.optimizers import fine_tuning
from experiments.post_training import Judge, scored, seen
from experiments.ptq_resnet import batches
from experiments.qat_plots import estimator_figure
from experiments.report import environment
from experiments.rows import Rows
from experiments.steps import steps_per_epoch
from experiments.train import TrainConfig, TrainResult, train
from experiments.tuning import Rates, tuned, tuned_row
from experiments.ways import FEW, WAYS, Layers, parts, prepared
from quantjax import qat

LAYERS = Layers("conv1/kernel", ("conv2/kernel", "fc1/kernel"), "fc2/kernel")
REFRESH = 50  # steps between two searches of scales that are not learned


class Cell(NamedTuple):
    """One of the table: a name in WAYS, a preset, and the bits of activations, 32 for float."""

    method: str
    format: str
    activations: int


FLOAT = Cell("float", "float32", 32)


@dataclasses.dataclass(frozen=True)
class Config:
    """networks: the data sets. estimators: names in WAYS. activations: their bits, 32 for float.
    rates: what is tried with the first seed. seeds: of the training, and of what `article` trained.
    out: where trained networks lie as well; publish: results go to experiments/results instead."""

    data_dir: Path
    networks: tuple[Literal["fashion_mnist", "mnist"], ...] = ("fashion_mnist", "mnist")
    estimators: tuple[str, ...] = tuple(WAYS)
    weights: tuple[str, ...] = FEW
    activations: tuple[Literal[32, 8, 4, 2], ...] = (32, 8, 4, 2)
    rates: tuple[float, ...] = (1e-3, 3e-3)
    epochs: int = 2
    batch_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


def straight_through(judge: Judge, params: Any, weights: str, bits: int) -> dict[str, Any]:
    """What the loop needs to train the floats themselves, through scales that follow them."""
    found = parts(LAYERS, WAYS["straight-through"], weights, bits)
    policy = qj.Policy([rule for part in found for rule in part.policy.rules])
    start = qj.quantize(params, policy)
    if bits != 32:
        start = qj.calibrate(judge.apply, params, batches(judge, seed=0), policy)

    def refresh(params: Any, quantized: Any, step: int) -> Any:
        new = qj.quantize(params, policy)["params"]
        old = quantized["params"]
        for name, layer in new.items():
            static = old[name]["kernel"].act_scale
            layer["kernel"] = dataclasses.replace(layer["kernel"], act_scale=static)
        return quantized | {"params": new}

    return {"extra": start, "refresh": refresh, "refresh_every": REFRESH, "transform": _through}


def _through(params: Any, quantized: Any) -> Any:
    return qat.prepare(params, like=quantized)


def fine_tuned(
    judge: Judge, params: Any, cell: Cell, config: Config, seed: int
) -> Callable[[float], tuple[Any, TrainResult]]:
    """Of a learning rate, the tree as it is stored, and its training. Raises NotApplicable."""
    steps = config.epochs * steps_per_epoch(len(judge.data.train_labels), config.batch_size)
    name, weights, bits = cell
    way = WAYS.get(name)
    how: dict[str, Any] = {}
    tree, apply = params, judge.apply
    if way is not None:
        apply = qj.intercept(judge.apply)
        if way.estimator is None:
            how = straight_through(judge, params, weights, bits)
        else:
            how = {"project": way.project}
            images = [] if bits == 32 else batches(judge, seed=0)
            tree = prepared(judge.apply, params, parts(LAYERS, way, weights, bits), images)

    def run(rate: float) -> tuple[Any, TrainResult]:
        adam, learned = fine_tuning(rate, steps)
        asked = TrainConfig(adam, config.epochs, config.batch_size, seed, learned)
        folder = judge.scratch / "qat" / f"{name}_{weights}_{bits}_{rate:g}x{config.epochs}"
        result = train(apply, tree, judge.data, asked, run_dir=folder, **how)
        if way is None:
            return result.params, result
        if way.estimator is None:
            return qj.quantize(result.params, like=result.extra), result
        return qat.finalize(result.params), result

    return run


def measured(
    judge: Judge, params: Any, cell: Cell, config: Config, seed: int, rates: Rates
) -> dict[str, Any]:
    """The row of the best rate, what each rate came to on the validation images, and seconds."""
    run = fine_tuned(judge, params, cell, config, seed)
    (tree, result), accuracy, tuning = tuned(rates, run, lambda x: judge.validation(seen(x[0])))
    scores, _ = judge.test(seen(tree))
    return {
        **scores,
        "validation_accuracy": accuracy,
        "start_accuracy": result.start[0].accuracy,
        "bits_per_weight": qj.summary(tree).totals.bits_per_weight,
        **tuning,
    }


def network_rows(rows: Rows, config: Config, network: str) -> None:
    """Computes the rows of one data set that are missing, one after another; the float ones first,
    and a whole table of one seed before the next."""
    asked = Networks(data_dir=config.data_dir, seeds=config.seeds, out=config.out)
    product = itertools.product(config.estimators, config.weights, config.activations)
    cells = [FLOAT, *(Cell(*cell) for cell in product)]
    chosen: dict[Hashable, float] = {}
    for seed, (judge, params) in zip(config.seeds, judges(asked, network), strict=True):
        base: dict[str, Any] = {"network": network, "seed": seed}
        key = FLOAT._replace(method="float, as it was")._asdict() | base
        untouched = functools.partial(scored, judge, params)
        print(rows.of_network(key, params, untouched, **environment()))
        for cell in cells:
            compute = functools.partial(measured, judge, params, cell, config, seed)
            tuned_row(rows, cell._asdict() | base, compute, chosen, cell, config.rates)


def main(config: Config) -> None:
    """Computes the rows that are missing; draws the figures."""
    home = Path(__file__).parent if config.publish else config.out
    head = {
        "question": (__doc__ or "").splitlines()[0],
        "epochs": config.epochs,
        "batch_size": config.batch_size,
    }
    rows = Rows(home / "results" / "qat_article.json", head)
    for network in config.networks:
        network_rows(rows, config, network)
        print(estimator_figure(rows.stored(), network, home / "figures"))


if __name__ == "__main__":
    main(tyro.cli(Config))
