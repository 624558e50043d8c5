"""The report of a sensitivity as one page: which layer hurts, and why, with figures.

Self-contained: inline SVG and styles, for light and dark screens, no scripts."""

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from quantjax.allocate.figures import bars, curves, heat

if TYPE_CHECKING:
    from quantjax.allocate.report import Row, Sensitivity

STYLE = """
.qj-s{--ink:#1c2430;--soft:#5d6776;--line:#d9dee6;--page:#fff;--panel:#f5f7fa;--hot:#c2410c;
--c0:#1f6feb;--c1:#c2410c;--c2:#2a8a4a;--c3:#8250df;--c4:#b8860b;--c5:#0f7c8a;--c6:#a8326e;--c7:#5d6776;
font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:1060px;
margin:0 auto;padding:24px}
@media (prefers-color-scheme:dark){.qj-s{--ink:#e4e8ee;--soft:#9aa5b4;--line:#343c48;--page:#14181e;
--panel:#1c222b;--hot:#ff9a5c;--c0:#6ea8ff;--c1:#ff9a5c;--c2:#6fcf8e;--c3:#c29bff;--c4:#e3bd55;
--c5:#5fc9d6;--c6:#f08fbe;--c7:#9aa5b4}}
.qj-s h1{font-size:24px;margin:0 0 4px}.qj-s h2{font-size:18px;margin:32px 0 8px}
.qj-s p{margin:4px 0 12px}.qj-s .soft{color:var(--soft)}
.qj-s .scroll{overflow-x:auto}.qj-s svg{display:block;max-width:100%;height:auto}
.qj-s svg text{fill:var(--ink);font:12px system-ui,sans-serif}.qj-s svg .soft{fill:var(--soft)}
.qj-s table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
.qj-s th,.qj-s td{padding:3px 9px;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}.qj-s th:first-child,.qj-s td:first-child{text-align:left}
.qj-s td.worst{color:var(--hot);font-weight:600}
.qj-s .card{background:var(--panel);border-radius:8px;padding:10px 14px;margin:8px 0}
.qj-s .card b{color:var(--hot)}.qj-s ul{margin:4px 0;padding-left:20px}
.qj-s .legend span{margin-right:16px;white-space:nowrap}
.qj-s .legend i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:5px}
"""


def page(report: "Sensitivity") -> str:
    """The whole page."""
    shown = [f for f in report.formats if any(r.cell(f).rounded is not None for r in report.rows)]
    parts = [
        "<h1>Which layer hurts?</h1>",
        f'<p class="soft">Change of the loss by each layer alone, by {report.mode.value}, on '
        f"{report.examples:,} examples in {report.batches} batches.</p>",
        *(_worst(report, f) for f in sorted(shown, key=lambda f: -sum(_losses(report, f)))),
        "<h2>Loss of every layer</h2>",
        "<p>On a logarithmic scale; what is zero or less is not drawn.</p>",
        _legend(shown),
        _scroll(curves(_names(report.rows), {f: _losses(report, f) for f in shown})),
        _products(report, shown),
        _together(report, shown),
        "<h2>All numbers</h2>",
        _scroll(_table(report, shown)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<title>Sensitivity</title><style>"
        "body{margin:0}@media (prefers-color-scheme:dark){body{background:#14181e}}"
        f'{STYLE}</style></head><body><div class="qj-s">{"".join(parts)}</div></body></html>'
    )


def _names(rows: "Sequence[Row]") -> list[str]:
    return [row.name for row in rows]


def _losses(report: "Sensitivity", format: str) -> list[float]:
    return [row.cell(format).loss for row in report.rows]


def _scroll(inner: str) -> str:
    return f'<div class="scroll">{inner}</div>'


def _legend(labels: Sequence[str]) -> str:
    marks = "".join(
        f'<span><i style="background:var(--c{i % 8})"></i>{html.escape(label)}</span>'
        for i, label in enumerate(labels)
    )
    return f'<p class="legend">{marks}</p>'


def _worst(report: "Sensitivity", format: str) -> str:
    worst = [row for row in report.ranking(format)[:3] if row.cell(format).loss > 0]
    if not worst:
        return ""
    total = sum(max(x, 0.0) for x in _losses(report, format))
    cards = []
    for row in worst:
        loss = row.cell(format).loss
        why = "".join(f"<li>{html.escape(r)}</li>" for r in report.why(row, format))
        cards.append(
            f'<div class="card"><b>{html.escape(row.name)}</b> adds {loss:.3g}, '
            f"{loss / total:.0%} of all layers together.{f'<ul>{why}</ul>' if why else ''}</div>"
        )
    return f"<h2>In {html.escape(format)}</h2>{''.join(cards)}"


def _products(report: "Sensitivity", shown: Sequence[str]) -> str:
    """The SQNR of products in the coarsest format."""
    format = report.coarsest
    cells = [row.cell(format) for row in report.rows]
    if format not in shown or all(cell.local_db is None for cell in cells):
        return ""
    series = {
        "with its own weights quantized": [cell.local_db for cell in cells],
        "with all layers quantized": [cell.accumulated_db for cell in cells],
    }
    return (
        f"<h2>What is left of the products in {html.escape(format)}</h2>"
        "<p>Signal to quantization noise of each layer's products, in decibels.</p>"
        f"{_legend(list(series))}{_scroll(bars(_names(report.rows), series, 'dB'))}"
    )


def _together(report: "Sensitivity", shown: Sequence[str]) -> str:
    """How the errors of layers meet in the coarsest format."""
    format = report.coarsest
    if report.pairs is None or format not in shown:
        return ""
    chosen = [k for k, item in enumerate(report.items) if item.format == format]
    block = np.asarray(report.pairs)[np.ix_(chosen, chosen)]
    size = np.sqrt(np.outer(np.diag(block), np.diag(block)))
    cosine = np.divide(block, size, out=np.zeros_like(block), where=size > 0)
    return (
        f"<h2>Which errors meet in {html.escape(format)}</h2>"
        "<p>The cosine between what two layers do to the outputs: 1 where their errors add up, "
        "&minus;1 where they cancel, 0 where the losses of both are just their sum.</p>"
        f"{_scroll(heat(_names(report.rows), cosine))}"
    )


def _table(report: "Sensitivity", shown: Sequence[str]) -> str:
    heads = ["layer", "weights", "kurtosis", "peak"]
    for f in shown:
        heads += [f"{f} loss", "SQNR dB", "product dB", "clipped", "codes"]
    worst = {f: report.ranking(f)[0].name for f in shown}
    lines = []
    for row in report.rows:
        w = row.weights
        cells = [f"<td>{html.escape(row.name)}</td>", f"<td>{w.size:,}</td>"]
        cells += [f"<td>{w.kurtosis:.1f}</td>", f"<td>{w.peak:.1f}</td>"]
        for f in shown:
            cell = row.cell(f)
            mark = ' class="worst"' if worst[f] == row.name else ""
            cells.append(f"<td{mark}>{cell.loss:.2e}</td>")
            r = cell.rounded
            texts = ["float", "", "", ""]
            if r is not None:
                product = "" if cell.local_db is None else _decibels(cell.local_db)
                codes = f"{r.used:.0f}/{r.levels}"
                texts = [_decibels(r.sqnr_db), product, f"{r.clipping:.0%}", codes]
            cells += [f"<td>{text}</td>" for text in texts]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _decibels(x: float) -> str:
    return f"{x:.1f}" if math.isfinite(x) else "exact" if x > 0 else "none"
