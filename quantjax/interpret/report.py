"""What would an intercepted call do? One line a site, then what stays float and why."""

import dataclasses
import textwrap
from collections import Counter

from quantjax.interpret.record import Remark, Site

COLUMNS = ("path", "operation", "weights", "activations", "sums over", "computed", "calls", "MFLOP")


@dataclasses.dataclass(frozen=True)
class Report:
    """Sites and remarks of one traced call; `str` gives a plain-text table.

    others: the float parameters that no product uses, biases mostly.
    """

    sites: tuple[Site, ...]
    remarks: tuple[Remark, ...]
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [COLUMNS, *(_cells(site) for site in self.sites)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        lines = [line.rstrip() for line in lines]
        lines.insert(1, "  ".join("-" * w for w in widths))
        activations = Counter(r.primitive for r in self.remarks if not r.path)
        for name, count in activations.items():
            lines.append(f"{count} {name} of two activations stay float")
        lines += [f"{r.path}: {r.primitive}: {r.reason}" for r in self.remarks if r.path]
        if self.others:
            text = f"in no product: {', '.join(self.others)}"
            lines += textwrap.wrap(text, 100, subsequent_indent="  ", break_long_words=False)
        return "\n".join(lines)

    __repr__ = __str__


def _cells(site: Site) -> tuple[str, ...]:
    shape = "x".join(map(str, site.param_shape))
    return (
        site.path,
        site.primitive,
        f"{site.format} {shape}",
        site.act or "as they are",
        ", ".join(map(str, site.contracting)) or "-",
        site.lowering,
        str(site.calls),
        f"{site.flops / 1e6:.3g}",
    )
