"""Which estimator trains the article's network in the fewest bits, weights and activations?
Run: python -m experiments.qat_article --data-dir DIR [--estimators lsq --weights w2 --publish]
Time: a row is a training of four epochs for each learning rate that is tried, see `seconds` there;
rows that are there are not computed again, and a row that was stopped goes on at its last epoch.
Result: results/qat_article.json, accuracy on the 10,000 test images of Fashion-MNIST and MNIST.

Fine-tunes the network that `article` trains. The second and the third layer have the row's bits,
the image, the first and the last layer 8, with learned steps. Estimators of weights alone round
activations as LSQ does. The float network is trained on for as long, by the same choice of rates.
A rate is chosen on validation images, with the first seed; the test images are seen once."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

import quantjax as qj
from experiments.activations import Config as Networks
from experiments.activations import judges
from experiments.optimizers import fine_tuning
from experiments.post_training import Judge
from experiments.ptq_resnet import batches
from experiments.qat_plots import estimator_figure
from experiments.report import environment
from experiments.rows import NotApplicable, Rows
from experiments.train import TrainConfig, TrainResult, steps_per_epoch, train
from experiments.tuning import Rates, tuned, tuned_row
from quantjax import formats, qat
from quantjax.policy import preset_spec
from quantjax.spec import Granularity

LOW = ("conv2", "fc1")  # the layers between the first and the last
REFRESH = 50  # steps between two searches of scales that are not learned
FEW = ("w4", "w3", "w2", "ternary", "w1")


class Way(NamedTuple):
    """estimator: None is straight-through, with scales searched anew as weights move. weights: the
    formats it is defined for. acts: whether its own rule for activations is what it is about.
    offset: whether activations have a zero point. project: after each step. spec: of weights, in
    place of the preset's. grid: of activations of so many bits, in place of integers; most: of
    these bits at most."""

    estimator: qat.Estimator | None
    weights: tuple[str, ...] = FEW
    acts: bool = False
    offset: bool = False
    project: Callable[[Any], Any] | None = None
    spec: Callable[[str], qj.QuantSpec] = preset_spec
    grid: Callable[[int], Any] = functools.partial(qj.IntFormat, signed=False)
    most: int = 8


def trained_ternary(weights: str) -> qj.QuantSpec:
    """Three levels that are learned."""
    return qj.QuantSpec(format=qj.Codebook.learned(2), block=Granularity.TENSOR)


def powers_of_two(weights: str) -> qj.QuantSpec:
    """Sums of powers of two, one bound a layer, as in the paper."""
    return qj.QuantSpec(format=formats.apot(int(weights[1:])), block=Granularity.TENSOR)


def half_integers(weights: str) -> qj.QuantSpec:
    """The preset's bits, on as many levels above zero as below."""
    grid = qj.IntFormat(int(weights[1:]), levels=qj.Levels.HALF)
    return dataclasses.replace(preset_spec(weights), format=grid)


def of_weights(estimator: qat.Estimator, *weights: str, **how: Any) -> Way:
    """An estimator of weights, with LSQ's activations."""
    return Way(qat.Estimator(estimator.weights, qat.lsq().activations), weights or FEW, **how)


WAYS: dict[str, Way] = {
    "straight-through": Way(None),
    "lsq": Way(qat.lsq()),
    "lsq_plus": Way(qat.lsq_plus(), acts=True, offset=True),
    "dorefa": Way(qat.dorefa(), ("w4", "w3", "w2", "w1")),
    "pact": Way(qat.pact(), ("w4", "w3", "w2", "w1"), acts=True),
    "paretoq": of_weights(qat.paretoq()),
    "apot": Way(
        qat.apot(),
        ("w4", "w3", "w2"),
        spec=powers_of_two,
        grid=functools.partial(formats.apot, signed=False),
    ),
    "n2uq": Way(qat.n2uq(), ("w4", "w3", "w2"), acts=True, spec=half_integers, most=4),
    "twn": of_weights(qat.twn(), "ternary"),
    "ttq": of_weights(qat.ttq(), "ternary", spec=trained_ternary),
    "bitnet": of_weights(qat.bitnet(), "ternary"),
    "binary_connect": of_weights(qat.binary_connect(), "w1", project=qat.clip_values),
    "xnor": of_weights(qat.xnor(), "w1"),
    "ir_net": of_weights(qat.ir_net(), "w1"),
}


