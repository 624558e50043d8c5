"""How few bits can a word-level LSTM of 512 units train in, its whole vocabulary included?
Run: python -m experiments.qat_words --data-dir DIR [--publish]
     python -m experiments.qat_words --data-dir DIR --pieces 200 --stop-after 1    # a piece of it
Time: hours on a GPU, see `seconds` in each row; on CPU days. A pass over the text is read in
`pieces`, each of which is saved: a run that was stopped goes on behind the last one.
Result: results/qat_words.json, perplexity a word on the test text of WikiText-2, whose 33,278 words
all have an output, and whose state is carried through the text.

Formats are 2/2, 2/3 and 3/3 bits of weights and activations, as in Xu et al., "Alternating
Multi-bit Quantization for Recurrent Neural Networks", 2018, arXiv:1802.00150. The embedding, the
kernels of the cell and the output matrix have the bits of the weights, a step a row or an output;
the state has those of the activations where a gate and where the output reads it. The row of the
embedding that enters the cell has 8 bits there. Theirs are binary codes with free coefficients;
here the levels are even, and their step is learned (LSQ). The network is trained in float, dropout
a half, by Adam with the gradient's norm clipped, and from there on in the bits of the row, or in
float for as long. Rates are chosen on the validation text with the first seed; the test text is
read once."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

import quantjax as qj
from experiments import wikitext
from experiments.optimizers import fine_tuning
from experiments.report import environment
from experiments.rows import Rows
from experiments.train import TrainConfig, TrainResult, train
from experiments.tuning import Rates, tuned, tuned_row
from experiments.ways import activation
from experiments.windows import Streams, Windows
from experiments.word_model import WordModel, carried_loss, logits_alone, nats, with_state
from quantjax import qat
from quantjax.policy import preset_spec

FORMATS: dict[str, tuple[str, int]] = {"w2a2": ("w2", 2), "w2a3": ("w2", 3), "w3a3": ("w3", 3)}
FLOAT = "float32"


@dataclasses.dataclass(frozen=True)
class Config:
    """passes, rate: of the training in float; more_passes, rates: of the second. pieces: of a pass.
    stop_after: so many pieces are trained in this call, None for all. seeds: of the parameters and
    the dropout. out: where trainings are saved; publish: results go to experiments/results."""

    data_dir: Path
    width: int = 512
    context: int = 30
    judged: int = 128
    batch_size: int = 100
    passes: int = 40
    rate: float = 3e-3
    more_passes: int = 10
    rates: tuple[float, ...] = (3e-4, 1e-3)
    pieces: int = 1
    stop_after: int | None = None
    formats: tuple[str, ...] = tuple(FORMATS)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


class Problem(NamedTuple):
    """What is trained and judged, of one seed. apply: (variables, words, state, key) -> (logits,
    state). on_epoch: called after each piece."""

    config: Config
    data: Windows
    model: WordModel
    seed: int
    on_epoch: Callable[..., None]

    @property
    def apply(self) -> Callable[..., Any]:
        return self.model.apply

    def trained(self, name: str, apply: Any, variables: Any, rate: float, passes: int) -> Any:
        """The variables after so many passes, and the training."""
        config = self.config
        order = Streams(len(self.data.train_labels), config.batch_size, config.pieces)
        epochs = passes * config.pieces
        weights, learned = fine_tuning(rate, epochs * order.steps)
        clipped = optax.chain(optax.clip_by_global_norm(1.0), weights)
        result = train(
            logits_alone(apply),
            with_state(variables, config.width, config.batch_size, self.seed),
            self.data,
            TrainConfig(clipped, epochs, config.batch_size, self.seed, learned),
            loss_fn=carried_loss(apply),
            order=order,
            on_epoch=self.on_epoch,
            run_dir=config.out / "qat_words" / f"{name}_seed{self.seed}",
            evaluation_batch=8,
        )
        return {"params": result.params["params"]}, result

    def perplexities(self, apply: Any, variables: Any) -> tuple[float, float]:
        """Of a word of the validation text, and of the test text."""
        data = self.data
        valid = nats(apply, variables, data.validation_images, data.validation_labels)
        test = nats(apply, variables, data.test_images, data.test_labels)
        return math.exp(valid), math.exp(test)


def policy(format: str) -> qj.Policy:
    """Of all matrices of a WordModel. Activations have all levels, zero among them, as dropout
    makes zeros."""
    weights, bits = FORMATS[format]
    spec = preset_spec(weights)
    act = functools.partial(activation, signed=True, levels=qj.Levels.FULL)
    state, entering = (dataclasses.replace(spec, act=act(n)) for n in (bits, 8))
    rules = {"embedding/*": spec, "cell/i*/kernel": entering, "cell/h*/kernel": state}
    return qj.Policy([*rules.items(), ("head/kernel", state)])


def rounded(problem: Problem, variables: Any, format: str) -> Any:
    """The network with the steps that lose least of weights and of activations, on windows of the
    training text."""
    windows = problem.data.train_images
    spread_out = windows[:: max(len(windows) // 64, 1)][:64]

    def logits(variables: Any, words: Any) -> Any:
        return problem.apply(variables, words)[0]

    return qj.calibrate(logits, variables, [jnp.asarray(spread_out)], policy(format))


def first_training(problem: Problem) -> Any:
    """The float network."""
    config = problem.config
    words = jnp.zeros((1, 2), jnp.int32)
    variables = jax.jit(problem.model.init)(jax.random.key(problem.seed), words)
    name = f"float_{config.rate:g}x{config.passes}"
    return problem.trained(name, problem.apply, variables, config.rate, config.passes)[0]


def row_of(problem: Problem, apply: Any, variables: Any) -> dict[str, Any]:
    """A network as it is: the float one, or one that is rounded alone."""
    valid, test = problem.perplexities(apply, variables)
    return {"perplexity": test, "validation_perplexity": valid}


def rounded_row(problem: Problem, start: Callable[[], Any]) -> dict[str, Any]:
    """What rounding alone comes to."""
    return row_of(problem, qj.intercept(problem.apply), start())


def trained_row(
    problem: Problem, variables: Any, start: Callable[[], Any] | None, format: str, rates: Rates
) -> dict[str, Any]:
    """The second training at the best of the rates, and what each came to on the validation
    text, its state carried through. start: the rounded network, or None for float."""
    apply, tree = problem.apply, variables
    if start is not None:
        tree = qat.prepare(variables, like=start(), estimator=qat.lsq())
        apply = qj.intercept(apply)
    passes = problem.config.more_passes
    data = problem.data

    def run(rate: float) -> tuple[Any, TrainResult]:
        found, result = problem.trained(f"{format}_{rate:g}x{passes}", apply, tree, rate, passes)
        return found if start is None else qat.finalize(found), result

    def score(found: tuple[Any, TrainResult]) -> float:
        return math.exp(nats(apply, found[0], data.validation_images, data.validation_labels))

    (final, _), valid, tuning = tuned(rates, run, score, min)
    return {
        "perplexity": math.exp(nats(apply, final, data.test_images, data.test_labels)),
        "validation_perplexity": valid,
        "bits_per_weight": qj.summary(final).totals.bits_per_weight,
        **tuning,
    }


def stopping(pieces: int | None) -> Callable[..., None]:
    """An `on_epoch` that ends the program, not a row of it, when so many pieces are saved."""
    count = 0

    def on_epoch(record: Any, tree: Any) -> None:
        nonlocal count
        print(record, flush=True)
        count += 1
        if count == pieces:
            raise SystemExit(f"stopped after {pieces} pieces, as asked; run again to go on.")

    return on_epoch


def main(config: Config) -> None:
    """Computes the rows that are missing, one after another."""
    home = Path(__file__).parent if config.publish else config.out
    data = wikitext.load_words(config.data_dir, context=config.context, judged=config.judged)
    model = WordModel(len(data.tokenizer.words), config.width)
    settings = ("width", "context", "batch_size", "passes", "rate", "more_passes")
    head = {
        "question": (__doc__ or "").splitlines()[0],
        **{k: v for k, v in dataclasses.asdict(config).items() if k in settings},
        "vocabulary": model.vocabulary,
        "test_words": data.test_words,
    }
    rows = Rows(home / "results" / "qat_words.json", head)
    on_epoch = stopping(config.stop_after)
    chosen: dict[Hashable, float] = {}
    for seed in config.seeds:
        problem = Problem(config, data, model, seed, on_epoch)
        variables = first_training(problem)
        key = {"method": "float, as it was", "format": FLOAT, "seed": seed}
        compute = functools.partial(row_of, problem, problem.apply, variables)
        print(rows.of_network(key, variables, compute, **environment()), flush=True)
        key = {"method": "float", "format": FLOAT, "seed": seed}
        tune = functools.partial(trained_row, problem, variables, None, FLOAT)
        tuned_row(rows, key, tune, chosen, FLOAT, config.rates)
        for format in config.formats:
            start = functools.cache(functools.partial(rounded, problem, variables, format))
            key = {"method": "rounded", "format": format, "seed": seed}
            compute = functools.partial(rounded_row, problem, start)
            print(rows.row(key, compute, **environment()), flush=True)
            key = {"method": "lsq", "format": format, "seed": seed}
            tune = functools.partial(trained_row, problem, variables, start, format)
            tuned_row(rows, key, tune, chosen, format, config.rates)


if __name__ == "__main__":
    main(tyro.cli(Config))
