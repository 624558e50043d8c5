"""How long does GPTQ of one large layer take, against the paper's own blocked algorithm?
Run: python -m experiments.bench_gptq [--publish]
Time: three minutes on two idle cores.
Result: results/bench_gptq.json. Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.

One process, interleaved rounds, warmed up, every result waited for; medians, and the median of the
ratios within the rounds. Both get the same float32 arrays and the same scales (4 bits, group 128,
of the largest magnitude) and order the columns by diag(H). The baseline is `gptq_paper` with blocks
of 128, NumPy and SciPy's Cholesky."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import quantjax as qj
from experiments import gptq_paper
from experiments.report import environment, print_table, write_json
from experiments.timing import interleaved, speedup
from quantjax.ptq.factor import damped_cholesky
from quantjax.ptq.gptq import gptq_matrix
from quantjax.ptq.matrix import Cells
from quantjax.ptq.sweep import sweep

INT4 = qj.IntFormat(4)
PAPER, OURS = "the paper's algorithm", "quantjax"


@dataclasses.dataclass(frozen=True)
class Config:
    """size: inputs and outputs of the layer. rounds: interleaved measurements of every part. out,
    publish: as in `article`."""

    size: int = 4096
    group: int = 128
    rounds: int = 5
    out: Path = Path("runs")
    publish: bool = False


def make_layer(size: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights w_OI, H of correlated inputs, and the scale under every weight."""
    rng = np.random.default_rng(0)
    w_OI = rng.normal(size=(size, size)).astype(np.float32)
    x_TI = rng.normal(size=(2 * size, size)).astype(np.float32)
    x_TI += x_TI[:, :64] @ rng.normal(size=(64, size)).astype(np.float32) / 8
    groups_OGK = np.abs(w_OI).reshape(size, -1, group)
    scale_OI = np.repeat(groups_OGK.max(2) / np.float32(INT4.max_level), group, axis=1)
    return w_OI, x_TI.T @ x_TI / np.float32(2 * size), scale_OI


def candidates(
    w_OI: np.ndarray, h_II: np.ndarray, scale_OI: np.ndarray
) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: both algorithms, then the parts of ours."""

    def rounded(v: np.ndarray, j: int) -> np.ndarray:
        s = scale_OI[:, j]
        return np.clip(np.round(v / s), INT4.qmin, INT4.qmax) * s

    w, h, scale = (jnp.asarray(a) for a in (w_OI, h_II, scale_OI))
    ours = jax.jit(lambda w, h, s: gptq_matrix(w, h, Cells(s), INT4))
    factor = jax.jit(damped_cholesky)
    lower = factor(h).lower_II

    @jax.jit
    def columns(w: jax.Array, lower: jax.Array, s: jax.Array) -> Any:
        root = jnp.diagonal(lower)
        return sweep(w, w, lower / root, root, Cells(s), INT4)

    return {
        PAPER: lambda: gptq_paper.gptq(w_OI, h_II, rounded),
        OURS: lambda: ours(w, h, scale).q_OI,
        "its factor of H": lambda: factor(h),
        "its columns": lambda: columns(w, lower, scale),
        "a product of the size": lambda: _product(w, h),
    }


_product = jax.jit(jnp.matmul)


def errors(w_OI: np.ndarray, h_II: np.ndarray, q_OI: np.ndarray) -> float:
    """(w - q)' H (w - q), all outputs together, over that of w."""

    def energy(x_OI: np.ndarray) -> float:
        return float(np.sum(x_OI * (x_OI @ h_II), dtype=np.float64))

    return energy(w_OI - q_OI) / energy(w_OI)


def main(config: Config) -> None:
    """Measures; checks that both give the same; prints the table; writes the JSON."""
    layer = make_layer(config.size, config.group)
    calls = candidates(*layer)
    theirs, ours = np.asarray(calls[PAPER]()), np.asarray(calls[OURS]())
    w_OI, h_II, scale_OI = layer
    nearest = np.clip(np.round(w_OI / scale_OI), INT4.qmin, INT4.qmax) * scale_OI
    seconds = interleaved(calls, config.rounds, lead=False)
    rows: list[dict[str, Any]] = [
        {
            "how": how,
            "median_s": statistics.median(values),
            "min_s": min(values),
            "max_s": max(values),
            "times_faster": speedup(seconds[PAPER], values),
        }
        for how, values in seconds.items()
    ]
    payload = {
        "question": (__doc__ or "").splitlines()[0],
        **environment(),
        "size": config.size,
        "group": config.group,
        "rounds": config.rounds,
        # Columns near a tie may fall to the other side in float32, and all after them follow.
        "equal_weights": float(np.mean(np.isclose(theirs, ours, rtol=1e-5))),
        "error": {
            "nearest": errors(w_OI, h_II, nearest),
            PAPER: errors(w_OI, h_II, theirs),
            OURS: errors(w_OI, h_II, ours),
        },
        "rows": rows,
    }
    home = Path(__file__).parent if config.publish else config.out
    write_json(home / "results" / "bench_gptq.json", payload)
    lines = [[r["how"], f"{r['median_s']:.2f}", f"{r['times_faster']:.1f}"] for r in rows]
    print_table(f"GPTQ of {config.size}x{config.size}, CPU", ("", "s", "times faster"), lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
