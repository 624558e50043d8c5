"""Which method at which format? The tables of the experiments that compute rows one by one.

Methods are lines, the best in the fewest bits last; formats are columns, those of weights alone
first. A cell is the mean over calibration seeds, with the deviation. Where a row has a reason in
place of a number, the cell has a letter, explained below the table."""

import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.report import markdown_table, mean_sd, spread

Row = Mapping[str, Any]


class Table(NamedTuple):
    """columns and lines of text; notes: what the letters in cells stand for."""

    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]
    notes: list[str]

    def markdown(self) -> str:
        """With the notes under it."""
        table = markdown_table(self.columns, self.lines)
        return "\n\n".join([table, *(["No number: " + "; ".join(self.notes)] * bool(self.notes))])


def methods_by_formats(
    rows: Sequence[Row], value: Callable[[Row], float], *, digits: int = 2
) -> Table:
    """One number of every row. Raises ValueError for two rows of one method, format and seed."""
    formats = sorted({row["format"] for row in rows}, key=format_place)
    keys = [(row["method"], row["format"], row.get("seed")) for row in rows]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"more than one row of {sorted(map(str, twice))[:3]}: choose among them.")
    letters: dict[str, str] = {}

    def cell(method: str, format: str) -> str:
        found = [r for r in rows if (r["method"], r["format"]) == (method, format)]
        values = [value(row) for row in found if "reason" not in row]
        if values:
            return mean_sd(spread(values), digits=digits)
        # An error of another package may be a page long; the JSON has all of it.
        reasons = [textwrap.shorten(row["reason"], 160) for row in found]
        return letters.setdefault(reasons[0], chr(ord("a") + len(letters))) if reasons else ""

    def hardest(method: str) -> float:
        """The number in the fewest bits of weights alone; no number comes last."""
        last = [f for f in formats if not format_place(f)[0]][-1:]
        return max((value(r) for r in rows if r["method"] == method and "reason" not in r
                    and r["format"] in last), default=-math.inf)  # fmt: skip

    methods = sorted(dict.fromkeys(row["method"] for row in rows), key=hardest, reverse=True)
    lines = [(m, *(cell(m, f) for f in formats)) for m in methods]
    return Table(("method", *formats), lines, [f"{v}, {k}" for k, v in letters.items()])


def lost(payload: Mapping[str, Any], methods: Sequence[str] | None = None, **where: Any) -> Table:
    """Points of accuracy lost against the float network, in the rows with these values; of some
    methods, or all."""
    of_network = {k: v for k, v in where.items() if k in ("network", "trained")}
    top = next(r for r in _with(payload["rows"], **of_network) if r["method"] == "float")
    rows = _of(methods, _with(payload["rows"], **where))
    table = methods_by_formats(rows, lambda row: 100 * (top["accuracy"] - row["accuracy"]))
    blanks = ("",) * (len(table.columns) - 2)
    head = (f"float32, accuracy {100 * top['accuracy']:.2f} %", "0", *blanks)
    return table._replace(lines=[head, *table.lines])


def points_lost(rows: Iterable[Row]) -> list[tuple[Row, float]]:
    """Each row that has a number, with the points of accuracy it lost against the float network of
    its seed that was trained as long. Rows whose float network is not there yet are left out."""
    rows = list(rows)
    top = {
        row["seed"]: row["accuracy"]
        for row in rows
        if row["method"] == "float" and "reason" not in row
    }
    return [
        (row, 100 * (top[row["seed"]] - row["accuracy"]))
        for row in rows
        if "reason" not in row and row["seed"] in top
    ]


def variant(row: Row) -> str:
    """The method of a row with what else tells it from others, where it has such fields."""
    low = ", all layers low" if row.get("ends") == "low" else ""
    return row["method"] + low + (", distilled" if row.get("distil") else "")


def trained(payload: Mapping[str, Any], **where: Any) -> Table:
    """Points lost against the float network that was trained as long, by variant and format, in the
    rows with these values; mean over seeds."""
    of_network = {k: v for k, v in where.items() if k in ("network", "cell")}
    rows = _with(payload["rows"], **of_network)
    lost = {id(row): points for row, points in points_lost(rows)}
    mine = [row for row in _with(rows, **where) if "float" not in row["method"]]
    mine = [
        {**row, "method": variant(row), "lost": lost.get(id(row))}
        for row in mine
        if "reason" in row or id(row) in lost
    ]
    table = methods_by_formats(mine, lambda row: row["lost"])
    blanks = ("",) * (len(table.columns) - 2)
    lines = []
    for method, said in (("float, as it was", "float32 before"), ("float", "float32")):
        found = [row for row in _with(rows, method=method) if "reason" not in row]
        if found:
            accuracy = mean_sd(spread(row["accuracy"] for row in found), 100)
            points = mean_sd(spread(lost[id(row)] for row in found if id(row) in lost))
            lines.append((f"{said}, accuracy {accuracy} %", points, *blanks))
    return table._replace(lines=[*lines, *table.lines])


def compressions(payload: Mapping[str, Any], network: str) -> Table:
    """Points lost by each way to save bytes, at the bytes of so many bits a weight."""
    rows = [row | {"format": f"w{row['budget']}"} for row in payload["rows"]]
    return trained({"rows": rows}, network=network)


