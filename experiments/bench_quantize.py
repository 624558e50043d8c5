"""How long does quantizing take, against merely reading the array and casting it?
Run: python -m experiments.bench_quantize [--publish]
Time: two minutes on two cores.
Result: results/bench_quantize.json. Qwix and torchao are timed beside where they are installed.

One process, interleaved rounds, warmed up, every result waited for; medians and ratios to the
jitted `x.astype(int8)` of the same run. Peak memory is measured in a process of its own."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import quantjax as qj
from experiments.memory import with_peak
from experiments.report import environment, print_table, write_json
from experiments.tables import bench_markdown
from experiments.timing import interleaved

CASES = {"4096x4096": (1, 4096, 4096), "48 x 2048x2048": (48, 2048, 2048)}
INT4 = qj.QuantSpec(format=qj.IntFormat(4), group=128)
POLICIES = {
    "int8 per channel": qj.preset("w8"),
    "int4 group 128": qj.Policy(otherwise=INT4),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """rounds: interleaved measurements of every case. out, publish: as in `article`."""

    rounds: int = 20
    out: Path = Path("runs")
    publish: bool = False
    peak: str = ""  # used by the command itself: "case/how", to measure its memory alone


def make_tree(case: str) -> dict[str, dict[str, jax.Array]]:
    """Standard normal kernels."""
    count, rows, columns = CASES[case]
    block = jax.random.normal(jax.random.key(0), (rows, columns))
    # Sums are XLA's own buffers; an array of NumPy's may be shared, and copied when first used.
    return {f"layer{i}": {"kernel": block + np.float32(i)} for i in range(count)}


def candidates(tree: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    cast = jax.jit(lambda x: x.astype(jnp.int8))
    found: dict[str, Callable[[], Any]] = {
        "read and cast": functools.partial(jax.tree.map, cast, tree),
    }
    for name, policy in POLICIES.items():
        found[f"quantjax {name}"] = functools.partial(qj.quantize, tree, policy)
    if importlib.util.find_spec("qwix"):
        found |= _qwix(tree)
    if importlib.util.find_spec("torchao"):
        found |= _torchao(tree)
    return found


def _qwix(tree: Any) -> dict[str, Callable[[], Any]]:
    from qwix._src.core import qarray
    from qwix._src.providers import ptq

    found: dict[str, Callable[[], Any]] = {}
    for name, qtype, tile in (
        ("int8 per channel", jnp.int8, None),
        ("int4 group 128", jnp.int4, 128),
    ):
        tiled = {0: tile} if tile else {}
        how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes=tiled)
        # What tracing its model would give: the shapes, and how each is quantized.
        shapes = jax.eval_shape(lambda x: x, tree)
        plan = jax.tree.map(lambda x, how=how: ptq.WithAux(x, how), shapes)
        found[f"qwix {name}"] = functools.partial(ptq.quantize_params, tree, plan)
    return found


def _torchao(tree: Any) -> dict[str, Callable[[], Any]]:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    weights = [torch.from_numpy(np.array(x)) for x in jax.tree.leaves(tree)]

    def run() -> Any:
        layers = []
        for weight in weights:
            layer = torch.nn.Linear(*weight.shape, bias=False)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            quantize_(layer, Int8WeightOnlyConfig())
            layers.append(layer)
        return layers

    return {"torchao int8 per channel": run}


def peak_bytes(case: str, how: str) -> int | None:
    """Growth of the peak resident memory of a fresh process while it quantizes once."""
    command = [sys.executable, "-m", "experiments.bench_quantize", "--peak", f"{case}/{how}"]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(out.stdout.split()[-1]) if out.returncode == 0 else None


def print_peak(case: str, how: str) -> None:
    """The child's part of `peak_bytes`. One leaf is quantized before, so that imports and
    compilation do not count."""
    tree = make_tree(case)
    jax.block_until_ready(tree)
    first = dict([next(iter(tree.items()))])
    jax.block_until_ready(candidates(first)[how]())
    call = candidates(tree)[how]
    print(with_peak(call)[1])


def main(config: Config) -> None:
    """Measures every case; prints the table; writes the JSON."""
    if config.peak:
        print_peak(*config.peak.split("/"))
        return
    rows = []
    for case in CASES:
        tree = make_tree(case)
        size = sum(x.nbytes for x in jax.tree.leaves(tree))
        rounds = max(5, config.rounds // (1 if case == "4096x4096" else 2))
        seconds = interleaved(candidates(tree), rounds)
        base = statistics.median(seconds["read and cast"])
        for how, values in seconds.items():
            peak = peak_bytes(case, how) if sys.platform == "linux" else None
            rows.append(
                {
                    "case": case,
                    "how": how,
                    "median_ms": 1e3 * statistics.median(values),
                    "min_ms": 1e3 * min(values),
                    "max_ms": 1e3 * max(values),
                    "ratio_to_pass": statistics.median(values) / base,
                    "rounds": rounds,
                    "input_mb": size / 1e6,
                    "peak_mb": None if peak is None else peak / 1e6,
                }
            )
        del tree
    payload = {"question": (__doc__ or "").splitlines()[0], **environment(), "rows": rows}
    for peer in ("qwix", "torchao"):
        if importlib.util.find_spec(peer):
            payload["versions"][peer] = importlib.metadata.version(peer)
    home = Path(__file__).parent if config.publish else config.out
    write_json(home / "results" / "bench_quantize.json", payload)
    print_table("Quantizing float32, CPU", *bench_markdown(payload))


if __name__ == "__main__":
    main(tyro.cli(Config))
