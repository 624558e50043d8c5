"""What would an intercepted call do? One line a site, then what stays float and why."""

import dataclasses
import textwrap
from collections import Counter
from typing import NamedTuple

from quantjax.interpret.record import Remark, Site

COLUMNS = (
    *("path", "operation", "weights", "activations", "sums over", "computed", "calls"),
    *("MFLOP", "bytes", "of float32"),
)
RIGHT = frozenset({"calls", "MFLOP", "bytes", "of float32"})
WIDTH = 100


class Stored(NamedTuple):
    """Bytes of a parameter, and what they would be in float32."""

    bytes: int
    float32_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Sites and remarks of one traced call; `str` gives a plain-text table.

    stored: by path, the bytes of every parameter. others: the float parameters that no product
    uses, biases mostly.
    """

    sites: tuple[Site, ...]
    remarks: tuple[Remark, ...]
    others: tuple[str, ...] = ()
    stored: dict[str, Stored] = dataclasses.field(default_factory=dict)

    @property
    def bytes_saved(self) -> int:
        """What all parameters take less than in float32."""
        return sum(s.float32_bytes - s.bytes for s in self.stored.values())

    @property
    def flops(self) -> int:
        """Of all products, those of two activations and of low-rank factors included."""
        products = sum(s.flops + s.term_flops for s in self.sites)
        return products + sum(r.flops for r in self.remarks)

    @property
    def low_precision_share(self) -> float:
        """The part of `flops` that is computed in integers or 8-bit floats."""
        return sum(s.flops for s in self.sites if s.low_precision) / max(self.flops, 1)

    def __str__(self) -> str:
        lines = _aligned([COLUMNS, *(self._cells(site) for site in self.sites)])
        lines += [self._total(), *self._activations()]
        for r in self.remarks:
            if r.path:
                lines += _wrapped(f"{r.path}: {r.primitive}: {r.reason}")
        if self.others:
            lines += _wrapped(f"in no product: {', '.join(self.others)}")
        return "\n".join(lines)

    __repr__ = __str__

    def _cells(self, site: Site) -> tuple[str, ...]:
        shape = "x".join(map(str, site.param_shape))
        stored = self.stored.get(site.path)
        return (
            site.path,
            site.primitive,
            ", ".join(filter(None, (f"{site.format} {shape}", site.beside))),
            site.act or "as they are",
            ", ".join(map(str, site.contracting)) or "-",
            site.lowering,
            str(site.calls),
            f"{(site.flops + site.term_flops) / 1e6:.3g}",
            f"{stored.bytes:,}" if stored else "-",
            f"{stored.bytes / max(stored.float32_bytes, 1):.0%}" if stored else "-",
        )

    def _total(self) -> str:
        stored = sum(s.bytes for s in self.stored.values())
        parts = [
            f"{stored:,} bytes of parameters, {self.bytes_saved:,} less than in float32",
            f"{self.low_precision_share:.0%} of {self.flops / 1e6:.3g} MFLOP in low precision",
        ]
        return f"total: {'; '.join(parts)}"

    def _activations(self) -> list[str]:
        """Products of no parameter, counted."""
        found = Counter((r.primitive, r.reason) for r in self.remarks if not r.path)
        flops: Counter[tuple[str, str]] = Counter()
        for r in self.remarks:
            flops[r.primitive, r.reason] += r.flops
        return [
            f"{count} {name}: {reason}, {flops[name, reason] / 1e6:.3g} MFLOP in float"
            for (name, reason), count in found.items()
        ]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    sides = [str.rjust if column[0] in RIGHT else str.ljust for column in columns]
    lines = [
        "  ".join(side(c, w) for side, c, w in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False)
