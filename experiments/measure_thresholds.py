"""Where does each form of a product win on this machine? The numbers of quantjax/ops/thresholds.py.

Run: python -m experiments.measure_thresholds          Time: 3 minutes on two cores.
Ratios to float32 of the same shape in the same process, medians, all forms in turn. There are
several weights of each kind, so that they come from memory and not from a cache."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import quantjax as qj
from quantjax import ops
from quantjax.ops.blocked import blocked_dot
from quantjax.ops.vector import count_terms, vector_dot

PLAIN = (((1,), (0,)), ((), ()))
FORMATS = {"int8": "w8", "int4": "w4", "int4, groups of 32": "w4g32"}


@dataclasses.dataclass(frozen=True)
class Config:
    """sizes: of square weights. rows: of x. groups: codes in one. rounds: over all weights."""

    sizes: tuple[int, ...] = (512, 1024, 4096)
    rows: tuple[int, ...] = (1, 2, 8, 64, 256)
    groups: tuple[int, ...] = (32, 64, 128)
    rounds: int = 3


def ratios(forms: dict[str, Any], x: Any, rounds: int) -> dict[str, float]:
    """How many times faster than float32 each form is; all in turn over their weights."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(-1, rounds * len(next(iter(forms.values()))[1])):  # the first one compiles
        for name, (fn, weights) in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(x, weights[i % len(weights)]))
            times[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(t[1:])) for name, t in times.items()}
    return {name: round(medians["float32"] / median, 2) for name, median in medians.items()}


def weight_only(config: Config, rng: np.random.Generator) -> None:
    """Vector by vector, in blocks, and dequantized as a whole."""

    def vectors(x: Any, q: Any) -> Any:
        return jnp.stack([vector_dot(row, q, (0,)) for row in x])

    for size in config.sizes:
        shape = (min(2**27 // size**2, 32), size, size)  # 512 MiB of floats, or 32 weights
        floats = list(jnp.asarray(rng.normal(size=shape), jnp.float32))
        for name, preset in FORMATS.items():
            weights = [qj.quantize({"kernel": w}, preset)["kernel"] for w in floats]
            for rows in config.rows:
                x = jnp.asarray(rng.normal(size=(rows, size)), jnp.float32)
                forms: dict[str, Any] = {
                    "float32": (jax.jit(jnp.matmul), floats),
                    "dequantized": (jax.jit(lambda x, q: x @ qj.dequantize(q)), weights),
                    "blocks": (jax.jit(lambda x, q: blocked_dot(x, q, (0,))), weights),
                }
                if rows <= 4 and count_terms(weights[0], (0,)):
                    forms["vectors"] = (jax.jit(vectors), weights)
                print(f"{size} x {size} {name}, {rows} rows:", ratios(forms, x, config.rounds))


def grouped(config: Config, rng: np.random.Generator) -> None:
    """Integer sums of groups against the float product of the dequantized weight."""
    size = 1024
    for rows in (1, 8, 32, 128, 512):
        x = jnp.asarray(rng.integers(-127, 128, (rows, size)), jnp.int8)
        w = jnp.asarray(rng.integers(-8, 8, (size, size)), jnp.int8)
        for group in config.groups:
            scale = jnp.ones((size // group, size), jnp.float32)

            def floats(x: Any, args: Any, group: int = group) -> Any:
                w = args[0] * jnp.repeat(args[1], group, 0)
                return lax.dot_general(x.astype(jnp.float32), w, PLAIN)

            forms: dict[str, Any] = {
                "float32": (
                    jax.jit(lambda x, w: x.astype(jnp.float32) @ w),
                    [w.astype(jnp.float32)],
                ),
                "dequantized": (jax.jit(floats), [(w, scale)]),
                "groups": (jax.jit(lambda x, args: ops.grouped_dot(x, *args)), [(w, scale)]),
            }
            print(f"{rows} rows, groups of {group}:", ratios(forms, x, 9 * config.rounds))


if __name__ == "__main__":
    config = tyro.cli(Config)
    print(f"jax {jax.__version__} on {jax.default_backend()}; integer products: {ops.probe()}")
    weight_only(config, np.random.default_rng(0))
    grouped(config, np.random.default_rng(0))
