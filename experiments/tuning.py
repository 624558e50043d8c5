"""Which learning rate? The best one on validation examples, tried with the first seed alone."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from experiments.report import environment
from experiments.rows import Rows

Rates = tuple[float, ...]


def tuned(
    rates: Rates,
    run: Callable[[float], Any],
    score: Callable[[Any], float],
    better: Callable[..., float] = max,
) -> tuple[Any, float, dict[str, Any]]:
    """What `run` gives at the rate whose score is best, that score, and for the row: the rate, what
    each came to, and the seconds that the runs took, on the clock and of the processor.

    >>> found, value, row = tuned((0.1, 0.3), lambda rate: rate, lambda x: -abs(x - 0.25))
    >>> found, round(value, 2), row["rate"], list(row["rates"])
    (0.3, -0.05, 0.3, ['0.1', '0.3'])
    """
    start, worked = time.perf_counter(), time.process_time()
    found = {rate: run(rate) for rate in rates}
    cost = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}
    scores = {rate: score(result) for rate, result in found.items()}
    best = better(rates, key=scores.__getitem__)
    shown = {f"{rate:g}": value for rate, value in scores.items()}
    return found[best], scores[best], {"rate": best, "rates": shown, **cost}


def tuned_row(
    rows: Rows,
    key: Mapping[str, Any],
    compute: Callable[[Rates], Mapping[str, Any]],
    chosen: dict[Hashable, float],
    cell: Hashable,
    rates: Rates,
) -> None:
    """Computes and prints one row, `compute(rates)`, with the rate that was chosen for the cell, or
    with all of them, and keeps in `chosen` the one that it took."""
    asked = (chosen[cell],) if cell in chosen else rates
    row = rows.row(key, lambda: compute(asked), **environment())
    print(row, flush=True)
    if "rate" in row:
        chosen.setdefault(cell, row["rate"])