class Cell(NamedTuple):
    """One of the table: a name in WAYS, a preset, and the bits of activations, 32 for float."""

    method: str
    format: str
    activations: int


FLOAT = Cell("float", "float32", 32)


@dataclasses.dataclass(frozen=True)
class Config:
    """networks: the data sets. estimators: names in WAYS. activations: their bits, 32 for float.
    rates: what is tried with the first seed. seeds: of the training, and of what `article` trained.
    out: where trained networks lie as well; publish: results go to experiments/results instead."""

    data_dir: Path
    networks: tuple[Literal["fashion_mnist", "mnist"], ...] = ("fashion_mnist", "mnist")
    estimators: tuple[str, ...] = tuple(WAYS)
    weights: tuple[str, ...] = FEW
    activations: tuple[Literal[32, 8, 4, 2], ...] = (32, 8, 4, 2)
    rates: tuple[float, ...] = (1e-3, 3e-3)
    epochs: int = 4
    batch_size: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


def activation(bits: int, *, signed: bool = False, offset: bool = False) -> qj.QuantSpec | None:
    """One static scale for a layer. Rectified inputs are unsigned."""
    if bits == 32:
        return None
    grid = qj.IntFormat(bits, signed=signed)
    spec = qj.QuantSpec(format=grid, block=Granularity.TENSOR, static=True, observer=qj.mse())
    return dataclasses.replace(spec, symmetric=not offset)


def policies(way: Way, weights: str, bits: int) -> tuple[qj.Policy, qj.Policy]:
    """Of the layers between, and of the outer ones. Raises NotApplicable."""
    if weights not in way.weights:
        raise NotApplicable("is not defined for these weights")
    if way.acts and bits == 32:
        raise NotApplicable("is about activations; of weights alone it is another one's")
    if way.most < bits < 32:
        raise NotApplicable(f"learns a threshold for every code, of {way.most} bits at most")
    act = activation(bits, offset=way.offset)
    if act is not None:
        act = dataclasses.replace(act, format=way.grid(bits))
    low = dataclasses.replace(way.spec(weights), act=act)
    outer = 32 if bits == 32 else 8

    def end(signed: bool) -> qj.QuantSpec:
        act = activation(outer, signed=signed)
        return dataclasses.replace(preset_spec("w8"), act=act, observer=qj.mse())

    between = qj.Policy([(f"{layer}/kernel", low) for layer in LOW])
    return between, qj.Policy([("conv1/kernel", end(True)), ("fc2/kernel", end(False))])


def prepared(judge: Judge, params: Any, way: Way, weights: str, bits: int) -> Any:
    """The tree that is trained, from scales that lose least of weights and of activations."""
    trees = []
    ends = qat.lsq()
    for policy, estimator in zip(policies(way, weights, bits), (way.estimator, ends), strict=True):
        found: dict[str, Any] = {"policy": policy}
        if bits != 32:
            images = batches(judge, seed=0)
            found = {"like": qj.calibrate(judge.apply, params, images, policy)}
        trees.append(qat.prepare(params, **found, estimator=estimator))
    between, outer = (tree["params"] for tree in trees)
    layers = {name: between[name] if name in LOW else outer[name] for name in between}
    return params | {"params": layers}


def straight_through(judge: Judge, params: Any, weights: str, bits: int) -> dict[str, Any]:
    """What the loop needs to train the floats themselves, through scales that follow them."""
    rules = [rule for p in policies(WAYS["straight-through"], weights, bits) for rule in p.rules]
    policy = qj.Policy(rules)
    start = qj.quantize(params, policy)
    if bits != 32:
        start = qj.calibrate(judge.apply, params, batches(judge, seed=0), policy)

    def refresh(params: Any, quantized: Any, step: int) -> Any:
        new = qj.quantize(params, policy)["params"]
        old = quantized["params"]
        for name, layer in new.items():
            static = old[name]["kernel"].act_scale
            layer["kernel"] = dataclasses.replace(layer["kernel"], act_scale=static)
        return quantized | {"params": new}

    return {"extra": start, "refresh": refresh, "refresh_every": REFRESH, "transform": _through}


