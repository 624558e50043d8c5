"""How does a result reach a reader? One JSON per command, and tables made from it."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

PACKAGES = ("quantjax", "jax", "jaxlib", "numpy", "flax", "optax", "tensorflow-datasets")


def environment() -> dict[str, Any]:
    """Versions and device, for the head of every JSON."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "backend": jax.default_backend(),
        "device": _device(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def _device() -> str:
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Writes `payload`, atomically: an interrupted write leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(payload, indent=1, sort_keys=False) + "\n")
    os.replace(scratch, path)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value).

    >>> spread([1.0, 3.0])
    {'mean': 2.0, 'sd': 1.4142135623730951}
    """
    values = list(values)
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def mean_sd(cell: Mapping[str, float], factor: float = 1.0, digits: int = 2) -> str:
    """'mean ± sd', or the mean alone where there is no spread.

    >>> mean_sd({"mean": 0.91234, "sd": 0.001}, 100)
    '91.23 ± 0.10'
    """
    text = f"{cell['mean'] * factor:z.{digits}f}"  # z: no -0.00
    return f"{text} ± {cell['sd'] * factor:.{digits}f}" if cell["sd"] else text


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on the terminal, plain where the output is not one."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as a Markdown table, for the README."""
    lines = [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join([' --- '] + [' ---: '] * (len(columns) - 1))}|",
    ]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
