"""How is a summary shown? Aligned plain text for a terminal, HTML for a notebook."""

import collections
import html
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from quantjax.summary.rows import Row, Totals, totals, warnings


class Column(NamedTuple):
    """One column: its title, the text of a row, the text of the totals, the side it leans to."""

    title: str
    cell: Callable[[Row], str]
    total: Callable[[Totals], str] = lambda totals: ""
    right: bool = False


PATH = Column("path", lambda row: row.path or "(root)", lambda totals: "total")
MATCHED = Column("matched by", lambda row: row.matched)
DTYPE = Column("dtype", lambda row: row.dtype)
NOTE = Column("note", lambda row: row.note)
FACTS = (
    Column("shape", lambda row: _shape(row.shape)),
    Column("format", lambda row: _format(row)),
    Column("block", lambda row: row.granularity),
    DTYPE,
    Column("bytes", lambda row: _bytes(row), lambda totals: f"{totals.bytes:,}", True),
    Column(
        "bits",
        lambda row: _bits(row.bits_per_weight),
        lambda totals: _bits(totals.bits_per_weight),
        True,
    ),
    Column("SQNR dB", lambda row: _decibels(row.sqnr_db), right=True),
)


def _shape(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "-"
    return "x".join(map(str, shape)) or "scalar"


def _format(row: Row) -> str:
    text = row.format or "-"
    if row.scale not in ("", "float32"):
        text += f" x {row.scale}"
    text += " x inputs" if row.input_scale else ""
    text += f" + rank {row.rank}" if row.rank else ""
    return f"{text}, act {row.act}" if row.act else text


def _bytes(row: Row) -> str:
    return "-" if row.shape is None else f"{row.bytes:,}"


def _bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.2f}"


def _decibels(sqnr: float | None) -> str:
    if sqnr is None:
        return ""
    return "exact" if sqnr == math.inf else f"{sqnr:.1f}"


