"""A summary as a value: the rows, their totals and warnings, as text, HTML and JSON."""

import dataclasses
import json
import math
from typing import Any

from quantjax.summary import table
from quantjax.summary.rows import Row, Totals, totals, warnings

JSON_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Summary:
    """The report of `summary`: rows in the order of the tree, totals, warnings.

    `str` gives a plain-text table, `to_html` one for a page or notebook, `to_json` all numbers.
    """

    rows: tuple[Row, ...]

    @property
    def totals(self) -> Totals:
        """Sums over the rows."""
        return totals(self.rows)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line per leaf and kind of bad scale: NaN, infinite, zero."""
        return warnings(self.rows)

    def to_text(self, width: int = 100) -> str:
        """A plain-text table. Paths are shortened towards `width`, but never until two agree."""
        return table.text(self.rows, width)

    def to_html(self) -> str:
        """A self-contained HTML table, everything escaped."""
        return table.html_table(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Rows, totals and warnings as dicts, lists, numbers and strings."""
        derived = {"ratio": self.totals.ratio, "bits_per_weight": self.totals.bits_per_weight}
        return {
            "version": JSON_VERSION,
            "totals": dataclasses.asdict(self.totals) | derived,
            "warnings": list(self.warnings),
            "rows": [
                dataclasses.asdict(row)
                | {"size": row.size, "bits_per_weight": row.bits_per_weight}
                | {"shape": _list(row.shape), "block": _list(row.block)}
                for row in self.rows
            ],
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON. Numbers it has no word for are strings that `float` reads: "inf"."""
        return json.dumps(_plain(self.to_dict()), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.to_html()


def _list(sizes: tuple[int | None, ...] | None) -> list[int | None] | None:
    return None if sizes is None else list(sizes)


def _plain(value: Any) -> Any:
    """The same with infinities and NaN as strings."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
