"""How fast does a network run on quantized parameters, against float32 and against the machine?
Run: python -m experiments.bench_inference [--cases 'mlp*' decode] [--publish]
Time: six minutes on two cores.
Result: results/bench_inference.json. Qwix is timed beside where it is installed.

Each candidate is `jax.jit(qj.intercept(apply))(qparams, *args)` on the unmodified function. One
process, interleaved rounds, warmed up; medians, and ratios to float32 within each round. The
hardware's limits are measured in the same run. Every output is compared with float32's."""

import dataclasses
import fnmatch
import importlib.metadata
import importlib.util
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

import quantjax as qj
from experiments.bench_candidates import FROM_MEMORY, candidates, quantized_trees, tree_bytes
from experiments.bench_models import CASES, Case
from experiments.report import environment, print_table, write_json
from experiments.tables import inference_markdown
from experiments.timing import hardware_limits, interleaved, speedup
from quantjax.ops import probe

# Of the output, relative: eight layers in a row, whose roundings lose 0.8 % and 11 % each at most.
BOUNDS = {8: 0.05, 4: 0.5}


@dataclasses.dataclass(frozen=True)
class Config:
    """cases: patterns of the names in `bench_models.CASES`. seconds: of measuring each case.
    out, publish: as in `article`."""

    cases: tuple[str, ...] = ("*",)
    seconds: float = 12.0
    out: Path = Path("runs")
    publish: bool = False


def relative_error(y: Any, reference: Any) -> float:
    """|y - reference| / |reference| over all outputs together."""
    pairs = list(zip(jax.tree.leaves(y), jax.tree.leaves(reference), strict=True))
    error = sum(float(np.sum((np.asarray(a, np.float64) - b) ** 2)) for a, b in pairs)
    return math.sqrt(error / sum(float(np.sum(np.asarray(b, np.float64) ** 2)) for _, b in pairs))