def _human(n: int) -> str:
    """Bytes in three digits: 980 B, 1.23 kB, 45.6 MB."""
    if n < 1000:
        return f"{n} B"
    power = min(int(math.log10(n)) // 3, 4)
    value = n / 1000**power
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {'kMGT'[power - 1]}B"


def shorten(paths: Sequence[str], width: int) -> list[str]:
    """The paths, long parts cut to `par~` alike in all of them, until the longest path fits.

    Four letters of a part stay, eight of the last, and a number at its end, which tells layers
    apart. Paths that would become one stay whole, and exceed the width.

    >>> shorten(["transformer/layers_10/attention/kernel", "head/kernel"], 30)
    ['transf~/laye~10/attent~/kernel', 'head/kernel']
    """
    short = {path: path for path in paths}
    longest = max((len(part) for path in paths for part in path.split("/")), default=0)
    for length in range(longest - 1, 3, -1):
        if max(map(len, short.values())) <= width:
            break
        short = {path: _shorten(path, length) for path in paths}
    many = collections.Counter(short.values())
    return [path if many[short[path]] > 1 else short[path] for path in paths]


def _shorten(path: str, length: int) -> str:
    *parts, last = path.split("/")
    return "/".join([*(_cut(part, length) for part in parts), _cut(last, max(length, 8))])


def _cut(part: str, length: int) -> str:
    if len(part) <= length:
        return part
    stem = part.rstrip("0123456789")
    number = part[len(stem) :]
    return stem[: max(length - 1 - len(number), 1)].rstrip("_") + "~" + number


def sentence(rows: Sequence[Row]) -> str:
    """The totals in words. The float dtype is named if there is one; see `_dtypes` for several."""
    t = totals(rows)
    start = f"{t.quantized_leaves} of {t.leaves} leaves quantized: {t.parameters:,} parameters in "
    if not t.quantized_leaves:
        return f"{start}{_human(t.bytes)}."
    dtypes = {row.dtype for row in rows if row.quantized}
    return (
        f"{start}{_human(t.bytes)}, {t.ratio:.2f}x smaller than {_human(t.float_bytes)} in "
        f"{dtypes.pop() if len(dtypes) == 1 else 'float'}; {_human(t.kept_bytes)} are in leaves "
        f"not quantized."
    )


def notes(rows: Iterable[Row]) -> dict[str, list[str]]:
    """The paths under each note. Four or more that differ in numbers alone become one, counted."""
    under: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            under.setdefault(row.note, []).append(PATH.cell(row))
    return {note: _alike(paths) for note, paths in under.items()}


def _alike(paths: Sequence[str]) -> list[str]:
    patterns = [re.sub(r"\d+", "*", path) for path in paths]
    counts = collections.Counter(patterns)
    shown = (
        f"{pattern} ({counts[pattern]})" if counts[pattern] > 3 else path
        for path, pattern in zip(paths, patterns, strict=True)
    )
    return list(dict.fromkeys(shown))


def text(rows: Sequence[Row], width: int) -> str:
    """The rows, totals, warnings and notes as plain text."""
    columns = [column for column in _shown(rows) if column not in (PATH, DTYPE, NOTE)]
    cells = [[column.title, *map(column.cell, rows)] for column in columns]
    paths = [PATH.cell(row) for row in rows]

    def room() -> int:
        return width - sum(max(map(len, column)) + 2 for column in cells)

    if MATCHED in columns and max(map(len, paths)) > room():
        cells[-1] = [MATCHED.title, *shorten(cells[-1][1:], 14)]
    cells.insert(0, [PATH.title, *shorten(paths, max(20, room()))])
    columns.insert(0, PATH)

    total = totals(rows)
    cells = [[*cell, column.total(total)] for cell, column in zip(cells, columns, strict=True)]
    widths = [max(map(len, column)) for column in cells]
    lines = []
    for line in zip(*cells, strict=True):
        padded = [
            cell.rjust(w) if column.right else cell.ljust(w)
            for cell, w, column in zip(line, widths, columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    rule = "  ".join("-" * w for w in widths)
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1], ""]
    lines += [_wrap(f"WARNING: {line}", width, 9) for line in warnings(rows)]
    lines.append(_wrap(sentence(rows), width, 0))
    kept = notes(row for row in rows if not row.quantized)
    remarks = _dtypes(rows) | notes(row for row in rows if row.quantized)
    for title, listed in (("Not quantized:", kept), ("Notes:", remarks)):
        lines += [title] * bool(listed)
        lines += [_wrap(f"  {n}: {', '.join(where)}", width, 4) for n, where in listed.items()]
    return "\n".join(lines)


def _dtypes(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Where a quantized leaf reads as another dtype than most; one for all is in the sentence."""
    counts = collections.Counter(row.dtype for row in rows if row.quantized)
    return {
        f"reads as {dtype}": _alike(
            [PATH.cell(r) for r in rows if r.quantized and r.dtype == dtype]
        )
        for dtype, _ in counts.most_common()[1:]
    }


def _shown(rows: Sequence[Row]) -> list[Column]:
    """The columns that say something."""
    return [c for c in (PATH, *FACTS, MATCHED, NOTE) if any(map(c.cell, rows)) or c is PATH]


def _wrap(line: str, width: int, indent: int) -> str:
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def html_table(rows: Sequence[Row]) -> str:
    """The same as one self-contained HTML element, everything escaped."""
    total = totals(rows)
    columns = _shown(rows)

    def line(tag: str, cells: Iterable[str]) -> str:
        sides = ("right" if column.right else "left" for column in columns)
        return "".join(
            f'<{tag} style="text-align:{side};padding:2px 8px">{html.escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )

    body = "".join(f"<tr>{line('td', (c.cell(row) for c in columns))}</tr>" for row in rows)
    alarms = "".join(
        f'<p style="color:#b00020;font-weight:bold">{html.escape(warning)}</p>'
        for warning in warnings(rows)
    )
    return (
        '<div><table style="border-collapse:collapse;font-variant-numeric:tabular-nums">'
        f"<thead><tr>{line('th', (c.title for c in columns))}</tr></thead>"
        f"<tbody>{body}</tbody>"
        f"<tfoot><tr>{line('th', (c.total(total) for c in columns))}</tr></tfoot></table>"
        f"{alarms}<p>{html.escape(sentence(rows))}</p></div>"
    )
