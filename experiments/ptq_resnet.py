"""How small does a published ResNet-32 get without training it again, and by which method?
Run: python -m experiments.ptq_resnet --data-dir DIR [--methods gptq brecq] [--publish]
Time: a row of weights alone is judged in 15 seconds on two cores; the methods' own times are in the
table. Rows that are there are not computed again.
Result: results/ptq_resnet.json, accuracy on the 10,000 test images of CIFAR-10, seconds and memory.

Calibration: 1,024 training images, drawn by three seeds; methods without data run once. Every
convolution and the dense layer are quantized; `ends` says whether the first and the last have 8
bits instead. Where activations have less than 8 bits, the image itself keeps 8."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro

import quantjax as qj
from experiments import resnet
from experiments.data import load
from experiments.datasets.sources import find_folder
from experiments.memory import with_peak
from experiments.peers import Made, Network, asked, hqq, onnxruntime, qwix, torchao, torchao_export
from experiments.post_training import Judge
from experiments.report import environment
from experiments.rows import NotApplicable, Rows
from quantjax import ptq
from quantjax.paths import named_leaves
from quantjax.policy import preset_spec
from quantjax.ptq.batch_norm import fold

FORMATS = ("w8a8", "w8", "w4", "w3", "w2", "w4a8", "w4a4")
BLOCKS = ("layer*_*",)
IMAGES, BATCH = 1024, 128


class Way(NamedTuple):
    """make: of a policy, the method, or another policy for plain rounding, or what another package
    makes of a network. sampled: whether the calibration images matter. activations: whether it is
    about activations alone. peer: whether it is another package's."""

    make: Callable[[qj.Policy], Any]
    sampled: bool = True
    activations: bool = False
    peer: bool = False


def _with_observer(policy: qj.Policy, observer: qj.Observer) -> qj.Policy:
    rules = [(p, s and dataclasses.replace(s, observer=observer)) for p, s in policy.rules]
    return qj.Policy(rules)


def observed_by(observer: qj.Observer) -> Way:
    """Rounding to nearest, with the scales that the observer finds of the weights."""
    return Way(lambda policy: _with_observer(policy, observer), sampled=False)


def of_peer(make: Callable[..., Made], *, sampled: bool = False, **options: Any) -> Way:
    """What another package makes of the network under the policy."""
    return Way(lambda policy: functools.partial(make, policy, **options), sampled, peer=True)


OURS: dict[str, Way] = {
    "absmax": observed_by(qj.absmax()),
    "mse": observed_by(qj.mse()),
    "hqq": Way(ptq.hqq, sampled=False),
    # As in its paper; the presets' observer of few bits is the MSE search.
    "hqq, whole range": Way(lambda p: ptq.hqq(_with_observer(p, qj.absmax())), sampled=False),
    "rtn, outputs": Way(ptq.rtn),
    "awq": Way(ptq.awq),
    "smoothquant": Way(ptq.smoothquant, activations=True),
    "gptq": Way(ptq.gptq),
    "gptq, paper": Way(functools.partial(ptq.gptq, candidates=1, rounds=0, paired=False)),
    "adaround": Way(ptq.adaround),
    "brecq": Way(functools.partial(ptq.brecq, blocks=BLOCKS)),
    "qdrop": Way(functools.partial(ptq.qdrop, blocks=BLOCKS), activations=True),
    "equalize, rtn": Way(lambda policy: qj.chain(ptq.equalize(), ptq.rtn(policy))),
    "rtn, bias corrected": Way(lambda policy: qj.chain(ptq.rtn(policy), ptq.bias_correction())),
    "gptq, norms re-estimated": Way(
        lambda policy: qj.chain(ptq.gptq(policy), ptq.re_estimate_batch_norm())
    ),
    "gptq, rank 4": Way(lambda policy: ptq.low_rank(ptq.gptq(policy), rank=4)),
}
PEERS: dict[str, Way] = {
    "qwix absmax": of_peer(qwix.weights),
    "qwix gptq": of_peer(qwix.weights, method="gptq"),
    "qwix awq": of_peer(qwix.weights, method="awq"),
    "hqq package": of_peer(hqq.weights),
    "torchao absmax": of_peer(torchao.weights),
    "torchao hqq": of_peer(torchao.weights, algorithm="HQQ_SCALE_ONLY"),
    "torchao, exported": of_peer(torchao_export.predictions, sampled=True),
    "onnxruntime": of_peer(onnxruntime.predictions, sampled=True),
    "onnxruntime, percentile": of_peer(
        onnxruntime.predictions, sampled=True, calibration="Percentile"
    ),
}
METHODS = OURS | PEERS


@dataclasses.dataclass(frozen=True)
class Config:
    """data_dir: holds CIFAR-10 and, itself or in `pretrained/`, the network. methods: names in
    METHODS; formats: presets. ends: the bits of the first and the last layer. folded:
    whether the normalizations are folded into the convolutions first. seeds: of the choice of
    images. out: where results go; publish: to experiments/results instead."""

    data_dir: Path
    methods: tuple[str, ...] = tuple(METHODS)
    formats: tuple[str, ...] = FORMATS
    ends: tuple[Literal["low", "8 bits"], ...] = ("low",)
    folded: tuple[bool, ...] = (False,)
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


