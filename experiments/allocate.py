"""Which layers should have how many bits? Size against accuracy, for three ways to decide.
Run: python -m experiments.allocate --data-dir DIR [--networks fashion_mnist mnist resnet32]
Time: on two cores two minutes a calibration seed for the article's networks, twenty for ResNet-32.
Result: results/allocate.json, row by row; an interrupted run goes on where it stopped.
Source: HAWQ-V3, arXiv:2011.10680 (losses of layers added up); CLADO, arXiv:2307.05657 (pairs).

Budgets are the bytes of one format everywhere, w2 to w6. At each, beside it: the allocation that
adds up the loss of each layer, and the one that knows what two layers do together, from one report
by perturbation on training images. The loss is the divergence from the float network: measured on
the calibration images beside its prediction, and with the accuracy on the test images, opened once.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import quantjax as qj
from experiments.activations import Config as Networks
from experiments.activations import judges
from experiments.evaluate import evaluate
from experiments.method_tables import PREDICTIONS, correlation
from experiments.post_training import Judge
from experiments.report import environment, print_table
from experiments.rows import Rows
from quantjax.allocate import Allocation, Mode, Sensitivity, categorical, predicted_loss

FORMATS = ("w1", "w2", "w3", "w4", "w5", "w6", "w8")
BUDGETS = ("w2", "w3", "w4", "w5", "w6")
METHODS = ("uniform", "layers", "pairs")


@dataclasses.dataclass(frozen=True)
class Config:
    """networks: of `experiments.activations`. seeds: of the networks that are trained here, kept in
    `out`. calibrations: seeds that draw the images. images: how many for each network."""

    data_dir: Path
    networks: tuple[str, ...] = ("fashion_mnist", "mnist", "resnet32")
    seeds: tuple[int, ...] = (0,)
    calibrations: tuple[int, ...] = (0, 1, 2)
    images: int = 1024
    batch: int = 128
    out: Path = Path("runs")
    publish: bool = False


class Task:
    """One network and one draw of calibration images; the report is made when it is asked for."""

    def __init__(self, judge: Judge, params: Any, config: Config, seed: int) -> None:
        self.judge, self.params, self.config = judge, params, config
        images = judge.data.train_images
        chosen = np.random.default_rng(seed).choice(len(images), config.images, replace=False)
        pixels = jnp.asarray(judge.data.normalize(images[chosen]))
        self.batches = [pixels[i : i + config.batch] for i in range(0, len(pixels), config.batch)]
        self.outputs = jax.jit(judge.apply)

    @functools.cached_property
    def report(self) -> Sensitivity:
        """By perturbation."""
        return qj.sensitivity(
            self.judge.apply, self.params, self.batches, FORMATS,
            mode=Mode.PERTURBATION, products=0,
        )  # fmt: skip

    @functools.cached_property
    def floats(self) -> list[jax.Array]:
        """The float network's outputs."""
        return [self.outputs(self.params, x) for x in self.batches]

    def row(self, budget: str, method: str) -> dict[str, Any]:
        """What one method does with the bytes of a format."""
        report, start = self.report, time.perf_counter()
        formats = dict.fromkeys((row.path for row in report.rows), budget)
        cost = {(o.path, o.format): o.bytes for o in report.options}
        size = report.kept_bytes + sum(cost[item] for item in formats.items())
        found: Allocation | None = None
        if method != "uniform":
            found = qj.allocate_bits(report, size, pairs=method == "pairs")
            formats = found.formats
        seconds = time.perf_counter() - start
        tree = qj.fake_quantize(self.params, qj.Policy(list(formats.items())))
        after = [self.outputs(tree, x) for x in self.batches]
        pairs = zip(self.floats, after, strict=True)
        measured = np.mean([float(categorical.divergence(a, b).mean()) for a, b in pairs])
        data = self.judge.data
        images, labels = data.normalize(data.test_images), data.test_labels
        loss, accuracy, _ = evaluate(self.judge.apply, tree, images, labels)
        return {
            "bytes": int(report.kept_bytes + sum(cost[item] for item in formats.items())),
            "budget_bytes": int(size),
            "predicted_layers": predicted_loss(report, formats, pairs=False),
            "predicted_pairs": predicted_loss(report, formats, pairs=True),
            "measured": float(measured),
            "gap": 0.0 if found is None else found.gap,
            "seconds": seconds,
            "test_loss": loss,
            "test_accuracy": accuracy,
            "formats": formats,
        }


def tasks(config: Config) -> Iterator[tuple[dict[str, Any], Task]]:
    """Every network with every draw of images."""
    asked = Networks(data_dir=config.data_dir, seeds=config.seeds, out=config.out)
    for network in config.networks:
        for seed, (judge, params) in enumerate(judges(asked, network)):
            trained = 0 if network == "resnet32" else config.seeds[seed]
            for calibration in config.calibrations:
                key = {"network": network, "seed": trained, "calibration": calibration}
                yield key, Task(judge, params, config, calibration)


def main(config: Config) -> None:
    """Fills in the rows that are missing and prints the table."""
    folder = Path(__file__).parent if config.publish else config.out
    head = {"images": config.images, "batch": config.batch, "formats": FORMATS}
    rows = Rows(folder / "results" / "allocate.json", head)
    found = []
    for key, task in tasks(config):
        for budget in BUDGETS:
            for method in METHODS:
                full = {**key, "budget": budget, "method": method}
                compute = functools.partial(task.row, budget, method)
                found.append(rows.row(full, compute, environment=environment()))
    for network in config.networks:
        mine = [row for row in found if row["network"] == network and "reason" not in row]
        cells = []
        for budget in BUDGETS:
            of = {
                m: [r for r in mine if (r["budget"], r["method"]) == (budget, m)] for m in METHODS
            }
            cells.append([
                budget,
                f"{np.mean([r['budget_bytes'] for r in of['uniform']]):,.0f}",
                *(f"{100 * np.mean([r['test_accuracy'] for r in of[m]]):.2f}" for m in METHODS),
                *(f"{np.mean([r['measured'] for r in of[m]]):.2e}" for m in METHODS),
            ])  # fmt: skip
        heads = ["budget", "bytes", *METHODS, *(f"KL {m}" for m in METHODS)]
        print_table(network, heads, cells)
        for way, field in PREDICTIONS.items():
            print(f"predicted by {way}, measured: correlation {correlation(mine, field):.4f}")


if __name__ == "__main__":
    main(tyro.cli(Config))
