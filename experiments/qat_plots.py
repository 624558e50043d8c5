"""The figures of training through quantization, drawn from its rows."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from experiments.method_tables import format_place, points_lost, variant
from experiments.report import spread

FORMATS = {"w4": "4", "w3": "3", "w2": "2", "ternary": "ternary", "w1": "1"}
MARKERS = "osD^v<>pP*Xhd"
RECURRENT = {"rounded": "rounded", "lsq": "trained on"}


def estimator_figure(rows: Iterable[Mapping[str, Any]], network: str, folder: Path) -> Path:
    """Points lost over bits of a weight, a panel for each width of activations, a mark for each
    estimator: mean over seeds, and their deviation. Returns the file."""
    mine = [row for row in rows if row["network"] == network]
    lost = [(row, points) for row, points in points_lost(mine) if row["format"] in FORMATS]
    methods = list(dict.fromkeys(row["method"] for row in mine if row["format"] in FORMATS))
    widths = sorted({row["activations"] for row, _ in lost}, reverse=True)
    figure, panels = plt.subplots(
        1, max(len(widths), 1), figsize=(3.4 * max(len(widths), 1) + 1.5, 4), squeeze=False,
        sharey=True,
    )  # fmt: skip
    for axes, width in zip(panels[0], widths, strict=False):
        _marks(axes, [(r, v) for r, v in lost if r["activations"] == width], FORMATS, methods)
        axes.set_xlabel("bits of a weight")
        axes.set_title("float activations" if width == 32 else f"{width}-bit activations")
    return _stored(figure, panels[0][0], network, folder / f"qat_article_{network}.png")


def residual_figure(rows: Iterable[Mapping[str, Any]], network: str, folder: Path) -> Path:
    """Points lost over formats, a mark for each estimator and variant of it: mean over seeds, and
    their deviation. Returns the file."""
    mine = [row for row in rows if row["network"] == network]
    lost = [(row, v) for row, v in points_lost(mine) if "float" not in row["method"]]
    names = sorted({row["format"] for row, _ in lost}, key=format_place)
    figure, axes = plt.subplots(figsize=(5, 4))
    _marks(axes, lost, {name: name for name in names}, list(dict.fromkeys(
        variant(row) for row, _ in lost)))  # fmt: skip
    axes.set_xlabel("format")
    return _stored(figure, axes, network, folder / f"qat_resnet_{network}.png")


def _marks(
    axes: Any,
    lost: Sequence[tuple[Mapping[str, Any], float]],
    formats: Mapping[str, str],
    methods: Sequence[str],
) -> None:
    """A place for each format, with its text below; there, side by side, each method's points."""
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for i, method in enumerate(methods):
        offset = 0.5 * ((i + 0.5) / len(methods) - 0.5)
        mine = [(row, points) for row, points in lost if variant(row) == method]
        _series(
            axes, mine, list(formats), offset, label=method, marker=MARKERS[i % len(MARKERS)],
            markersize=5, color=colors[i % len(colors)],
        )  # fmt: skip
    _scaled(axes, list(formats.values()))


def _series(
    axes: Any,
    lost: Sequence[tuple[Mapping[str, Any], float]],
    formats: Sequence[str],
    offset: float,
    **style: Any,
) -> None:
    """Marks of one kind, beside the places of the formats: mean and deviation of the points."""
    points = {
        place: spread(found)
        for place, format in enumerate(formats)
        if (found := [v for row, v in lost if row["format"] == format])
    }
    axes.errorbar(
        [place + offset for place in points],
        [cell["mean"] for cell in points.values()],
        [cell["sd"] for cell in points.values()],
        linestyle="none",
        capsize=2,
        **style,
    )


def _scaled(axes: Any, names: Sequence[str]) -> None:
    """A place for each name below; points of accuracy, linear to 1, beside."""
    axes.axhline(0, color="0.3", linewidth=1)
    axes.set_yscale("symlog", linthresh=1, linscale=1)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(alpha=0.25)


def _stored(figure: Any, first: Any, network: str, path: Path) -> Path:
    """The figure with the legend of its first panel beside it, as a file."""
    first.set_ylabel("points of accuracy lost (linear to 1)")
    handles = first.get_legend_handles_labels()
    figure.legend(*handles, loc="center left", bbox_to_anchor=(0.91, 0.5), fontsize=8)
    figure.suptitle(f"{network.replace('_', ' ')}, against the float network trained as long")
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def recurrent_figure(rows: Iterable[Mapping[str, Any]], folder: Path) -> Path:
    """Points lost over formats, a panel for each data set, a mark for each cell, hollow where its
    network was only rounded: mean over seeds, and their deviation. Returns the file."""
    rows = list(rows)
    networks = list(dict.fromkeys(row["network"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows if row["method"] == "rounded"))
    series = [(c, m) for c in dict.fromkeys(row["cell"] for row in rows) for m in RECURRENT]
    figure, panels = plt.subplots(
        1, max(len(networks), 1), figsize=(5.4 * max(len(networks), 1), 4), squeeze=False,
        sharey=True,
    )  # fmt: skip
    for axes, network in zip(panels[0], networks, strict=False):
        for i, (cell, method) in enumerate(series):
            mine = [row for row in rows if (row["network"], row["cell"]) == (network, cell)]
            lost = [(row, points) for row, points in points_lost(mine) if row["method"] == method]
            _series(
                axes, lost, formats, 0.5 * ((i + 0.5) / len(series) - 0.5), markersize=6,
                marker=MARKERS[i // 2], color=f"C{i // 2}",
                markerfacecolor="white" if method == "rounded" else None,
                label=f"{cell.upper()}, {RECURRENT[method]}",
            )  # fmt: skip
        _scaled(axes, formats)
        axes.axhline(0.5, color="0.3", linewidth=1, linestyle=":")
        axes.set_title(network.replace("_", " "))
    panels[0][0].set_ylabel("points of accuracy lost (linear to 1)")
    panels[0][0].legend(fontsize=8)
    figure.suptitle("against the float network trained as long; dotted: half a point")
    return _saved(figure, folder / "qat_recurrent.png")
