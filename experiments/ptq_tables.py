"""The tables of post-training quantization: methods x formats, from rows of one JSON."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.report import mean_sd, spread

Row = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
MISSING = "not run"


def grid(rows: Sequence[Row], value: Callable[[Row], float], digits: int = 2) -> Table:
    """One number: mean and deviation over the seeds, the reason where there is none; seconds and
    memory beside it, the largest of all formats."""
    formats = list(dict.fromkeys(row["format"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def cell(method: str, format: str) -> str:
        found = [r for r in rows if (r["method"], r["format"]) == (method, format)]
        if reasons := [r["reason"] for r in found if "reason" in r]:
            return reasons[0]
        return mean_sd(spread(map(value, found)), digits=digits) if found else MISSING

    lines = [
        [method, *(cell(method, format) for format in formats), *_cost(rows, method)]
        for method in methods
    ]
    return ["method", *formats, "s", "MB"], lines


def _cost(rows: Sequence[Row], method: str) -> tuple[str, str]:
    own = [row for row in rows if row["method"] == method and "reason" not in row]
    seconds = [row["seconds"] for row in own if row.get("seconds") is not None]
    peaks = [row["peak_bytes"] / 1e6 for row in own if row.get("peak_bytes") is not None]
    return tuple(f"{max(x):.0f}" if x else "" for x in (seconds, peaks))  # type: ignore[return-value]


def resnet_markdown(payload: Mapping[str, Any], ends: str = "low", folded: bool = False) -> Table:
    """Points of accuracy lost against the float network."""
    top = next(row for row in payload["rows"] if row["method"] == "float")
    own = [r for r in payload["rows"] if (r.get("ends"), r.get("folded")) == (ends, folded)]
    return grid(own, lambda row: 100 * (top["accuracy"] - row["accuracy"]))


def language_model_markdown(payload: Mapping[str, Any]) -> Table:
    """KL to the float model, nats a token."""
    rows = [
        {**row, "peak_bytes": row.get("peak_mb") and row["peak_mb"] * 1e6}
        for row in payload["rows"]
        if row["method"] != "float"
    ]
    return grid(rows, lambda row: row["kl"], digits=4)
