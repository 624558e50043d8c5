"""How long do some calls take beside each other, and how fast can this machine be at all?

Calls are timed in one process in interleaved rounds, warmed up, every result waited for, so that
a slow moment of the machine meets all of them. Compare medians, or better the ratios within each
round."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.ops import integer_dot_general

Call = Callable[[], Any]
LARGE = 2**28  # floats, 1 GiB: more than any cache holds


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    repeats: Mapping[str, int] | None = None,
    lead: bool = True,
) -> dict[str, list[float]]:
    """Seconds a call, of every call in every round but two that come before.

    repeats: how many calls in a row are one measurement, by name, else one. lead: each is called
    once more before it is timed; what ran before leaves the allocator with pages that the next
    call would have to fault in anew. Without it, what a call reads is as cold as the others
    leave it."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            count = 1 if repeats is None else repeats.get(name, 1)
            if lead:
                jax.block_until_ready(call())
            began = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(call())
            if turn >= 2:
                seconds[name].append((time.perf_counter() - began) / count)
    return seconds


def speedup(base: Sequence[float], seconds: Sequence[float]) -> float:
    """How many times faster than the base: the median of the ratios within the rounds.

    >>> speedup([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    2.0
    """
    return statistics.median(b / s for b, s in zip(base, seconds, strict=True))


def hardware_limits(rounds: int = 8, *, size: int = LARGE, side: int = 2048) -> dict[str, float]:
    """What the machine reaches at best: bytes read per second from an array of `size` floats,
    and operations per second (two a multiply-add) of products of `side`^3, float32 and int8.

    The best round counts, of two ways to read, as XLA compiles sums along rows and columns apart,
    and of activation codes with a sign and without."""
    large = jnp.ones((size // 2**10, 2**10), jnp.float32)
    x = jax.random.normal(jax.random.key(0), (side, side))
    u8, s8 = (x * 40 + 128).astype(jnp.uint8), (x * 40).astype(jnp.int8)
    numbers = (((1,), (0,)), ((), ()))
    sums, rows = jax.jit(lambda a: a.sum(0)), jax.jit(lambda a: a.sum(1))
    product = jax.jit(jnp.matmul)
    integers = jax.jit(lambda x, w: integer_dot_general(x, w, numbers))
    calls: dict[str, Call] = {
        "columns": lambda: sums(large),
        "rows": lambda: rows(large),
        "float32": lambda: product(x, x),
        "unsigned": lambda: integers(u8, s8),
        "signed": lambda: integers(s8, s8),
    }
    best = {name: min(times) for name, times in interleaved(calls, rounds).items()}
    exact = np.asarray(u8[:2], np.int64) @ np.asarray(s8, np.int64)
    np.testing.assert_array_equal(integers(u8, s8)[:2], exact)
    return {
        "read_bytes_per_s": large.nbytes / min(best["columns"], best["rows"]),
        "float32_ops_per_s": 2 * side**3 / best["float32"],
        "int8_ops_per_s": 2 * side**3 / min(best["unsigned"], best["signed"]),
    }