def _through(params: Any, quantized: Any) -> Any:
    return qat.prepare(params, like=quantized)


def fine_tuned(
    judge: Judge, params: Any, cell: Cell, config: Config, seed: int
) -> Callable[[float], tuple[Any, TrainResult]]:
    """Of a learning rate, the tree as it is stored, and its training. Raises NotApplicable."""
    steps = config.epochs * steps_per_epoch(len(judge.data.train_labels), config.batch_size)
    name, weights, bits = cell
    way = WAYS.get(name)
    how: dict[str, Any] = {}
    tree, apply = params, judge.apply
    if way is not None:
        apply = qj.intercept(judge.apply)
        if way.estimator is None:
            how = straight_through(judge, params, weights, bits)
        else:
            how = {"project": way.project}
            tree = prepared(judge, params, way, weights, bits)

    def run(rate: float) -> tuple[Any, TrainResult]:
        adam, learned = fine_tuning(rate, steps)
        asked = TrainConfig(adam, config.epochs, config.batch_size, seed, learned)
        folder = judge.scratch / "qat" / f"{name}_{weights}_{bits}_{rate:g}x{config.epochs}"
        result = train(apply, tree, judge.data, asked, run_dir=folder, **how)
        if way is None:
            return result.params, result
        if way.estimator is None:
            return qj.quantize(result.params, like=result.extra), result
        return qat.finalize(result.params), result

    return run


def measured(
    judge: Judge, params: Any, cell: Cell, config: Config, seed: int, rates: Rates
) -> dict[str, Any]:
    """The row of the best rate, what each rate came to on the validation images, and seconds."""
    run = fine_tuned(judge, params, cell, config, seed)
    (tree, result), accuracy, tuning = tuned(rates, run, lambda x: judge.validation(_seen(x[0])))
    scores, _ = judge.test(_seen(tree))
    return {
        **scores,
        "validation_accuracy": accuracy,
        "start_accuracy": result.start[0].accuracy,
        "bits_per_weight": qj.summary(tree).totals.bits_per_weight,
        **tuning,
    }


def _seen(tree: Any) -> Any:
    """Weights alone as floats; with activations, as products in integers want them."""
    layer = tree["params"]["conv2"]["kernel"]
    low = isinstance(layer, qj.QTensor) and layer.act is not None
    return tree if low else qj.dequantize(tree)


def network_rows(rows: Rows, config: Config, network: str) -> None:
    """Computes the rows of one data set that are missing, one after another; the float ones first,
    and a whole table of one seed before the next."""
    asked = Networks(data_dir=config.data_dir, seeds=config.seeds, out=config.out)
    product = itertools.product(config.estimators, config.weights, config.activations)
    cells = [FLOAT, *(Cell(*cell) for cell in product)]
    chosen: dict[Hashable, float] = {}
    for seed, (judge, params) in zip(config.seeds, judges(asked, network), strict=True):
        base: dict[str, Any] = {"network": network, "seed": seed}
        key = FLOAT._replace(method="float, as it was")._asdict() | base
        print(rows.row(key, functools.partial(untrained, judge, params), **environment()))
        for cell in cells:
            compute = functools.partial(measured, judge, params, cell, config, seed)
            tuned_row(rows, cell._asdict() | base, compute, chosen, cell, config.rates)


def untrained(judge: Judge, params: Any) -> dict[str, Any]:
    """The float network on the test images, before it is trained on."""
    return judge.test(params)[0]


def main(config: Config) -> None:
    """Computes the rows that are missing; draws the figures."""
    home = Path(__file__).parent if config.publish else config.out
    head = {
        "question": (__doc__ or "").splitlines()[0],
        "epochs": config.epochs,
        "batch_size": config.batch_size,
    }
    rows = Rows(home / "results" / "qat_article.json", head)
    for network in config.networks:
        network_rows(rows, config, network)
        print(estimator_figure(rows.stored(), network, home / "figures"))


if __name__ == "__main__":
    main(tyro.cli(Config))