def measure(case: Case, limits: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    """One row for each candidate."""
    found = candidates(case)
    calls = {name: candidate.call(case.args) for name, candidate in found.items()}
    outputs = {name: jax.block_until_ready(call()) for name, call in calls.items()}
    errors = {name: relative_error(y, outputs["float32"]) for name, y in outputs.items()}
    for name, error in errors.items():
        if not error <= BOUNDS[4 if "w4" in name else 8]:
            raise AssertionError(f"{case.name}: {name} is {error:.1%} off float32.")
    once = {name: min(times) for name, times in interleaved(calls, 1).items()}
    # From memory one measurement reads each copy once; else it lasts ten milliseconds at least.
    repeats = {name: math.ceil(0.01 / t) for name, t in once.items()}
    if case.from_memory:
        repeats = {name: len(candidate.trees) for name, candidate in found.items()}
    lasts = sum(once[name] * (repeats[name] + (not case.from_memory)) for name in calls)
    rounds = min(max(int(seconds / lasts) - 2, 5), 30)
    times = interleaved(calls, rounds, repeats=repeats, lead=not case.from_memory)
    ops = sum(site.flops for site in found["float32"].sites)
    rows = []
    for name, candidate in found.items():
        median, size = statistics.median(times[name]), tree_bytes(candidate.trees[0])
        peak = limits["int8_ops_per_s" if "a8" in name else "float32_ops_per_s"]
        ways = Counter(site.lowering for site in candidate.sites)
        rows.append(
            {
                "case": case.name,
                "how": name,
                "median_ms": 1e3 * median,
                "min_ms": 1e3 * min(times[name]),
                "max_ms": 1e3 * max(times[name]),
                "times_float32": speedup(times["float32"], times[name]),
                "share_of_ops": ops / median / peak,
                "share_of_bandwidth": size / median / limits["read_bytes_per_s"],
                "relative_error": errors[name],
                "lowering": "; ".join(f"{n} x {way}" for way, n in ways.items()),
                "mb": size / 1e6,
                "copies": len(candidate.trees),
                "calls": repeats[name],
                "rounds": rounds,
            }
        )
    return rows


def compile_seconds(case: Case, rounds: int = 5) -> list[dict[str, Any]]:
    """Tracing plus compiling, intercepted against float: a new function object every time. What
    a process finds out once, about the CPU and in caches of JAX, is found out before."""

    def timed(tree: Any, how: Callable[[Callable], Callable]) -> float:
        fresh = lambda *args: case.apply(*args)  # noqa: E731
        began = time.perf_counter()
        jax.jit(how(fresh)).lower(tree, *case.args).compile()
        return time.perf_counter() - began

    trees = quantized_trees(case)
    times: dict[str, list[float]] = {name: [] for name in trees}
    for turn in range(rounds + 1):
        for name, tree in trees.items():
            how = (lambda f: f) if name == "float32" else qj.intercept
            spent = timed(tree, how)
            times[name] += [spent] if turn else []
    return [
        {
            "case": case.name,
            "how": name,
            "median_s": statistics.median(spent),
            "times_as_long": 1 / speedup(times["float32"], spent),
        }
        for name, spent in times.items()
    ]


def stacked_memory(layers: int = 12, width: int = 1024, rows: int = 32) -> dict[str, Any]:
    """Temporary bytes of a scanned model on 8-bit weights, as the compiler counts them, beside one
    layer's floats and beside those of dequantizing the tree first."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (layers, width, width))}
    x = jax.ShapeDtypeStruct((rows, width), np.float32)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["kernel"])[0]

    tree = qj.quantize(params, "w8", sites=qj.sites(apply, params, x))

    def temporary(run: Callable) -> int:
        memory = jax.jit(run).lower(tree, x).compile().memory_analysis()
        assert memory is not None, f"{jax.default_backend()} does not count memory"
        return memory.temp_size_in_bytes

    found = temporary(qj.intercept(apply))
    layer = 4 * width * width
    if found > 1.5 * layer:
        raise AssertionError(f"{layers} stacked layers take {found} bytes, one has {layer}.")
    whole = temporary(lambda tree, x: apply(qj.dequantize(tree), x))
    sizes = {"one_layer_bytes": layer, "intercepted_bytes": found, "dequantized_bytes": whole}
    return {"layers": layers, "width": width, "rows": rows, **sizes}


def main(config: Config) -> None:
    """Measures the cases asked for; prints the table; writes the JSON."""
    names = [n for n in CASES if any(fnmatch.fnmatch(n, pattern) for pattern in config.cases)]
    if not names:
        raise SystemExit(f"no case matches {config.cases}; cases: {', '.join(CASES)}.")
    payload = {"question": (__doc__ or "").splitlines()[0], **environment()}
    if importlib.util.find_spec("qwix"):
        payload["versions"]["qwix"] = importlib.metadata.version("qwix")
    payload["from_memory"] = (
        f"the calls of one measurement read every copy of the weights once, "
        f"{FROM_MEMORY / 2**20:.0f} MiB of each format; the other formats come in between"
    )
    payload["limits"] = limits = hardware_limits()
    if jax.default_backend() == "cpu":
        payload["integer_product"] = str(probe())
    payload["stacked"] = stacked_memory()
    payload["rows"], payload["compile"] = [], []
    console = Console(stderr=True)
    for name in names:
        case = CASES[name]()
        console.print(case.name)
        payload["rows"] += measure(case, limits, config.seconds)
        if name == "prefill":
            payload["compile"] += compile_seconds(case)
        del case
    home = Path(__file__).parent if config.publish else config.out
    write_json(home / "results" / "bench_inference.json", payload)
    title = f"Speed against float32, {payload['device']} ({payload['backend']})"
    print_table(title, *inference_markdown(payload))
    print(home / "results" / "bench_inference.json")


if __name__ == "__main__":
    main(tyro.cli(Config))
