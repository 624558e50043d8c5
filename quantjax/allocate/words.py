"""Why does this layer hurt? What stands out about it, in words; and the report as plain text."""

import statistics
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from quantjax.allocate.weights import OUTLIER, Channels
from quantjax.summary.table import shorten

if TYPE_CHECKING:
    from quantjax.allocate.report import Cell, Row, Sensitivity

WIDTH = 100


def reasons(row: "Row", cell: "Cell", rows: Sequence["Row"]) -> tuple[str, ...]:
    """What explains its loss: first its weights, then what the format did to them, then how much
    the loss depends on them."""
    if cell.rounded is None:
        return ()
    others = [c for r in rows for c in r.cells if c.format == cell.format and c.rounded is not None]
    found = [*_weights(row), *_format(cell), *_context(row, cell, rows, others)]
    return tuple(found)


def _weights(row: "Row") -> Iterator[str]:
    w = row.weights
    yield from _channels(w.inputs, "input", "they stretch the range of every output's scale")
    yield from _channels(w.outputs, "output", "a scale that they share with others is theirs")
    if w.peak > 3 and not w.inputs.outliers and not w.outputs.outliers:
        yield f"the largest weight is {w.peak:.1f} times the 99.9th percentile"
    elif w.kurtosis > 10:
        yield f"heavy tails: a kurtosis of {w.kurtosis:.0f}, where a normal sample has 3"


def _channels(c: Channels, side: str, effect: str) -> Iterator[str]:
    if 0 < c.outliers <= c.count / 4:
        what = f"{c.outliers} outlier {side} {_plural('channel', c.outliers)} of {c.count}"
        yield f"{what} (above {OUTLIER:.0f} times the median, up to {c.spread:.0f}): {effect}"
    elif c.outliers:
        yield (
            f"{side} channels of very different sizes, the largest {c.spread:.0f} times the "
            f"median: {effect}"
        )
    if c.dead:
        yield f"{c.dead} of {c.count} {side} {_plural('channel', c.dead)} dead: all but zero"


def _plural(noun: str, n: int) -> str:
    return noun if n == 1 else f"{noun}s"


def _format(cell: "Cell") -> Iterator[str]:
    r = cell.rounded
    assert r is not None
    if r.used < 0.6 * r.levels:
        yield f"codes used: {r.used:.0f} of {r.levels} for each scale"
    if r.clipping > 0.5:
        yield f"{r.clipping:.0%} of its squared error is clipping: the range is too small"
    if cell.clipping_gain_db is not None and cell.clipping_gain_db > 1:
        yield f"clipping would gain {cell.clipping_gain_db:.1f} dB: use observer=mse()"


def _context(
    row: "Row", cell: "Cell", rows: Sequence["Row"], others: Sequence["Cell"]
) -> Iterator[str]:
    r = cell.rounded
    assert r is not None
    typical = statistics.median(c.rounded.sqnr_db for c in others if c.rounded is not None)
    if r.sqnr_db < typical - 3:
        yield f"its weights keep {r.sqnr_db:.1f} dB; the median layer {typical:.1f}"
    large = row.weights.rms / (statistics.median(x.weights.rms for x in rows) or 1.0)
    if large > 3:
        yield f"its weights are large: {large:.1f} times the root mean square of the median layer"
    gradients = [x.gradient for x in rows if x.gradient]
    if row.gradient and len(gradients) > 1:
        ratio = row.gradient / statistics.median(gradients)
        if ratio > 3:
            yield f"the loss depends on it: {ratio:.0f} times the median squared derivative"
    if cell.local_db is not None and cell.accumulated_db is not None:
        local = [c.local_db for c in others if c.local_db is not None]
        if cell.local_db < statistics.median(local) - 3 and r.sqnr_db > cell.local_db + 3:
            yield (
                f"its products keep {cell.local_db:.1f} dB, less than its weights "
                f"({r.sqnr_db:.1f}): the errors add up over its inputs, or outputs cancel"
            )
        if cell.accumulated_db < cell.local_db - 6:
            yield (
                f"with all layers quantized its products keep {cell.accumulated_db:.1f} dB of the "
                f"{cell.local_db:.1f} that its own weights leave: most comes from before it"
            )


def text(report: "Sensitivity") -> str:
    """The report for a terminal."""
    names = shorten([row.name for row in report.rows], 40)
    header = ["layer", "weights", *report.formats]
    body = [
        [name, f"{row.weights.size:,}", *(f"{row.cell(f).loss:.2e}" for f in report.formats)]
        for name, row in zip(names, report.rows, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = [
        f"Change of the loss by each layer alone ({report.mode.value}, {report.examples:,} "
        f"examples in {report.batches} batches)",
        *("  ".join(_cells(line, widths)).rstrip() for line in (header, *body)),
    ]
    lines.insert(2, "  ".join("-" * w for w in widths))
    for format in report.formats:
        worst = [row for row in report.ranking(format)[:3] if row.cell(format).loss > 0]
        if not worst:
            continue
        total = sum(max(row.cell(format).loss, 0.0) for row in report.rows)
        lines += ["", f"{format}: hurt most by"]
        for row in worst:
            cell = row.cell(format)
            lines.append(f"  {row.name}: {cell.loss:.2e}, {cell.loss / total:.0%} of all")
            for reason in report.why(row, format):
                lines += textwrap.wrap(
                    reason, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 6
                )
    return "\n".join(lines)


def _cells(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = line
    return [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
