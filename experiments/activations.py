"""What do activations of 8 bits and of 4 cost, with scales found as they come or before?
Run: python -m experiments.activations --data-dir DIR [--networks resnet32] [--publish]
Time: half an hour on two cores, and as much again to train the networks the first time.
Result: results/activations.json, test accuracy of the article's network, trained by each seed, and
of a published ResNet-32 on CIFAR-10.

Weights and activations of every convolution and dense layer are quantized. Dynamic: one scale for
each row of a product, for each image of a convolution. Static: one scale for each layer, from
`qj.calibrate` on training images, drawn by three seeds. Asymmetric: unsigned codes and a zero
point. Every product runs as `qj.intercept` computes it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

import quantjax as qj
from experiments import article, resnet
from experiments.data import load
from experiments.datasets.sources import find_folder
from experiments.post_training import Judge
from experiments.report import environment, print_table, spread, write_json
from experiments.tables import activations_markdown
from quantjax.formats import e4m3
from quantjax.policy import preset_spec

Network = Literal["mnist", "fashion_mnist", "cifar10", "resnet32"]
IMAGES, BATCH = 1024, 128  # of calibration


@dataclasses.dataclass(frozen=True)
class Config:
    """networks: the article's on a data set, or the ResNet. data_dir: as in `article`; it also
    holds the ResNet's weights, itself or in `pretrained/`. seeds: of the training; calibrations:
    of the choice of images. out: where trained networks lie as well; publish: as in `article`."""

    data_dir: Path
    networks: tuple[Network, ...] = ("mnist", "fashion_mnist", "resnet32")
    seeds: tuple[int, ...] = (0, 1, 2)
    calibrations: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


def _asymmetric(spec: qj.QuantSpec) -> qj.QuantSpec:
    assert spec.act is not None and isinstance(spec.act.format, qj.IntFormat)
    unsigned = qj.IntFormat(spec.act.format.bits, signed=False)
    act = dataclasses.replace(spec.act, format=unsigned, symmetric=False)
    return dataclasses.replace(spec, act=act)


FP8 = dataclasses.replace(
    preset_spec("fp8"), act=qj.QuantSpec(format=e4m3, block=qj.Granularity.ROW)
)
# (name, activations): how both are quantized.
ROWS: dict[tuple[str, str], qj.QuantSpec] = {("w8", "float32"): preset_spec("w8")}
for _name in ("w8a8", "w8a4", "w4a8"):
    ROWS |= {(_name, how): preset_spec(_name) for how in ("dynamic", "static")}
    if _name != "w4a8":
        ROWS[_name, "static, asymmetric"] = _asymmetric(preset_spec(_name))
ROWS |= {("fp8", how): FP8 for how in ("dynamic", "static")}


def judges(config: Config, network: str) -> Iterator[tuple[Judge, Any]]:
    """Every trained network of that name, and what evaluates it."""
    if network == "resnet32":
        data = load("cifar10", data_dir=config.data_dir, validation=0)
        places = (config.data_dir, config.data_dir / "pretrained")
        folder = find_folder(places, [resnet.FILE]) or config.data_dir
        judge = Judge(resnet.ResNet(), resnet.pixels_of_resnet(data), config.out)
        yield judge, resnet.load_resnet(folder / resnet.FILE)
        return
    for seed in config.seeds:
        asked = article.Config(dataset=network, data_dir=config.data_dir, out=config.out)
        judge, result = article.trained(asked, article.settings(asked), seed)
        yield judge, result.params


def quantized(judge: Judge, params: Any, spec: qj.QuantSpec, seed: int | None) -> Any:
    """The quantized tree; with a seed, its activation scales are static, from images it draws."""
    policy = qj.Policy(otherwise=spec)
    if seed is None:
        return qj.quantize(params, policy)
    images = judge.data.train_images
    chosen = np.random.RandomState(seed).choice(len(images), IMAGES, replace=False)
    batches = jnp.split(judge.data.normalize(images[chosen]), IMAGES // BATCH)
    return qj.calibrate(judge.apply, params, batches, policy)


def measured(config: Config, judge: Judge, params: Any) -> list[dict[str, Any]]:
    """Loss and accuracy on the test images, the float network's first."""
    scores, _ = judge.test(params)
    rows = [{"format": "float32", "method": "", **scores, "lost": 0.0}]
    print(article.article_line(rows[0]))
    for (name, how), spec in ROWS.items():
        for seed in config.calibrations if "static" in how else (None,):
            scores, _ = judge.test(quantized(judge, params, spec, seed))
            lost = rows[0]["accuracy"] - scores["accuracy"]
            rows.append({"format": name, "method": how, "calibration": seed, **scores})
            rows[-1]["lost"] = lost
            print(article.article_line(rows[-1]))
    return rows


def summarize(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and spread over networks and calibrations; `lost` is paired with the float network."""
    rows = [row for run in runs for row in run]
    out = []
    for name, how in dict.fromkeys((row["format"], row["method"]) for row in rows):
        same = [row for row in rows if (row["format"], row["method"]) == (name, how)]
        cells = {k: spread(row[k] for row in same) for k in ("accuracy", "lost", "loss")}
        out.append({"format": name, "method": how, "runs": len(same), **cells})
    return out


def main(config: Config) -> None:
    """Measures every network; prints the table; writes the JSON."""
    payload: dict[str, Any] = {"question": (__doc__ or "").splitlines()[0], **environment()}
    payload |= {"seeds": config.seeds, "calibrations": config.calibrations}
    payload |= {"calibration_images": IMAGES, "networks": {}}
    for network in config.networks:
        runs = [measured(config, *pair) for pair in judges(config, network)]
        payload["networks"][network] = {"summary": summarize(runs), "runs": runs}
    home = Path(__file__).parent if config.publish else config.out
    write_json(home / "results" / "activations.json", payload)
    print_table("Test accuracy, %", *activations_markdown(payload))
    print(home / "results" / "activations.json")


if __name__ == "__main__":
    main(tyro.cli(Config))
