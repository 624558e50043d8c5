"""How few bits can a small decoder train in, and its optimizer keep its state in?
Run: python -m experiments.qat_transformer --data-dir DIR [--seeds 0] [--publish]
Time: on two busy cores about a minute an epoch, of which a row takes six, or two for each rate;
rows that are there are not computed again, and a training that was stopped goes on at its last
epoch.
Result: results/qat_transformer.json, nats a character on the test text of tiny Shakespeare.

A decoder of the language models' kind reads 64 characters. It is trained in float by AdamW, whose
state has 32, 8 and 4 bits in turn. From the first, all projections go on training in the bits of
the row, with activations of 8 bits, one dynamic scale a token; the float network goes on for as
long beside them. The embedding, which is the output matrix too, and the norms stay float. The rate
of this second training is chosen on the validation text with the first seed; the test text is
read once."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import optax
import tyro

import quantjax as qj
from experiments import shakespeare
from experiments.bench_candidates import tree_bytes
from experiments.describe import digest_of
from experiments.evaluate import evaluate
from experiments.language_model import DecoderConfig, forward, initialize
from experiments.optimizers import relative_adam
from experiments.report import environment
from experiments.rows import Rows
from experiments.steps import steps_per_epoch
from experiments.train import TrainConfig, TrainResult, train
from experiments.tuning import Rates, tuned, tuned_row
from experiments.windows import Windows
from quantjax import qat
from quantjax.policy import preset_spec

PROJECTIONS = "layers/**/kernel"
WAYS: dict[tuple[str, str], qat.Estimator] = {
    ("lsq", "w8"): qat.lsq(),
    ("lsq", "w4"): qat.lsq(),
    ("lsq", "w2"): qat.lsq(),
    ("bitnet", "ternary"): qat.bitnet(),
    ("paretoq", "ternary"): qat.paretoq(),
    ("xnor", "w1"): qat.xnor(),
    ("paretoq", "w1"): qat.paretoq(),
}
DECODER = DecoderConfig(vocabulary=65, layers=2, width=128, heads=4, key_value_heads=2, hidden=256)


@dataclasses.dataclass(frozen=True)
class Config:
    """state_bits: of the optimizer. formats: of the weights, with every estimator for them. rates:
    of the second training, tried with the first seed. seeds: of the parameters and the order. out:
    where trainings are saved; publish: results go to experiments/results instead."""

    data_dir: Path
    decoder: DecoderConfig = DECODER
    context: int = 64
    batch_size: int = 32
    rate: float = 3e-3
    epochs: int = 6
    rates: tuple[float, ...] = (1e-3, 3e-3)
    more_epochs: int = 2
    state_bits: tuple[Literal[32, 8, 4], ...] = (32, 8, 4)
    formats: tuple[str, ...] = ("w8", "w4", "w2", "ternary", "w1")
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


class Problem(NamedTuple):
    """apply: (params, tokens) -> logits, of the float network."""

    config: Config
    data: Windows
    apply: Callable[..., Any]
    seed: int

    def folder(self, name: str) -> Path:
        """Where a training of this name is saved."""
        return self.config.out / "qat_transformer" / f"{name}_seed{self.seed}"

    def steps(self, epochs: int) -> int:
        """Steps of a training."""
        return epochs * steps_per_epoch(len(self.data.train_labels), self.config.batch_size)

    def scores(self, tree: Any) -> dict[str, float]:
        """Of a tree, with QTensors or without, on the test text."""
        run = qj.intercept(self.apply) if _quantized(tree) else self.apply
        inputs, targets = self.data.test_images, self.data.test_labels
        loss, accuracy, _ = evaluate(run, tree, inputs, targets, batch_size=64)
        return {"loss": loss, "accuracy": accuracy}


def adamw(rate: float, steps: int, *, decay: float) -> optax.GradientTransformation:
    """A warm-up of a twentieth, then a cosine; norms do not decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(steps // 20, 1), steps)
    matrices = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    return optax.adamw(schedule, b2=0.99, weight_decay=decay, mask=matrices)


def from_scratch(problem: Problem, bits: int) -> tuple[TrainResult, float]:
    """A float network, by an optimizer whose state has so many bits; the bytes of that state."""
    config = problem.config
    optimizer = adamw(config.rate, problem.steps(config.epochs), decay=0.1)
    if bits != 32:
        optimizer = qat.quantize_state(optimizer, bits=bits)
    params = initialize(config.decoder, seed=problem.seed)
    result = train(
        problem.apply,
        params,
        problem.data,
        TrainConfig(optimizer, config.epochs, config.batch_size, seed=problem.seed),
        run_dir=problem.folder(f"float_{bits}"),
        evaluation_batch=64,
    )
    state = jax.eval_shape(optimizer.init, params)
    return result, tree_bytes(state)


def more(problem: Problem, params: Any, cell: tuple[str, str] | None, rate: float) -> TrainResult:
    """The second training: in the format of the cell, or in float."""
    config = problem.config
    tree, apply, name = params, problem.apply, "float_more"
    if cell is not None:
        spec = dataclasses.replace(preset_spec(cell[1]), act=preset_spec("w8a8").act)
        estimator = qat.Estimator(WAYS[cell].weights, qat.bitnet().activations)
        sites = qj.sites(problem.apply, params, problem.data.train_images[:1])
        policy = qj.Policy([(PROJECTIONS, spec)])
        tree = qat.prepare(params, policy, sites=sites, estimator=estimator)
        apply, name = qj.intercept(problem.apply), "_".join(cell)
    steps = problem.steps(config.more_epochs)
    asked = TrainConfig(
        adamw(rate, steps, decay=0.0),
        config.more_epochs,
        config.batch_size,
        seed=problem.seed,
        learned=relative_adam(optax.cosine_decay_schedule(rate, steps)),
    )
    folder = problem.folder(f"{name}_{rate:g}")
    return train(
        apply, tree, problem.data, asked, run_dir=folder, evaluation_batch=64,
    )  # fmt: skip


def optimizer_row(problem: Problem, bits: int) -> dict[str, Any]:
    """A training from scratch."""
    result, size = from_scratch(problem, bits)
    return {
        **problem.scores(result.params),
        "validation_loss": result.history[-1].validation_loss,
        "state_bytes": size,
        "seconds": sum(record.seconds for record in result.history),
        "checkpoint": digest_of(result.params),
    }


def format_row(problem: Problem, cell: tuple[str, str] | None, rates: Rates) -> dict[str, Any]:
    """The second training at the best of the rates, and what each came to on the validation text;
    start_loss: of the weights just rounded, on that text."""
    params = from_scratch(problem, 32)[0].params
    result, loss, tuning = tuned(
        rates,
        functools.partial(more, problem, params, cell),
        lambda found: found.history[-1].validation_loss,
        min,
    )
    tree = result.params
    tree = tree if cell is None else qat.finalize(tree)
    return {
        **problem.scores(tree),
        "validation_loss": loss,
        "start_loss": result.start[0].loss,
        "bits_per_weight": qj.summary(tree).totals.bits_per_weight,
        **tuning,
    }


def _quantized(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, qj.QTensor))
    return any(isinstance(leaf, qj.QTensor) for leaf in leaves)


