"""The small language model that quantization is judged on: how well does it predict?
Run: python -m experiments.train_language_model --data-dir FOLDER
Time: 31 minutes on two cores that were busy with other work besides.
Result: perplexity 56.3 a token of 4,096 byte pairs on the validation text; on the test text 53.4,
which is 205 a word.

The run is saved after each epoch and resumed. The parameters lie in
`runs/language_model/checkpoint`; `load` gives them, after training where there are none."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

from experiments import wikitext
from experiments.language_model import DecoderConfig, forward, initialize
from experiments.steps import steps_per_epoch
from experiments.train import TrainConfig, classification_loss, train
from experiments.windows import Windows


@dataclasses.dataclass(frozen=True)
class Config:
    """data_dir: holds wiki.*.tokens. out: where the run is saved."""

    data_dir: Path
    decoder: DecoderConfig = DecoderConfig()
    context: int = 128
    epochs: int = 2
    batch_size: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 200
    seed: int = 0
    out: Path = Path("runs")


def load(config: Config) -> tuple[Callable[..., Any], Any, Windows, tuple[Any, ...]]:
    """(apply, params, data, history): as trained by `config`, resumed or trained if need be.

    `apply(params, tokens) -> logits` computes in float32 throughout."""
    data = wikitext.load(
        config.data_dir, vocabulary=config.decoder.vocabulary, context=config.context
    )
    apply = partial(forward, config.decoder)
    mixed = partial(forward, dataclasses.replace(config.decoder, mixed=True))
    params = initialize(config.decoder, seed=config.seed)
    result = train(
        apply,
        params,
        data,
        TrainConfig(_optimizer(config, len(data.train_labels)), config.epochs, config.batch_size),
        loss_fn=classification_loss(lambda tree, tokens: (mixed(tree, tokens), {})),
        run_dir=config.out / "language_model",
        evaluation_batch=64,
        on_epoch=lambda record, _: print(record, flush=True),
    )
    return apply, result.params, data, result.history


def _optimizer(config: Config, windows: int) -> optax.GradientTransformation:
    """AdamW on matrices and the embedding, no decay of the norms; a warm-up, then a cosine."""
    steps = config.epochs * steps_per_epoch(windows, config.batch_size)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            rate,
            b2=0.98,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def main(config: Config) -> None:
    """Trains, resumes, or reads what is there; prints the history."""
    for record in load(config)[-1]:
        print(record)


if __name__ == "__main__":
    main(tyro.cli(Config))
