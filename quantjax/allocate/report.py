"""Which layer hurts, in which format, and why? The report of `sensitivity`, as a value."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from quantjax.allocate.candidates import Option
from quantjax.allocate.measures import Item, Mode
from quantjax.allocate.weights import Rounded, Weights

JSON_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One layer in one format, everything else in float.

    loss: the change of the task's loss, measured or predicted. divergence: KL to the float model's
    outputs, in nats an example; None where the mode does not give it. local_db, accumulated_db:
    SQNR of its products with only its weights quantized, and with the whole model in this format;
    None where its products were not seen. rounded: what became of its weights; None for floats.
    clipping_gain_db: what the MSE search would gain over the largest magnitude as range, in the
    SQNR of the weights; known for the worst layers.
    """

    format: str
    loss: float
    divergence: float | None = None
    local_db: float | None = None
    accumulated_db: float | None = None
    rounded: Rounded | None = None
    clipping_gain_db: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One layer of a parameter. layer: its index along the axes that scans take off. gradient: the
    mean squared derivative of its weights, where the mode gives it. cells: by format."""

    path: str
    layer: tuple[int, ...]
    weights: Weights
    gradient: float | None
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """The path, and the layer if there are several."""
        return "/".join([self.path, *(f"[{i}]" for i in self.layer)])

    def cell(self, format: str) -> Cell:
        """The cell of a format."""
        return next(cell for cell in self.cells if cell.format == format)


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """What quantizing each layer does to the loss; see `sensitivity`. Print it.

    rows: layers in the order of the tree. options: every parameter in every format, with its
    costs. formats: their labels. items, pairs: pairs[k, l] is what the items k and l together add
    to the loss beyond the sum of theirs, where the mode gives it. kept_bytes: of the leaves that
    no format quantizes. examples, batches: how many the loss was measured on.
    """

    rows: tuple[Row, ...]
    options: tuple[Option, ...]
    formats: tuple[str, ...]
    items: tuple[Item, ...]
    pairs: Float[np.ndarray, "K K"] | None
    mode: Mode
    kept_bytes: int
    examples: int
    batches: int

    def ranking(self, format: str | None = None) -> tuple[Row, ...]:
        """The layers by what they cost in a format, the worst first; in the one of most loss if
        none is given."""
        format = self.coarsest if format is None else format
        if format not in self.formats:
            raise ValueError(f"ranking: {format!r} is none of {list(self.formats)}.")
        return tuple(sorted(self.rows, key=lambda row: -row.cell(format).loss))

    @property
    def coarsest(self) -> str:
        """The format of the largest loss over all layers together."""
        return max(self.formats, key=lambda f: sum(row.cell(f).loss for row in self.rows))

    def why(self, row: Row, format: str) -> tuple[str, ...]:
        """What explains the loss of a layer in a format, in words."""
        from quantjax.allocate.words import reasons

        return reasons(row, row.cell(format), self.rows)

    def to_text(self) -> str:
        """Losses of all layers and formats, and the worst three of each format with reasons."""
        from quantjax.allocate.words import text

        return text(self)

    def to_html(self) -> str:
        """A self-contained page with figures."""
        from quantjax.allocate.page import page

        return page(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, numbers and strings."""
        pairs = None if self.pairs is None else np.asarray(self.pairs).tolist()
        return {
            "version": JSON_VERSION,
            "mode": self.mode.value,
            "examples": self.examples,
            "batches": self.batches,
            "formats": list(self.formats),
            "kept_bytes": self.kept_bytes,
            "rows": [
                dataclasses.asdict(row)
                | {"name": row.name, "why": {f: list(self.why(row, f)) for f in self.formats}}
                for row in self.rows
            ],
            "options": [
                {**dataclasses.asdict(dataclasses.replace(o, spec=None)), "spec": repr(o.spec)}
                for o in self.options
            ],
            "items": [item._asdict() for item in self.items],
            "pairs": pairs,
        }

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON. Numbers it has no word for are strings that `float` reads: "inf"."""
        return json.dumps(_plain(self.to_dict()), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.to_html()


def _plain(value: Any) -> Any:
    """The same with infinities and NaN as strings, and tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
