"""How much does training through the quantizer win back? Gradient descent on the same loss.

The forward pass uses D(Q(w)), the gradient passes straight through to the float weights (Bengio
et al. 2013, arXiv:1308.3432), and the MSE-optimal scales are searched anew every so many steps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax

import quantjax as qj
from experiments.steps import steps_per_epoch
from experiments.train import Examples, TrainConfig, train

FORMATS = ("w4", "w3", "w2", "ternary", "w1")


@dataclasses.dataclass(frozen=True)
class FineTuneConfig:
    """epochs of Adam from `learning_rate` to zero on a cosine; scales anew every
    `refresh_every` steps."""

    epochs: int = 4
    learning_rate: float = 3e-3
    batch_size: int = 64
    refresh_every: int = 50


def fine_tune(
    apply: Callable[..., Any],
    params: Any,
    policy: qj.Policy | None,
    data: Examples,
    config: FineTuneConfig,
    *,
    seed: int,
    loss_fn: Callable[..., Any] | None = None,
    run_dir: Path | None = None,
) -> Any:
    """The quantized tree after training `params` through `policy`; with None, the float tree
    after as much training without a quantizer.

    What the last step's forward pass saw is what is returned, rounded with the same scales."""
    steps = config.epochs * steps_per_epoch(len(data.train_labels), config.batch_size)
    schedule = optax.cosine_decay_schedule(config.learning_rate, steps)
    result = train(
        apply,
        params,
        data,
        TrainConfig(optax.adam(schedule), config.epochs, config.batch_size, seed),
        loss_fn=loss_fn,
        transform=None if policy is None else _through,
        extra=None if policy is None else qj.quantize(params, policy),
        refresh=None if policy is None else _refresh(policy),
        refresh_every=config.refresh_every,
        run_dir=run_dir,
    )
    return result.params if policy is None else qj.quantize(result.params, like=result.extra)


def _through(params: Any, quantized: Any) -> Any:
    return qj.fake_quantize(params, like=quantized)


def _refresh(policy: qj.Policy) -> Callable[..., Any]:
    def refresh(params: Any, quantized: Any, step: int) -> Any:
        return qj.quantize(params, policy)

    return refresh
