"""How much does a small language model lose when it is quantized without training it again?
Run: python -m experiments.ptq_language_model --model.data-dir FOLDER [--publish]
Time: half a minute to three minutes a row on two busy cores; rows there are not computed again.
Result: results/ptq_language_model.json. KL to the float model over that of absmax rounding at the
same bits, one calibration seed: gptq 0.27 at w4g64, 0.23 at w3g64, 0.16 at w2g64. Trains the model
first if it is not there.

Quantized are all projections of all layers; beside each, the same with the tied embedding in
8-bit codes too (weights only). Norms stay float. Judged on windows of the test split: perplexity
a token of 4,096 byte pairs, and the mean over tokens of KL(float || quantized), in nats."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int

import quantjax as qj
from experiments import train_language_model
from experiments.describe import digest_of
from experiments.language_model import DecoderConfig, module
from experiments.memory import with_peak
from experiments.method_tables import divergence
from experiments.peers import Made, Network, hqq, qwix, torchao
from experiments.report import environment, print_table
from experiments.rows import NotApplicable, Rows
from experiments.windows import Windows
from quantjax import ptq
from quantjax.policy import preset_spec

PROJECTIONS, EMBEDDING = "layers/**/kernel", "embedding/embedding"
FORMATS = ("w8", "w4g64", "w3g64", "w2g64", "w8a8", "w4a8")
SEQUENCES, BATCH = 128, 16  # of training text, for calibration


class Problem(NamedTuple):
    """What a method gets: the model, its floats, the format's name and calibration batches."""

    config: DecoderConfig
    apply: Callable[..., Any]
    params: Any
    format: str
    batches: Sequence[Int[Array, "b t"]]

    def policy(self, **changes: Any) -> qj.Policy:
        """All projections in the format, with these fields of its spec changed."""
        return qj.Policy([(PROJECTIONS, dataclasses.replace(preset_spec(self.format), **changes))])

    @property
    def activations(self) -> bool:
        return preset_spec(self.format).act is not None


class Method(NamedTuple):
    """run: the tree, with QTensor leaves; or what another package makes. sampled: whether the
    calibration text matters."""

    run: Callable[[Problem], Any]
    sampled: bool = True


def rounded(observer: qj.Observer) -> Method:
    """Each weight to the nearest level; the observer chooses the scales."""

    def run(problem: Problem) -> Any:
        return qj.quantize(problem.params, problem.policy(observer=observer))

    return Method(run, sampled=False)


def nf4(problem: Problem) -> Any:
    """The fixed codebook of QLoRA in place of integers, at the same bits and groups."""
    spec = preset_spec(problem.format)
    if getattr(spec.format, "bits", None) != 4 or problem.activations:
        raise NotApplicable("a codebook of 4 bits, for weights alone")
    return qj.quantize(problem.params, problem.policy(format=preset_spec("nf4").format))


def calibrated(
    make: Callable[..., Any], *, sampled: bool = True, needs_activations: bool = False
) -> Method:
    """What `make` builds for a policy, run by `calibrate`."""

    def run(problem: Problem) -> Any:
        if needs_activations and not problem.activations:
            raise NotApplicable("for formats that quantize activations")
        method = make(problem.policy())
        return qj.calibrate(problem.apply, problem.params, problem.batches, method)

    return Method(run, sampled)


def of_peer(make: Callable[..., Made], *, sampled: bool = False, **options: Any) -> Method:
    """What another package makes of the same arrays and, where it wants them, the same samples."""

    def run(problem: Problem) -> Made:
        model = module(problem.config, problem.params)
        return make(problem.policy(), Network(model, problem.params, problem.batches), **options)

    return Method(run, sampled)


