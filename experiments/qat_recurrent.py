"""How few bits can the gates and the state of a recurrent network train in?
Run: python -m experiments.qat_recurrent --data-dir DIR [--networks japanese_vowels --publish]
Time: about an hour on two cores, of which spoken digits take two thirds, see `seconds` in each row;
rows that are there are not computed again, and a training that was stopped goes on at its last
epoch.
Result: results/qat_recurrent.json, accuracy on the 300 test recordings of spoken digits and the 370
test sequences of Japanese vowels, of an LSTM and a GRU.

A network is trained in float, and trained on by LSQ in the bits of a format: those of the weights
are of all kernels of the cell, those of activations are of the state, which every gate rounds by a
step of its own. Frames, and the layer that reads the states, have 8 bits. The float network is
trained on for as long. Beside them, rounded: the same steps before any training. Rates are chosen
by the loss on validation recordings, with the first seed; the test recordings are seen once."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optax
import tyro

import quantjax as qj
from experiments import sequences
from experiments.models import initialize
from experiments.optimizers import fine_tuning
from experiments.post_training import Judge, scored
from experiments.qat_plots import recurrent_figure
from experiments.recurrent import CellName, RecurrentClassifier
from experiments.report import environment
from experiments.rows import Rows
from experiments.steps import steps_per_epoch
from experiments.train import Examples, TrainConfig, TrainResult, train
from experiments.tuning import Rates, tuned, tuned_row
from experiments.ways import activation
from quantjax import qat
from quantjax.policy import preset_spec

# Presets of weights, and bits of the state.
FORMATS: dict[str, tuple[str, int]] = {
    "w8a8": ("w8", 8),
    "w4a8": ("w4", 8),
    "w4a4": ("w4", 4),
    "w3a3": ("w3", 3),
    "w2a8": ("w2", 8),
    "w2a2": ("w2", 2),
    "ternary_a8": ("ternary", 8),
}
FLOAT = "float32"
SAMPLES = 128  # training sequences whose activations choose the steps


class Recipe(NamedTuple):
    """Of a data set: how it is trained, and then trained on."""

    epochs: int
    more_epochs: int
    batch_size: int
    rate: float = 3e-3


RECIPES = {
    "spoken_digits": Recipe(epochs=16, more_epochs=12, batch_size=64),
    "japanese_vowels": Recipe(epochs=24, more_epochs=16, batch_size=16),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """networks: the data sets. formats: names in FORMATS. hidden: the size of the state. rates: of
    the second training, tried with the first seed. seeds: of the parameters and the order. out:
    where trainings are saved; publish: results go to experiments/results instead."""

    data_dir: Path
    networks: tuple[Literal["spoken_digits", "japanese_vowels"], ...] = (
        "spoken_digits",
        "japanese_vowels",
    )
    cells: tuple[CellName, ...] = ("lstm", "gru")
    formats: tuple[str, ...] = tuple(FORMATS)
    hidden: int = 96
    rates: tuple[float, ...] = (1e-3, 3e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


class Problem(NamedTuple):
    """A network of one seed, what judges it, and how it is trained. judge.scratch is its folder."""

    judge: Judge
    recipe: Recipe
    seed: int

    def trained(self, name: str, apply: Any, tree: Any, rate: float, epochs: int) -> TrainResult:
        """The tree after so many epochs, saved under the name. Gradients through many steps may
        be huge for once: their norm is at most 1."""
        data, size = self.judge.data, self.recipe.batch_size
        weights, learned = fine_tuning(rate, epochs * steps_per_epoch(len(data.train_labels), size))
        clipped = optax.chain(optax.clip_by_global_norm(1.0), weights)
        config = TrainConfig(clipped, epochs, size, self.seed, learned)
        return train(apply, tree, data, config, run_dir=self.judge.scratch / name)


def policy(format: str) -> qj.Policy:
    """Of all kernels of a network with the cell `cell` and the layer `head`. States and frames are
    signed; of two bits all four levels are theirs."""
    weights, bits = FORMATS[format]
    act = functools.partial(activation, signed=True, levels=qj.Levels.FULL)
    frames, state = (dataclasses.replace(preset_spec(weights), act=act(n)) for n in (8, bits))
    head = dataclasses.replace(preset_spec("w8"), act=act(8))
    return qj.Policy([("cell/i*/kernel", frames), ("cell/h*/kernel", state), ("head/kernel", head)])


def calibration(data: Examples, seed: int) -> np.ndarray:
    """Training sequences drawn by the seed, none of them padded: of those that are as long as the
    median, so many frames."""
    lengths = data.train_images[..., -1].sum(1).astype(int)
    shortest = int(np.median(lengths))
    long = np.flatnonzero(lengths >= shortest)
    chosen = np.random.RandomState(seed).choice(long, min(SAMPLES, len(long)), replace=False)
    return data.train_images[chosen, :shortest]


def rounded(problem: Problem, params: Any, format: str) -> Any:
    """The network with the steps that lose least of weights and of activations."""
    data = problem.judge.data
    batch = data.normalize(calibration(data, problem.seed))
    return qj.calibrate(problem.judge.apply, params, [batch], policy(format))


def trained_row(
    problem: Problem, params: Any, start: Callable[[], Any] | None, format: str, rates: Rates
) -> dict[str, Any]:
    """The second training at the best of the rates, and what each came to. start: the rounded
    network, or None for float."""
    name = f"{format}_{'_'.join(map(str, problem.recipe))}"
    tree, apply = params, problem.judge.apply
    if start is not None:
        tree = qat.prepare(params, like=start(), estimator=qat.lsq())
        apply = qj.intercept(apply)

    def run(rate: float) -> TrainResult:
        return problem.trained(f"{name}_{rate:g}", apply, tree, rate, problem.recipe.more_epochs)

    found, loss, tuning = tuned(rates, run, lambda x: x.history[-1].validation_loss, min)
    final = found.params if start is None else qat.finalize(found.params)
    return {
        **problem.judge.test(final)[0],
        "validation_loss": loss,
        "validation_accuracy": found.history[-1].validation_accuracy,
        "start_accuracy": found.start[0].accuracy,
        "bits_per_weight": qj.summary(final).totals.bits_per_weight,
        **tuning,
    }


def first_training(problem: Problem) -> Any:
    """The float network."""
    judge, (epochs, _, _, rate) = problem.judge, problem.recipe
    params = initialize(judge.model, judge.data.train_images.shape[1:], seed=problem.seed)
    name = f"float_{'_'.join(map(str, problem.recipe))}"
    return problem.trained(name, judge.apply, params, rate, epochs).params


def network_rows(rows: Rows, config: Config, network: str, cell: CellName) -> None:
    """Computes the rows of one data set and cell that are missing, a whole table of one seed before
    the next."""
    data = sequences.load(network, data_dir=config.data_dir)
    model = RecurrentClassifier(data.classes, cell, config.hidden)
    chosen: dict[Hashable, float] = {}
    for seed in config.seeds:
        folder = config.out / "qat_recurrent" / f"{network}_{cell}_{config.hidden}_seed{seed}"
        judge = Judge(model, data, folder)
        problem = Problem(judge, RECIPES[network], seed)
        params = first_training(problem)
        base = {"network": network, "cell": cell, "seed": seed}
        key = base | {"method": "float, as it was", "format": FLOAT}
        compute = functools.partial(scored, judge, params)
        print(rows.of_network(key, params, compute, **environment()))
        key = base | {"method": "float", "format": FLOAT}
        tune = functools.partial(trained_row, problem, params, None, FLOAT)
        tuned_row(rows, key, tune, chosen, FLOAT, config.rates)
        for format in config.formats:
            start = functools.cache(functools.partial(rounded, problem, params, format))
            key = base | {"method": "rounded", "format": format}
            compute = functools.partial(_tested, judge, start)
            print(rows.row(key, compute, **environment()), flush=True)
            key = base | {"method": "lsq", "format": format}
            tune = functools.partial(trained_row, problem, params, start, format)
            tuned_row(rows, key, tune, chosen, format, config.rates)


def _tested(judge: Judge, start: Callable[[], Any]) -> dict[str, Any]:
    """What rounding alone comes to on the test recordings."""
    return scored(judge, start())


def main(config: Config) -> None:
    """Computes the rows that are missing; draws the figure."""
    home = Path(__file__).parent if config.publish else config.out
    recipes = {name: RECIPES[name]._asdict() for name in RECIPES}
    head = {
        "question": (__doc__ or "").splitlines()[0],
        "hidden": config.hidden,
        "recipes": recipes,
    }
    rows = Rows(home / "results" / "qat_recurrent.json", head)
    for network in config.networks:
        for cell in config.cells:
            network_rows(rows, config, network, cell)
    print(recurrent_figure(rows.stored(), home / "figures"))


if __name__ == "__main__":
    main(tyro.cli(Config))
