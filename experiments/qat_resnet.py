"""How much does a residual network lose that trains in few bits, weights and activations?
Run: python -m experiments.qat_resnet --data-dir DIR [--networks resnet20] [--publish]
Time: 100 seconds of one core an epoch of ResNet-8, float or not, of which the rows of the default
take a hundred; ResNet-20 is for accelerators. Rows that are there are not computed again, and a
training that was stopped goes on at its last epoch.
Result: results/qat_resnet.json, accuracy on the 10,000 test images of CIFAR-10, after all epochs.

MLPerf Tiny's ResNet-8, or ResNet-20, is trained in float on images that are moved and mirrored at
random. From there it trains on in the row's format, with learned steps, for as long as the float
network that it is compared with. The image, the first and the last layer keep 8 bits; with `ends`
"low" the image alone does. `distil`: beside the labels it learns from the answers of the float
network. Of several `rates` the best on 5,000 validation images, with the first seed, is taken; the
test images are seen once."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

import quantjax as qj
from experiments.augment import crop_and_flip
from experiments.data import load
from experiments.distillation import distillation_loss
from experiments.models import initialize, training_apply
from experiments.optimizers import momentum
from experiments.post_training import Judge, seen
from experiments.ptq_resnet import batches
from experiments.qat_plots import residual_figure
from experiments.report import environment
from experiments.resnet import ResNet
from experiments.rows import Rows
from experiments.steps import steps_per_epoch
from experiments.train import TrainConfig, TrainResult, classification_loss, train
from experiments.tuning import Rates, tuned, tuned_row
from experiments.ways import WAYS, Layers, parts, prepared
from quantjax import qat

Network = Literal["resnet8", "resnet20"]
LAYERS = Layers("conv1/kernel", ("layer*_*/*/kernel",), "linear/kernel")


class Recipe(NamedTuple):
    """epochs: in float from scratch; more: from there on, in every format."""

    model: ResNet
    epochs: int
    more: int


RECIPES: dict[Network, Recipe] = {
    "resnet8": Recipe(ResNet(blocks=1, projection=True), epochs=20, more=16),
    "resnet20": Recipe(ResNet(blocks=3), epochs=200, more=200),
}


class Cell(NamedTuple):
    """A name in WAYS, bits, those of the outer layers, whether the float network teaches."""

    method: str
    format: str
    ends: str = ""
    distil: bool = False


FLOAT = Cell("float", "float32")


@dataclasses.dataclass(frozen=True)
class Config:
    """estimators: names in experiments.ways. formats: bits of weights and of activations, as in
    "w4a4", or of weights alone. rate: of the first training; rates: of the second, tried with the
    first seed. epochs, more_epochs: of both, by default the network's own. out: where trainings are
    saved after each epoch; publish: results go to experiments/results instead."""

    data_dir: Path
    networks: tuple[Network, ...] = ("resnet8",)
    estimators: tuple[str, ...] = ("lsq",)
    formats: tuple[str, ...] = ("w4a4", "w3a3", "w2a2", "w1")
    ends: tuple[Literal["8 bits", "low"], ...] = ("8 bits",)
    distil: tuple[bool, ...] = (False,)
    rate: float = 0.1
    rates: tuple[float, ...] = (0.04,)
    epochs: int | None = None
    more_epochs: int | None = None
    batch_size: int = 128
    seeds: tuple[int, ...] = (0,)
    out: Path = Path("runs")
    publish: bool = False

    def recipe(self, network: Network) -> Recipe:
        """With the epochs that were asked for."""
        own = RECIPES[network]
        epochs = own.epochs if self.epochs is None else self.epochs
        return Recipe(own.model, epochs, own.more if self.more_epochs is None else self.more_epochs)


class Problem(NamedTuple):
    """A network that a seed trains, and what judges it."""

    judge: Judge
    config: Config
    network: Network
    seed: int

    def float_network(self) -> TrainResult:
        """From scratch, or as it was stored."""
        shape = self.judge.data.train_images.shape[1:]
        variables = initialize(self.judge.model, shape, seed=self.seed)
        forward = training_apply(self.judge.model)
        return self._trained(
            self.judge.apply, variables, classification_loss(forward), self.config.rate,
            self.config.recipe(self.network).epochs, "float",
        )  # fmt: skip

    def more(self, params: Any, cell: Cell) -> Callable[[float], TrainResult]:
        """Of a rate, the second training: of the trained variables in the cell's bits. Raises
        NotApplicable."""
        apply, forward = self.judge.apply, training_apply(self.judge.model)
        teacher = functools.partial(apply, params) if cell.distil else None
        tree = params
        if cell != FLOAT:
            weights, bits = bits_of(cell.format)
            found = parts(LAYERS, WAYS[cell.method], weights, bits, low=cell.ends == "low")
            images = [] if bits == 32 else batches(self.judge, seed=0)
            tree = prepared(apply, params, found, images)
            apply, forward = qj.intercept(apply), qj.intercept(forward)
        loss = distillation_loss(forward, teacher) if teacher else classification_loss(forward)
        epochs = self.config.recipe(self.network).more
        name = "_".join(map(str, cell)).replace(" ", "")

        def run(rate: float) -> TrainResult:
            return self._trained(apply, tree, loss, rate, epochs, f"{name}_{rate:g}")

        return run

    def _trained(
        self, apply: Callable, tree: Any, loss: Callable, rate: float, epochs: int, name: str
    ) -> TrainResult:
        batch, data = self.config.batch_size, self.judge.data
        weights, learned = momentum(rate, epochs * steps_per_epoch(len(data.train_labels), batch))
        return train(
            apply,
            tree,
            data,
            TrainConfig(weights, epochs, batch, self.seed, learned),
            loss_fn=loss,
            augment=crop_and_flip,
            run_dir=self.judge.scratch / "qat_resnet" / f"{self.network}_{self.seed}_{name}",
        )


def bits_of(name: str) -> tuple[str, int]:
    """Of a format, the preset of the weights and the bits of activations. Raises ValueError.

    >>> bits_of("w4a4"), bits_of("w1")
    (('w4', 4), ('w1', 32))
    """
    if not (found := re.fullmatch(r"(w\d)(?:a(\d))?", name)):
        raise ValueError(f"format {name!r}: expected bits as in 'w4a4' or 'w1'.")
    return found[1], int(found[2] or 32)


def untrained(problem: Problem, result: TrainResult) -> dict[str, Any]:
    """The float network on the test images, before it is trained on."""
    seconds = sum(record.seconds for record in result.history)
    return {
        **problem.judge.test(result.params)[0],
        "validation_accuracy": result.history[-1].validation_accuracy,
        "seconds": seconds,
    }


def measured(problem: Problem, cell: Cell, rates: Rates) -> dict[str, Any]:
    """The row of the best rate, what each rate came to on the validation images, and seconds."""
    run = problem.more(problem.float_network().params, cell)
    result, accuracy, tuning = tuned(
        rates, run, lambda found: found.history[-1].validation_accuracy
    )
    tree = result.params if cell == FLOAT else qat.finalize(result.params)
    return {
        **problem.judge.test(seen(tree))[0],
        "validation_accuracy": accuracy,
        "start_accuracy": result.start[0].accuracy,
        "bits_per_weight": qj.summary(tree).totals.bits_per_weight,
        **tuning,
    }


def network_rows(rows: Rows, config: Config, network: Network) -> None:
    """Computes the rows of a network that are missing, one after another; the float ones first, and
    a whole table of one seed before the next. Raises ValueError beside rows of other epochs."""
    recipe = config.recipe(network)
    epochs = {"epochs": recipe.epochs, "more_epochs": recipe.more}
    for row in rows.stored():
        if row["network"] == network and not epochs.items() <= row.items():
            there = {name: row[name] for name in epochs}
            raise ValueError(f"{rows.path}: the rows of {network} have {there}, asked: {epochs}.")
    data = load("cifar10", data_dir=config.data_dir)
    judge = Judge(recipe.model, data, config.out)
    cells = [FLOAT]
    # The plain ones first.
    for ends, distil in itertools.product(config.ends, config.distil):
        for method, format in itertools.product(config.estimators, config.formats):
            cells.append(Cell(method, format, ends, distil))
    chosen: dict[Hashable, float] = {}
    for seed in config.seeds:
        problem = Problem(judge, config, network, seed)
        base = {"network": network, **epochs, "seed": seed}
        key = FLOAT._replace(method="float, as it was")._asdict() | base
        asked = {cell: cell._asdict() | base for cell in cells}
        if not rows.have([key, *asked.values()]):  # only then is the float network needed
            found = problem.float_network()
            of_it = functools.partial(untrained, problem, found)
            print(rows.of_network(key, found.params, of_it, **environment()), flush=True)
        for cell, row in asked.items():
            compute = functools.partial(measured, problem, cell)
            tuned_row(rows, row, compute, chosen, cell, config.rates)


def main(config: Config) -> None:
    """Computes the rows that are missing; draws the figures."""
    home = Path(__file__).parent if config.publish else config.out
    question = (__doc__ or "").splitlines()[0]
    head = {"question": question, "batch_size": config.batch_size, "rate": config.rate}
    rows = Rows(home / "results" / "qat_resnet.json", head)
    for network in config.networks:
        network_rows(rows, config, network)
        print(residual_figure(rows.stored(), network, home / "figures"))


if __name__ == "__main__":
    main(tyro.cli(Config))