def rectified(name: str) -> qj.QuantSpec:
    """A preset; activations below 8 bits unsigned and static: they come out of rectifiers, and half
    of a signed grid would lie idle."""
    spec = preset_spec(name)
    if spec.act is None or spec.act.format.bits == 8:
        return spec
    grid = qj.IntFormat(spec.act.format.bits, signed=False)
    tensor = qj.Granularity.TENSOR
    act = qj.QuantSpec(format=grid, block=tensor, static=True, observer=qj.mse())
    return dataclasses.replace(spec, act=act)


def policy(name: str, ends: str, *, last: str = "linear") -> qj.Policy:
    """A preset on every kernel; the image in 8 bits, and with `ends` the outer layers as well."""
    weights, _, activations = name.partition("a")
    image = "a8" if activations else ""
    outer = "w8" if ends == "8 bits" else weights
    rules: list[tuple[str, Any]] = [("conv1/kernel", outer + image)]
    if ends == "8 bits":
        rules.append((f"{last}/kernel", outer + image))
    return qj.Policy([*rules, ("**/kernel", rectified(name))])


def network(data_dir: Path, scratch: Path) -> tuple[Judge, Any]:
    """What evaluates trees on CIFAR-10, and the published parameters."""
    data = load("cifar10", data_dir=data_dir, validation=0)
    folder = find_folder((data_dir, data_dir / "pretrained"), [resnet.FILE]) or data_dir
    judge = Judge(resnet.ResNet(), resnet.pixels_of_resnet(data), scratch)
    return judge, resnet.load_resnet(folder / resnet.FILE)


def batches(judge: Judge, seed: int) -> list[Any]:
    """Calibration images, drawn by the seed."""
    images = judge.data.train_images
    chosen = np.random.RandomState(seed).choice(len(images), IMAGES, replace=False)
    return jnp.split(judge.data.normalize(images[chosen]), IMAGES // BATCH)


def measured(
    judge: Judge, params: Any, way: Way, policy: qj.Policy, folded: bool, images: list[Any]
) -> Mapping[str, Any]:
    """One row: the quantized network on the test images, and what the method cost. Seconds of the
    processor, over all cores, tell more than those of the clock where other work runs."""
    acts = [spec.act for _, spec in policy.rules if spec and spec.act]
    low, static = bool(acts), any(act.static for act in acts)
    if way.activations and not low:
        raise NotApplicable("changes nothing where activations are float")
    method = way.make(policy)
    if folded:
        params = fold(judge.apply, params, images[0])

    def quantized() -> Any:
        if way.peer:
            return method(Network(judge.model, params, images))
        if isinstance(method, qj.Policy) and not static:
            return qj.quantize(params, method)
        return qj.calibrate(judge.apply, params, images, method)

    start, worked = time.perf_counter(), time.process_time()
    tree, peak = with_peak(quantized)
    cost = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - worked,
        "peak_bytes": peak,
    }
    if isinstance(tree, Made):
        scores, _ = judge.test(tree.tree, tree.apply)
        whole = with_floats(tree.bits, policy, params)
        return {**scores, "bits_per_weight": whole, **cost, "package": tree.package}
    scores, _ = judge.test(tree if low else qj.dequantize(tree))
    bits = qj.summary(tree).totals.bits_per_weight
    return {**scores, "bits_per_weight": bits, **cost}


def with_floats(bits: float, policy: qj.Policy, params: Any) -> float:
    """Bits per parameter, as `summary` counts them, from those per quantized weight."""
    sizes = {path: leaf.size for path, leaf in named_leaves(params)[0]}
    low = sum(sizes[path] for path in asked(policy, params))
    return 32 + (bits - 32) * low / sum(sizes.values())


def main(config: Config) -> None:
    """Computes the rows that are missing, one after another."""
    home = Path(__file__).parent if config.publish else config.out
    judge, params = network(config.data_dir, config.out)
    head = {
        "question": (__doc__ or "").splitlines()[0],
        "calibration_images": IMAGES,
        "batch": BATCH,
    }
    rows = Rows(home / "results" / "ptq_resnet.json", head)
    float_key = {"method": "float", "format": "float32"}
    print(rows.row(float_key, lambda: judge.test(params)[0], **environment()))
    drawn = functools.cache(functools.partial(batches, judge))
    # A whole table of one seed first.
    for ends, folded, seed, name, format in itertools.product(
        config.ends, config.folded, config.seeds, config.methods, config.formats
    ):
        way, rules = METHODS[name], policy(format, ends)
        key = {"method": name, "format": format, "ends": ends, "folded": folded}
        key["seed"] = seed if way.sampled else None
        compute = functools.partial(measured, judge, params, way, rules, folded, drawn(seed))
        print(rows.row(key, compute, **environment()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