def decoder_formats(payload: Mapping[str, Any]) -> Table:
    """Nats a character more than the float decoder of the same seed that was trained as long."""
    rows = _with(payload["rows"], table="formats")
    top = {row["seed"]: row["loss"] for row in rows if row["method"] == "float"}
    mine = [r for r in rows if r["method"] != "float" and ("reason" in r or r["seed"] in top)]
    table = methods_by_formats(mine, lambda row: row["loss"] - top[row["seed"]], digits=3)
    blanks = ("",) * (len(table.columns) - 2)
    head = (f"float32, {mean_sd(spread(top.values()), digits=3)} nats", "0", *blanks)
    return table._replace(lines=[head, *table.lines])


def optimizer_states(payload: Mapping[str, Any]) -> Table:
    """What an optimizer's state takes, in bits of its numbers, and the nats it comes to."""
    rows = [r for r in _with(payload["rows"], table="optimizer") if "reason" not in r]
    whole = max((row["state_bytes"] for row in rows), default=1)
    lines: list[tuple[str, ...]] = []
    for bits in dict.fromkeys(row["state_bits"] for row in rows):
        mine = _with(rows, state_bits=bits)
        share = f"{100 * mine[0]['state_bytes'] / whole:.1f}"
        loss = mean_sd(spread(row["loss"] for row in mine), digits=4)
        lines.append((str(bits), share, loss))
    return Table(("bits of the state", "bytes, %", "nats a character"), lines, [])


def costs(payload: Mapping[str, Any], **where: Any) -> Table:
    """What a format takes: the median over formats and seeds of the seconds on the clock, of those
    of the processor over all cores, and the memory beyond the network and the images. Of the
    machine that measured most rows; another's seconds are not these."""
    rows = [r for r in _with(payload["rows"], **where) if r.get("cpu_seconds") is not None]
    machine = statistics.mode(row.get("device") for row in rows) if rows else None
    rows = [row for row in rows if row.get("device") == machine]
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        seconds, worked = (
            statistics.median(row[field] for row in mine) for field in ("seconds", "cpu_seconds")
        )
        peaks = [mb for row in mine if (mb := _megabytes(row)) is not None]
        peak = f"{statistics.median(peaks):.0f}" if peaks else "unknown"
        lines.append((name, f"{seconds:.1f}", f"{worked:.1f}", peak))
    return Table(("method", "seconds", "processor seconds", "peak memory, MB"), lines, [])


def divergence(
    payload: Mapping[str, Any],
    field: str,
    digits: int,
    *,
    embedding: bool,
    methods: Sequence[str] | None = None,
) -> Table:
    """Of the language model: a field of every row, or of its variant whose embedding has 8 bits."""
    rows = _of(methods, payload["rows"])

    def value(row: Row) -> float:
        return (row["embedding_8_bits"] if embedding else row)[field]

    return methods_by_formats(rows, value, digits=digits)


def allocations(payload: Mapping[str, Any], network: str) -> Table:
    """Accuracy and divergence of each way to decide, by budget; mean over calibration draws."""
    rows = [r for r in _with(payload["rows"], network=network) if "reason" not in r]
    ways = list(dict.fromkeys(row["method"] for row in rows))
    lines: list[tuple[str, ...]] = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        of = {way: _with(rows, budget=budget, method=way) for way in ways}
        size = statistics.mean(row["budget_bytes"] for row in of[ways[0]])
        accuracy = [mean_sd(spread(100 * r["test_accuracy"] for r in of[way])) for way in ways]
        kl = [f"{statistics.mean(row['measured'] for row in of[way]):.2e}" for way in ways]
        lines.append((budget, f"{size / 1000:.1f}", *accuracy, *kl))
    columns = ("bytes of", "kB", *(f"{w}, %" for w in ways), *(f"{w}, KL" for w in ways))
    return Table(columns, lines, [])


PREDICTIONS = {"layers": "predicted_layers", "pairs": "predicted_pairs"}


def predictions(payload: Mapping[str, Any]) -> Table:
    """By network, how well the loss that each way predicts goes with what was measured."""
    lines: list[tuple[str, ...]] = []
    for network in dict.fromkeys(row["network"] for row in payload["rows"]):
        rows = [r for r in _with(payload["rows"], network=network) if "reason" not in r]
        found = [f"{correlation(rows, field):.4f}" for field in PREDICTIONS.values()]
        lines.append((network, str(len(rows)), *found))
    return Table(("network", "allocations", *PREDICTIONS), lines, [])


def correlation(rows: Iterable[Row], field: str) -> float:
    """Of predicted and measured losses, in logarithms: they span five powers of ten."""
    pairs = [(math.log(max(row[field], 1e-9)), math.log(row["measured"])) for row in rows]
    return statistics.correlation(*zip(*pairs, strict=True))


def _of(methods: Sequence[str] | None, rows: Iterable[Row]) -> list[Row]:
    """The rows of these methods, or of all but the float network."""
    return [
        row
        for row in rows
        if row["method"] != "float" and (methods is None or row["method"] in methods)
    ]


def format_place(format: str) -> tuple[bool, list[float]]:
    """Where a preset's column stands: whether it has activations, then by falling numbers."""
    name = format.replace("ternary", f"{math.log2(3):.3f}")
    return "a" in name, [-float(digits) for digits in re.findall(r"[\d.]+", name)]


def _with(rows: Iterable[Row], **where: Any) -> list[Row]:
    return [row for row in rows if all(row.get(k, v) == v for k, v in where.items())]


def _megabytes(row: Row) -> float | None:
    if "peak_mb" in row:
        return row["peak_mb"]
    return None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6
