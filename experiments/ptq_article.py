"""How small does the article's network get without training it again, and by which method?
Run: python -m experiments.ptq_article --data-dir DIR [--networks fashion_mnist] [--publish]
Time: a row in 5 to 40 seconds on two cores; rows that are there are not computed again. Networks
that are not there are trained first, a few minutes each.
Result: results/ptq_article.json, accuracy on the 10,000 test images of Fashion-MNIST and MNIST.

As `ptq_resnet`, on networks that `article` trains: 1,024 training images for calibration, drawn by
three seeds; every convolution and dense layer is quantized; the image keeps 8 bits."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.activations import Config as Networks
from experiments.activations import judges
from experiments.post_training import scored
from experiments.ptq_resnet import BATCH, FORMATS, IMAGES, OURS, Way, batches, measured, policy
from experiments.report import environment
from experiments.rows import Rows
from quantjax import ptq

# Every layer is a block of its own; there is no normalization to estimate anew.
OWN: dict[str, Way] = {
    name: way for name, way in OURS.items() if name != "gptq, norms re-estimated"
} | {"brecq": Way(ptq.brecq), "qdrop": Way(ptq.qdrop, activations=True)}


@dataclasses.dataclass(frozen=True)
class Config:
    """networks: the data sets. seeds: of the training; calibrations: of the choice of images.
    methods, formats, ends: as in `ptq_resnet`. out: where trained networks lie as well; publish:
    results go to experiments/results instead."""

    data_dir: Path
    networks: tuple[Literal["fashion_mnist", "mnist"], ...] = ("fashion_mnist", "mnist")
    methods: tuple[str, ...] = tuple(OWN)
    formats: tuple[str, ...] = FORMATS
    ends: tuple[Literal["low", "8 bits"], ...] = ("low",)
    seeds: tuple[int, ...] = (0,)
    calibrations: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


def main(config: Config) -> None:
    """Computes the rows that are missing, one after another."""
    home = Path(__file__).parent if config.publish else config.out
    head = {
        "question": (__doc__ or "").splitlines()[0],
        "calibration_images": IMAGES,
        "batch": BATCH,
    }
    rows = Rows(home / "results" / "ptq_article.json", head)
    asked = Networks(data_dir=config.data_dir, seeds=config.seeds, out=config.out)
    for network in config.networks:
        for trained, (judge, params) in zip(config.seeds, judges(asked, network), strict=True):
            base: dict[str, Any] = {"network": network, "trained": trained}
            row = {"method": "float", "format": "float32"} | base
            untouched = functools.partial(scored, judge, params)
            print(rows.of_network(row, params, untouched, **environment()))
            drawn = functools.cache(functools.partial(batches, judge))
            # A whole table of one seed first.
            for seed, name, ends, format in itertools.product(
                config.calibrations, config.methods, config.ends, config.formats
            ):
                way, rules = OWN[name], policy(format, ends, last="fc2")
                key = {"method": name, "format": format, "ends": ends} | base
                key["seed"] = seed if way.sampled else None
                compute = functools.partial(measured, judge, params, way, rules, False, drawn(seed))
                print(rows.row(key, compute, **environment()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
