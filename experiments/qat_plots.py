"""The figures of training through quantization, drawn from its rows."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.method_tables import points_lost
from experiments.report import spread

FORMATS = {"w4": "4", "w3": "3", "w2": "2", "ternary": "ternary", "w1": "1"}
MARKERS = "osD^v<>pP*Xhd"


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
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for axes, width in zip(panels[0], widths, strict=False):
        for i, method in enumerate(methods):
            offset = 0.5 * ((i + 0.5) / len(methods) - 0.5)  # side by side
            points = {
                place: spread(v for row, v in lost if (row["method"], row["format"],
                              row["activations"]) == (method, format, width))
                for place, format in enumerate(FORMATS)
                if any((row["method"], row["format"], row["activations"]) == (method, format, width)
                       for row, _ in lost)
            }  # fmt: skip
            axes.errorbar(
                [place + offset for place in points],
                [cell["mean"] for cell in points.values()],
                [cell["sd"] for cell in points.values()],
                linestyle="none", marker=MARKERS[i % len(MARKERS)], markersize=5, capsize=2,
                color=colors[i % len(colors)], label=method,
            )  # fmt: skip
        axes.axhline(0, color="0.3", linewidth=1)
        axes.set_yscale("symlog", linthresh=1, linscale=1)
        axes.set_xticks(range(len(FORMATS)), FORMATS.values(), fontsize=8)
        axes.set_xlabel("bits of a weight")
        axes.set_title("float activations" if width == 32 else f"{width}-bit activations")
        axes.grid(alpha=0.25)
    panels[0][0].set_ylabel("points of accuracy lost (linear to 1)")
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="center left", bbox_to_anchor=(0.91, 0.5), fontsize=8)
    figure.suptitle(f"{network}, against the float network trained as long")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"qat_article_{network}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path
