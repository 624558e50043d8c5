"""Which cases of a long table are asked every day? A few; the full suite asks all."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def daily(cases: Iterable[Any], core: Collection[Any]) -> list[Any]:
    """The cases, with a mark on those that only `make test-full` asks."""
    cases = list(cases)
    assert all(case in cases for case in core), f"{core} are not all among {cases}"
    return [pytest.param(c, marks=[] if c in core else pytest.mark.full) for c in cases]


def dealt(*tables: Iterable[Any]) -> list[Any]:
    """The product of the tables. Daily are as many cases as the longest table is long, in which
    each entry of each table comes up; the others carry the mark. A table may be one of `daily`."""
    rows = [[_param(entry) for entry in table] for table in tables]
    free = [[i for i, entry in enumerate(row) if not entry.marks] for row in rows]
    # Once through a table, the next round is shifted: two short tables do not go in step.
    few = {
        tuple(own[(k + k // len(own)) % len(own)] for own in free)
        for k in range(max(map(len, free)))
    }
    return [
        pytest.param(
            *(value for row, i in zip(rows, at, strict=True) for value in row[i].values),
            marks=[] if at in few else pytest.mark.full,
        )
        for at in itertools.product(*(range(len(row)) for row in rows))
    ]


def _param(entry: Any) -> Any:
    return entry if isinstance(entry, type(pytest.param())) else pytest.param(entry)