def main(config: Config) -> None:
    """Computes the rows that are missing, one after another."""
    home = Path(__file__).parent if config.publish else config.out
    data = shakespeare.load(config.data_dir, context=config.context)
    letters = len(data.tokenizer.alphabet)
    if letters != config.decoder.vocabulary:
        raise ValueError(
            f"the text has {letters} characters, the decoder {config.decoder.vocabulary}: pass "
            f"--decoder.vocabulary {letters}."
        )
    settings = ("decoder", "context", "batch_size", "rate", "epochs", "more_epochs")
    head = {
        "question": (__doc__ or "").splitlines()[0],
        **{k: v for k, v in dataclasses.asdict(config).items() if k in settings},
        "test_characters": data.test_labels.size,
    }
    rows = Rows(home / "results" / "qat_transformer.json", head)
    apply = functools.partial(forward, config.decoder)
    chosen: dict[Hashable, float] = {}
    cells = [None, *(cell for cell in WAYS if cell[1] in config.formats)]
    for seed in config.seeds:
        problem = Problem(config, data, apply, seed)
        base = {"table": "optimizer", "seed": seed}
        for bits in config.state_bits:
            compute = functools.partial(optimizer_row, problem, bits)
            print(rows.row(base | {"state_bits": bits}, compute, **environment()), flush=True)
        asked = {}
        for cell in cells:
            name, weights = cell or ("float", "float32")
            asked[cell] = {"table": "formats", "method": name, "format": weights, "seed": seed}
        if not rows.have(asked.values()):  # only then is the float network needed
            params = from_scratch(problem, 32)[0].params
            compute = functools.partial(optimizer_row, problem, 32)
            rows.of_network(base | {"state_bits": 32}, params, compute, **environment())
        for cell, key in asked.items():
            compute = functools.partial(format_row, problem, cell)
            tuned_row(rows, key, compute, chosen, cell, config.rates)


if __name__ == "__main__":
    main(tyro.cli(Config))
