"""How much longer is a step of training through rounding than one in float?
Run: python -m experiments.bench_training [--publish]
Time: a minute and a half on two cores.
Result: results/bench_training.json, the ratio of each kind of step to the float step.

The article's network on 64 images of 28x28 and a decoder on 32 windows of 64 characters, both of
random numbers. A step is the loss, its gradient and Adam, donating what it replaces. Steps of all
kinds are timed in turns, and compared within each turn."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro

import quantjax as qj
from experiments.language_model import forward, initialize
from experiments.models import ArticleCNN
from experiments.models import initialize as variables_of
from experiments.qat_transformer import DECODER
from experiments.report import environment, print_table, write_json
from experiments.tables import ratios_markdown
from experiments.timing import interleaved, speedup
from quantjax import qat
from quantjax.policy import preset_spec
from quantjax.spec import Granularity


class Network(NamedTuple):
    """apply(params, x) -> logits, of labels y."""

    apply: Callable[..., Any]
    params: Any
    x: jax.Array
    y: jax.Array
    kernels: str


class How(NamedTuple):
    """The format of weights, the bits of static activations or None, and the estimator; None is
    straight-through with given scales."""

    weights: str
    activations: int | None = None
    estimator: qat.Estimator | None = None


HOWS: Mapping[str, How | None] = {
    "float32": None,
    "w4": How("w4"),
    "w4a4": How("w4", 4),
    "w4, lsq": How("w4", None, qat.lsq()),
    "w4a4, lsq": How("w4", 4, qat.lsq()),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """rounds: how often each kind of step is timed. out: where the result goes; publish: to
    experiments/results instead."""

    rounds: int = 40
    out: Path = Path("runs")
    publish: bool = False


def networks() -> dict[str, Network]:
    """By name."""
    keys = jax.random.split(jax.random.key(0), 4)
    model = ArticleCNN()
    images = jax.random.normal(keys[0], (64, 28, 28, 1))
    classes = jax.random.randint(keys[1], (64,), 0, 10)
    tokens, targets = (jax.random.randint(k, (32, 64), 0, DECODER.vocabulary) for k in keys[2:])

    def decode(params: Any, x: jax.Array) -> jax.Array:
        return forward(DECODER, params, x)

    return {
        "article's network": Network(
            model.apply, variables_of(model, (28, 28, 1), seed=0), images, classes, "**/kernel"
        ),
        "decoder": Network(
            decode, initialize(DECODER, seed=0), tokens, targets, "layers/**/kernel"
        ),
    }


def tree_of(network: Network, how: How | None) -> Any:
    """What is trained."""
    if how is None:
        return network.params
    spec = preset_spec(how.weights)
    sites = qj.sites(network.apply, network.params, network.x)
    if how.activations is None:
        policy = qj.Policy([(network.kernels, spec)])
        return qat.prepare(network.params, policy, sites=sites, estimator=how.estimator)
    act = qj.QuantSpec(format=qj.IntFormat(how.activations), block=Granularity.TENSOR, static=True)
    policy = qj.Policy([(network.kernels, dataclasses.replace(spec, act=act))])
    like = qj.calibrate(network.apply, network.params, [network.x], policy)
    return qat.prepare(network.params, like=like, estimator=how.estimator)


def stepper(network: Network, how: How | None) -> Callable[[], Any]:
    """Each call is one step from where the last one ended; returns its loss."""
    apply = network.apply if how is None else qj.intercept(network.apply)
    rates = {"weights": optax.adam(1e-3), "learned": optax.adam(1e-4), "fixed": optax.set_to_zero()}
    optimizer = optax.adam(1e-3) if how is None else optax.partition(rates, qat.labels)

    def loss(tree: Any) -> jax.Array:
        logits = apply(tree, network.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, network.y).mean()

    def step(tree: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(tree)
        updates, state = optimizer.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 1))
    tree = jax.tree.map(jnp.array, tree_of(network, how))
    held = [tree, jax.jit(optimizer.init)(tree)]

    def call() -> Any:
        *held[:], value = compiled(*held)
        return value

    return call


def measured(name: str, network: Network, rounds: int) -> list[dict[str, Any]]:
    """A row for every kind of step."""
    times = interleaved({how: stepper(network, ask) for how, ask in HOWS.items()}, rounds)
    return [
        {
            "network": name,
            "how": how,
            "median_ms": 1e3 * statistics.median(spent),
            "times_as_long": 1 / speedup(times["float32"], spent),
            "rounds": rounds,
        }
        for how, spent in times.items()
    ]


def main(config: Config) -> None:
    """Times all; writes and prints the table."""
    home = Path(__file__).parent if config.publish else config.out
    rows = [row for n, network in networks().items() for row in measured(n, network, config.rounds)]
    payload = {"question": (__doc__ or "").splitlines()[0], **environment(), "rows": rows}
    write_json(home / "results" / "bench_training.json", payload)
    print_table("steps of training", *ratios_markdown(payload))


if __name__ == "__main__":
    main(tyro.cli(Config))
