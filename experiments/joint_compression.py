"""At equal bytes, what is best: fewer bits, fewer channels, a teacher, or all of them?
Run: python -m experiments.joint_compression --data-dir DIR [--networks fashion_mnist] [--publish]
Time: a row is a training of four epochs for each rate that is tried, see `seconds` there; rows that
are there are not computed again, and a training that was stopped goes on at its last epoch.
Result: results/joint_compression.json, accuracy on the 10,000 test images of Fashion-MNIST.

Budgets are the bytes of the article's network with all weights in 4, 2 and 1 bits, scales and
biases included. For each, from the network that `article` trains: weights in these bits (quantize);
float weights in so few channels, the least by l1 going (prune); half of the bytes cut away and the
other half of twice the bits (prune, quantize). Each is trained on by the labels, and by the answers
of the float network beside them (distil, temperature 4, nine tenths of the loss). The float network
goes on for as long. Rates are chosen on validation images with the first seed; the test images are
seen once."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro

import quantjax as qj
from experiments.activations import Config as Networks
from experiments.activations import judges
from experiments.bench_candidates import tree_bytes
from experiments.distillation import distillation_loss
from experiments.optimizers import fine_tuning
from experiments.post_training import Judge, scored
from experiments.report import environment
from experiments.rows import Rows
from experiments.steps import steps_per_epoch
from experiments.train import TrainConfig, TrainResult, train
from experiments.tuning import Rates, tuned, tuned_row
from quantjax import prune, qat

METHODS = ("quantize", "prune", "prune, quantize")
STEPS = 64  # of the search for a sparsity


@dataclasses.dataclass(frozen=True)
class Config:
    """budgets: the bits of a weight whose bytes are met. distil: whether a teacher answers. rates:
    what is tried with the first seed. seeds: of the training, and of what `article` trained. out:
    where trained networks lie as well; publish: results go to experiments/results instead."""

    data_dir: Path
    networks: tuple[Literal["fashion_mnist", "mnist"], ...] = ("fashion_mnist",)
    budgets: tuple[Literal[4, 2, 1], ...] = (4, 2, 1)
    methods: tuple[str, ...] = METHODS
    distil: tuple[bool, ...] = (False, True)
    rates: tuple[float, ...] = (1e-3, 3e-3)
    epochs: int = 4
    batch_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


class Smaller(NamedTuple):
    """A network before it is trained on: judge evaluates it; tree is trained; bits of a weight."""

    judge: Judge
    tree: Any
    bits: int


def size(params: Any, bits: int) -> int:
    """Bytes of all arrays with kernels in so many bits, 32 for float."""
    tree = params if bits == 32 else jax.eval_shape(lambda p: qj.quantize(p, _policy(bits)), params)
    return tree_bytes(tree)


def narrowed(judge: Judge, params: Any, bits: int, budget: int) -> tuple[Judge, Any]:
    """The widest network whose kernels in so many bits meet the budget, every layer losing one
    share of its channels, and its parameters. Raises ValueError if none does."""
    image = jnp.asarray(judge.data.normalize(judge.data.train_images[:1]))

    @functools.cache
    def cut(step: int) -> prune.Cut:
        return prune.channels(judge.apply, params, image, sparsity=step / STEPS)

    def fits(step: int) -> bool:
        return size(cut(step).params, bits) <= budget

    least = bisect.bisect_left(range(STEPS), True, key=fits)  # more sparse is never larger
    if least == STEPS:
        raise ValueError(f"no narrower network fits {budget} bytes at {bits} bits.")
    tree = cut(least).params
    first, second, hidden = (tree["params"][n]["bias"].size for n in ("conv1", "conv2", "fc1"))
    model = judge.model.clone(channels=(first, second), hidden=hidden)
    return dataclasses.replace(judge, model=model), tree


def smaller(judge: Judge, params: Any, method: str, budget: int) -> Smaller:
    """What a method makes of the trained network, for the bytes of `budget` bits a weight."""
    most = size(params, budget)
    if method == "quantize":
        return Smaller(judge, _prepared(params, budget), budget)
    if method == "prune":
        return Smaller(*narrowed(judge, params, 32, most), 32)
    inner, cut = narrowed(judge, params, 2 * budget, most)
    return Smaller(inner, _prepared(cut, 2 * budget), 2 * budget)


def trained(
    start: Smaller,
    teacher: Callable[[Any], Any] | None,
    config: Config,
    *,
    rate: float,
    seed: int,
    name: str,
) -> tuple[Any, TrainResult]:
    """The network trained on, as it is stored, and how."""
    data = start.judge.data
    apply = start.judge.apply if start.bits == 32 else qj.intercept(start.judge.apply)
    loss = teacher and distillation_loss(lambda tree, x: (apply(tree, x), {}), teacher)
    steps = config.epochs * steps_per_epoch(len(data.train_labels), config.batch_size)
    adam, learned = fine_tuning(rate, steps)
    asked = TrainConfig(adam, config.epochs, config.batch_size, seed, learned)
    folder = start.judge.scratch / "joint" / f"{name}_{rate:g}x{config.epochs}"
    result = train(apply, start.tree, data, asked, loss_fn=loss, run_dir=folder)
    tree = result.params if start.bits == 32 else qat.finalize(result.params)
    return tree, result


def measured(
    judge: Judge, params: Any, cell: tuple[str, int, bool] | None, config: Config, seed: int,
    rates: Rates,
) -> dict[str, Any]:  # fmt: skip
    """A row: the network of the best rate on the test images. None is the float network."""
    name = "float" if cell is None else "_".join(map(str, cell)).replace(", ", "_")
    teacher = functools.partial(judge.apply, params) if cell and cell[2] else None
    begun = Smaller(judge, params, 32) if cell is None else smaller(judge, params, *cell[:2])

    def run(rate: float) -> tuple[Any, TrainResult]:
        return trained(begun, teacher, config, rate=rate, seed=seed, name=name)

    (tree, result), accuracy, tuning = tuned(
        rates, run, lambda found: found[1].history[-1].validation_accuracy
    )
    model = begun.judge.model
    return {
        **begun.judge.test(qj.dequantize(tree))[0],
        "bytes": tree_bytes(tree),
        "bits": begun.bits,
        "widths": [*model.channels, model.hidden],
        "validation_accuracy": accuracy,
        "start_accuracy": result.start[0].accuracy,
        **tuning,
    }


def _policy(bits: int) -> qj.Policy:
    return qj.Policy([("**/kernel", f"w{bits}")])


def _prepared(params: Any, bits: int) -> Any:
    return qat.prepare(params, _policy(bits), estimator=qat.lsq())


def main(config: Config) -> None:
    """Computes the rows that are missing, one after another."""
    home = Path(__file__).parent if config.publish else config.out
    head = {
        "question": (__doc__ or "").splitlines()[0],
        "epochs": config.epochs,
        "batch_size": config.batch_size,
    }
    rows = Rows(home / "results" / "joint_compression.json", head)
    asked = Networks(data_dir=config.data_dir, seeds=config.seeds, out=config.out)
    cells = [None, *itertools.product(config.methods, config.budgets, config.distil)]
    for network in config.networks:
        chosen: dict[Hashable, float] = {}
        for seed, (judge, params) in zip(config.seeds, judges(asked, network), strict=True):
            base = {"network": network, "budget": 32, "distil": False, "seed": seed}
            key = base | {"method": "float, as it was"}
            untouched = functools.partial(scored, judge, params)
            print(rows.of_network(key, params, untouched, **environment()))
            for cell in cells:
                method, budget, distil = cell or ("float", 32, False)
                key = dict(network=network, method=method, budget=budget, distil=distil, seed=seed)
                compute = functools.partial(measured, judge, params, cell, config, seed)
                tuned_row(rows, key, compute, chosen, cell, config.rates)


if __name__ == "__main__":
    main(tyro.cli(Config))
