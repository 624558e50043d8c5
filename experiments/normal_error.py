"""How near is the MSE search to the best uniform step, and k-means to the best codebook?
Run: python -m experiments.normal_error [--publish]
Time: a quarter of a minute on two cores.
Result: results/normal_error.json: mean squared error of 10^6 standard normal values, 3 seeds, next
to the optimum: of uniform levels from the integral over the density, of any levels from Max 1960,
"Quantizing for minimum distortion", table I."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import quantjax as qj
from experiments.report import environment, print_table, spread, write_json
from experiments.tables import normal_markdown

# Of half-integer, full and narrow levels at their best step; of free levels.
OPTIMUM = {
    2: {"half": 0.1188, "full": 0.1494, "narrow": 0.1902, "learned": 0.1175},
    3: {"half": 0.0374, "full": 0.0406, "narrow": 0.0469, "learned": 0.03454},
    4: {"half": 0.01154, "full": 0.01186, "narrow": 0.01289, "learned": 0.009497},
    5: {"half": 0.00350, "full": 0.00353, "narrow": 0.00369, "learned": 0.002499},
    6: {"half": 0.00104, "full": 0.001043, "narrow": 0.001069},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """values: of each sample. out, publish: as in `article`."""

    values: int = 1_000_000
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("runs")
    publish: bool = False


def spec_of(bits: int, levels: str) -> qj.QuantSpec:
    """One scale for the whole sample, or one learned codebook."""
    if levels == "learned":
        return qj.QuantSpec(format=qj.Codebook.learned(bits), block=qj.Granularity.TENSOR)
    grid = qj.IntFormat(bits, levels=qj.Levels(levels))
    return qj.QuantSpec(format=grid, block=qj.Granularity.TENSOR, observer=qj.mse())


def error(values: jax.Array, spec: qj.QuantSpec) -> float:
    """Mean squared error of D(Q(x))."""
    fake = qj.fake_quantize({"x": values}, qj.Policy([("x", spec)]))["x"]
    return float(jnp.mean((fake - values) ** 2))


def main(config: Config) -> None:
    """Measures every case; prints the table; writes the JSON."""
    samples = [jax.random.normal(jax.random.key(seed), (config.values,)) for seed in config.seeds]
    rows: list[dict[str, Any]] = []
    for bits, optima in OPTIMUM.items():
        for levels, optimum in optima.items():
            found = spread(error(x, spec_of(bits, levels)) for x in samples)
            ratio = found["mean"] / optimum
            rows.append(
                {"bits": bits, "levels": levels, "error": found, "optimum": optimum, "ratio": ratio}
            )
    shown = {"values": config.values, "seeds": config.seeds}
    question = (__doc__ or "").splitlines()[0]
    payload = {"question": question, "config": shown, **environment(), "rows": rows}
    home = Path(__file__).parent if config.publish else config.out
    write_json(home / "results" / "normal_error.json", payload)
    print_table("Mean squared error of a normal sample", *normal_markdown(payload))


if __name__ == "__main__":
    main(tyro.cli(Config))
