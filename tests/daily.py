"""Which cases of a long table are asked every day? A few; the full suite asks all."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def daily(cases: Iterable[Any], core: Sequence[Any]) -> list[Any]:
    """The cases, with a mark on those that only `make test-full` asks."""
    cases = list(cases)
    assert all(case in cases for case in core), f"{core} are not all among {cases}"
    return [pytest.param(c, marks=[] if c in core else pytest.mark.full) for c in cases]