METHODS: dict[str, Method] = {
    "absmax": rounded(qj.absmax()),
    "mse": rounded(qj.mse()),
    "nf4": Method(nf4, sampled=False),
    "rtn": calibrated(ptq.rtn),
    "hqq": calibrated(ptq.hqq, sampled=False),
    "awq": calibrated(ptq.awq),
    "smoothquant": calibrated(ptq.smoothquant, needs_activations=True),
    "gptq as published": calibrated(partial(ptq.gptq, candidates=1, rounds=0)),
    "gptq": calibrated(ptq.gptq),
    "gptq, rotated": calibrated(lambda policy: qj.chain(ptq.rotate(), ptq.gptq(policy))),
    "gptq, rank 8": calibrated(lambda policy: ptq.low_rank(ptq.gptq(policy), rank=8)),
    "adaround": calibrated(ptq.adaround),
    "brecq": calibrated(partial(ptq.brecq, blocks=("layers/*",))),
    "qwix absmax": of_peer(qwix.weights),
    "qwix gptq": of_peer(qwix.weights, method="gptq", sampled=True),
    "qwix awq": of_peer(qwix.weights, method="awq", sampled=True),
    "hqq package": of_peer(hqq.weights),
    "torchao absmax": of_peer(torchao.weights),
    "torchao hqq": of_peer(torchao.weights, algorithm="HQQ_SCALE_ONLY"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """model: see `train_language_model`. windows: how many of the test split, evenly spread; 0
    for all. methods, formats, seeds: the rows to see to in this run. out, publish: as in
    `article`."""

    model: train_language_model.Config
    methods: tuple[str, ...] = tuple(METHODS)
    formats: tuple[str, ...] = FORMATS
    seeds: tuple[int, ...] = (0, 1, 2)
    windows: int = 320
    out: Path = Path("runs")
    publish: bool = False


class Judge(NamedTuple):
    """Perplexity and divergence of a tree on fixed windows, in the compiled float network."""

    apply: Callable[..., Any]
    params: Any
    inputs: Int[np.ndarray, "n t"]
    targets: Int[np.ndarray, "n t"]

    def scores(self, tree: Any, apply: Callable[..., Any] | None = None) -> dict[str, float]:
        """perplexity = exp(mean -log q(target)); kl = mean KL(float || tree), with the standard
        error of its mean over windows, as if these were independent.

        Weights alone are dequantized before; where activations are quantized too, products run
        as `intercept` computes them. apply: what computes with the tree, if neither does."""
        run = apply or self.apply
        if any(isinstance(leaf, qj.QTensor) and leaf.act for leaf in _leaves(tree)):
            run = qj.intercept(self.apply)
        elif apply is None:
            tree = qj.dequantize(tree)
        losses, divergences = [], []
        for start in range(0, len(self.inputs), BATCH):
            x, y = (jnp.asarray(a[start : start + BATCH]) for a in (self.inputs, self.targets))
            loss, kl = _token_scores(self.apply, run, self.params, tree, x, y)
            losses.append(np.asarray(loss, np.float64))
            divergences.append(np.asarray(kl, np.float64))
        kl = np.concatenate(divergences).mean(1)
        return {
            "perplexity": float(np.exp(np.concatenate(losses).mean())),
            "kl": float(kl.mean()),
            "kl_error": float(kl.std(ddof=1) / len(kl) ** 0.5) if len(kl) > 1 else 0.0,
        }


@partial(jax.jit, static_argnums=(0, 1))
def _token_scores(
    apply: Callable[..., Any],
    run: Callable[..., Any],
    params: Any,
    tree: Any,
    x: Int[Array, "b t"],
    y: Int[Array, "b t"],
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    p, q = jax.nn.log_softmax(apply(params, x)), jax.nn.log_softmax(run(tree, x))
    return -jnp.take_along_axis(q, y[..., None], -1)[..., 0], jnp.sum(jnp.exp(p) * (p - q), -1)


def measured(method: Method, problem: Problem, judge: Judge) -> dict[str, Any]:
    """One row: cost of the method, size of what it gives, and how that predicts."""
    began, worked = time.perf_counter(), time.process_time()
    tree, peak = with_peak(lambda: method.run(problem))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    said: dict[str, Any] = {}
    apply = None
    if isinstance(tree, Made):
        said = {"bits_per_weight": tree.bits, "package": tree.package}
        tree, apply = tree.tree, tree.apply
    elif stored := [leaf for leaf in _leaves(tree) if isinstance(leaf, qj.QTensor)]:
        bits = 8 * sum(q.nbytes for q in stored) / sum(q.size for q in stored)
        said = {"bits_per_weight": bits}
    whole = qj.quantize({EMBEDDING: problem.params["embedding"]["embedding"]}, qj.preset("w8"))
    coded = {**tree, "embedding": {"embedding": qj.dequantize(whole)[EMBEDDING]}}
    return {
        **said,
        **judge.scores(tree, apply),
        "embedding_8_bits": judge.scores(coded, apply),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,  # of all cores; other work that runs hardly changes it
        "peak_mb": None if peak is None else peak / 1e6,
    }


def calibration_batches(data: Windows, seed: int) -> list[Int[Array, "b t"]]:
    """128 windows of the training text, drawn by `seed` without repetition."""
    order = np.random.RandomState(seed).permutation(len(data.train_images))[:SEQUENCES]
    return [
        jnp.asarray(data.train_images[order[i : i + BATCH]]) for i in range(0, SEQUENCES, BATCH)
    ]


def main(config: Config) -> None:
    """Sees to the rows that are asked for; prints the table."""
    apply, params, data, history = train_language_model.load(config.model)
    count = len(data.test_labels)
    spread_out = np.linspace(0, count - 1, config.windows or count).astype(int)
    judge = Judge(apply, params, data.test_images[spread_out], data.test_labels[spread_out])
    head = {
        "question": (__doc__ or "").splitlines()[0],
        "checkpoint": digest_of(params),
        "decoder": dataclasses.asdict(config.model.decoder),
        "test": {"windows": len(spread_out), "of": count, "tokens": judge.targets.size},
        "calibration": {"windows": SEQUENCES, "tokens": SEQUENCES * config.model.context},
        "quantized": PROJECTIONS,
    }
    home = Path(__file__).parent if config.publish else config.out
    table = Rows(home / "results" / "ptq_language_model.json", head)
    about = {**environment(), "history": [record._asdict() for record in history]}

    def floats() -> Mapping[str, Any]:
        size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
        whole = Judge(apply, params, data.test_images, data.test_labels)
        perplexity = whole.scores(params)["perplexity"]
        by_word = perplexity ** (whole.targets.size / data.test_words)
        on_all = {"perplexity": perplexity, "perplexity_a_word": by_word}
        return {"bits_per_weight": 32.0, "float_mb": size, **judge.scores(params), "all": on_all}

    table.row({"method": "float", "format": "float32", "seed": None}, floats, **about)
    for turn in config.seeds:  # a whole table of one seed first
        for format in config.formats:
            for name in config.methods:
                method = METHODS[name]
                seed = turn if method.sampled else None
                batches = calibration_batches(data, seed or 0)
                problem = Problem(config.model.decoder, apply, params, format, batches)
                key = {"method": name, "format": format, "seed": seed}
                row = table.row(key, partial(measured, method, problem, judge), **about)
                print(*(f"{k} {v}" for k, v in row.items() if k != "embedding_8_bits"), flush=True)
    for field, digits in (("kl", 4), ("perplexity", 2)):
        shown = divergence({"rows": table.stored()}, field, digits, embedding=False)
        print_table(f"{field} a token", shown.columns, shown.lines)
        print(*shown.notes, sep="\n")


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, qj.QTensor))


if __name__ == "__main__":
    main(tyro.cli(Config))
