"""How much longer does it take to learn which layer hurts than to find static scales?
Run: python -m experiments.bench_sensitivity [--publish]
Time: five minutes on two cores.
Result: results/bench_sensitivity.json, the ratio of `qj.sensitivity` to `qj.calibrate`.

ResNet-32 and the article's network on 1,024 images, a decoder on 512 windows of 64 characters, in
batches of 128; parameters and inputs are random numbers. Calibration observes the range of every
activation for w8a8. The reports are of weights in 8, 4, 3 and 2 bits, by Fisher information without
labels. The calls are timed in turns, all but the first, which compiles, and compared within each
turn."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro

import quantjax as qj
from experiments import bench_training
from experiments.models import initialize
from experiments.qat_transformer import DECODER
from experiments.report import environment, print_table, write_json
from experiments.resnet import ResNet
from experiments.tables import ratios_markdown
from experiments.timing import interleaved, speedup
from quantjax.policy import preset_spec

FORMATS = ("w8", "w4", "w3", "w2")
BATCHES, BATCH = 8, 128


class Case(NamedTuple):
    """apply(params, batch) -> logits."""

    apply: Callable[..., Any]
    params: Any
    batches: list[jax.Array]
    kernels: str


@dataclasses.dataclass(frozen=True)
class Config:
    """rounds: how often each call is timed. out: where the result goes; publish: to
    experiments/results instead."""

    rounds: int = 5
    out: Path = Path("runs")
    publish: bool = False


def cases() -> dict[str, Case]:
    """By name."""
    pixels, draws, tokens = jax.random.split(jax.random.key(0), 3)
    networks = bench_training.networks()
    cnn, decoder = networks["article's network"], networks["decoder"]
    resnet = ResNet()
    variables = initialize(resnet, (32, 32, 3), seed=0)
    images = jax.random.normal(pixels, (BATCHES, BATCH, 32, 32, 3))
    digits = jax.random.normal(draws, (BATCHES, BATCH, *cnn.x.shape[1:]))
    windows = (BATCHES, BATCH // 2, decoder.x.shape[1])
    text = jax.random.randint(tokens, windows, 0, DECODER.vocabulary)
    return {
        "ResNet-32": Case(resnet.apply, variables, list(images), "**/kernel"),
        "article's network": Case(cnn.apply, cnn.params, list(digits), cnn.kernels),
        "decoder": Case(decoder.apply, decoder.params, list(text), decoder.kernels),
    }


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """What is compared, the calibration first."""
    policies = {name: qj.Policy([(case.kernels, preset_spec(name))]) for name in FORMATS}
    a8 = qj.Policy([(case.kernels, preset_spec("w8a8"))])
    return {
        "calibrate": lambda: qj.calibrate(case.apply, case.params, case.batches, a8),
        "sensitivity": lambda: qj.sensitivity(case.apply, case.params, case.batches, policies),
    }


def measured(name: str, case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for each call."""
    times = interleaved(calls(case), rounds, lead=False)
    return [
        {
            "network": name,
            "how": how,
            "median_ms": 1e3 * statistics.median(spent),
            "times_as_long": 1 / speedup(times["calibrate"], spent),
            "rounds": rounds,
        }
        for how, spent in times.items()
    ]


def main(config: Config) -> None:
    """Times all; writes and prints the table."""
    home = Path(__file__).parent if config.publish else config.out
    rows = [row for name, case in cases().items() for row in measured(name, case, config.rounds)]
    payload = {"question": (__doc__ or "").splitlines()[0], **environment(), "rows": rows}
    write_json(home / "results" / "bench_sensitivity.json", payload)
    print_table("reports of sensitivity", *ratios_markdown(payload))


if __name__ == "__main__":
    main(tyro.cli(Config))
