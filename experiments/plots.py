"""The figures of the article's experiment, drawn from its JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

PLACE = {"w1": 1, "ternary": 1.585} | {f"w{b}": b for b in range(2, 9)}
STYLE = {
    "absmax": dict(color="#b5452c", marker="o", linestyle="--"),
    "mse": dict(color="#2c6fb5", marker="s", linestyle="-"),
    "output": dict(color="#8a5fb0", marker="D", linestyle="-"),
    "fine-tuned": dict(color="#2e8b57", marker="^", linestyle="-"),
}
LABEL = {
    "absmax": "scales by absmax",
    "mse": "scales by the weights' MSE",
    "output": "scales by the outputs' MSE",
    "fine-tuned": "fine-tuned",
}

ZOOM = 4  # points of accuracy below float32 in the second panel


def article_figures(payload: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Draws all figures of one result; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for suffix, draw in (
        ("bits", accuracy_against_bits),
        ("size", accuracy_against_size),
        ("sweep", scale_sweep),
        ("weights", weight_histograms),
    ):
        figure = draw(payload)
        path = folder / f"{name}_{suffix}.png"
        scratch = path.with_name(f".{path.name}")
        figure.savefig(scratch, dpi=110, bbox_inches="tight", format="png")
        plt.close(figure)
        scratch.replace(path)
        drawn.append(path)
    return drawn


def _series(payload: Mapping[str, Any], method: str) -> list[Mapping[str, Any]]:
    summary = payload["summary"]["rows"]
    rows = [row for row in summary if row["method"] == method and row["format"] in PLACE]
    return sorted(rows, key=lambda row: PLACE[row["format"]])


def _accuracy_panels(payload: Mapping[str, Any]):
    """Two panels side by side: the whole range, and from a few points below float upwards."""
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.2))
    top = payload["summary"]["float"]["accuracy"]["mean"] * 100
    seeds = len(payload["config"]["seeds"])
    noun = "seed" if seeds == 1 else "seeds, mean ± sd"
    run = f"{payload['config']['dataset']}, {payload['config']['optimizer']}"
    figure.suptitle(f"{run}, {seeds} {noun}", fontsize=11)
    for axes in panels:
        axes.axhline(top, color="0.3", linewidth=1, label=f"float32 ({top:.2f} %)")
        axes.grid(alpha=0.25)
    panels[0].set(ylabel="test accuracy, %")
    rows = payload["summary"]["rows"]
    best = max(row["accuracy"]["mean"] + row["accuracy"]["sd"] for row in rows) * 100
    panels[1].set_ylim(top - ZOOM, max(best, top) + ZOOM / 12)
    panels[1].set_title(f"from {ZOOM} points below float32", fontsize=10)
    for row in rows:
        if (row["format"], row["method"]) == ("float32", "fine-tuned"):
            longer = row["accuracy"]["mean"] * 100
            label = f"float32, trained as long ({longer:.2f} %)"
            panels[1].axhline(longer, color="#2e8b57", linewidth=1, linestyle=":", label=label)
            panels[1].legend(handles=panels[1].lines[-1:], loc="best", fontsize=9)
    return figure, panels


def accuracy_against_bits(payload: Mapping[str, Any]):
    """Test accuracy over bits per weight, one line per kind of scale, float as a line."""
    figure, panels = _accuracy_panels(payload)
    for axes in panels:
        for method, style in STYLE.items():
            rows = _series(payload, method)
            if rows:
                x = [PLACE[row["format"]] for row in rows]
                _errorbar(axes, x, rows, method, style)
        axes.set_xticks(list(PLACE.values()), ["1", "\nternary", *map(str, range(2, 9))])
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel("bits of a weight (every layer quantized, biases float)")
    panels[0].legend(loc="lower right", fontsize=9)
    return figure


def accuracy_against_size(payload: Mapping[str, Any]):
    """Test accuracy over the size of the file; ternary takes the room of 2 bits: left out."""
    figure, panels = _accuracy_panels(payload)
    top = payload["summary"]["float"]
    for axes in panels:
        for method, style in STYLE.items():
            rows = [row for row in _series(payload, method) if row["format"] != "ternary"]
            if rows:
                _errorbar(axes, [row["bytes"]["mean"] / 1000 for row in rows], rows, method, style)
        size = top["bytes"]["mean"] / 1000
        axes.plot([size], [top["accuracy"]["mean"] * 100], "k*", markersize=10)
        axes.set_xscale("log")
        ticks = [n for n in (5, 10, 20, 50, 100, 200, 500, 1000) if size / 40 <= n <= 1.1 * size]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_xlabel("size of the file, kB (log)")
    panels[0].legend(loc="lower right", fontsize=9)
    return figure


def _errorbar(axes, x, rows, method: str, style: dict) -> None:
    y = [row["accuracy"]["mean"] * 100 for row in rows]
    error = [row["accuracy"]["sd"] * 100 for row in rows]
    axes.errorbar(x, y, error, label=LABEL[method], capsize=2, markersize=5, **style)


def scale_sweep(payload: Mapping[str, Any]):
    """Validation accuracy and squared error over S, and where the observers put it."""
    sweep = payload["seeds"][0]["sweep"]
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    factors = [p["factor"] for p in sweep["points"]]
    accuracy = [100 * p["validation_accuracy"] for p in sweep["points"]]
    axes.plot(factors, accuracy, "o-", color="#444444", label="accuracy, one factor for all layers")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("S over the S of absmax (larger: finer steps, more clipping)")
    axes.set_ylabel("validation accuracy, %")
    axes.set_title(
        f"{payload['config']['dataset']}, {sweep['bits']} bits, one scale per layer", fontsize=11
    )
    twin = axes.twinx()
    error = [p["relative_error"] for p in sweep["points"]]
    twin.plot(factors, error, ":", color="#888888")
    twin.set_yscale("log")
    twin.set_ylabel("relative squared error of the weights (dotted)", color="#666666", fontsize=9)
    colors = dict(zip(sweep["observers"], ("#b5452c", "#2c6fb5", "#8a5fb0"), strict=False))
    for label, found in sweep["observers"].items():
        layers = list(found["factors"].values())
        y = 100 * found["validation_accuracy"]
        axes.plot(layers, [y] * len(layers), "|", color=colors[label], markersize=12)
        middle = float(np.exp(np.mean(np.log(layers))))
        axes.plot([middle], [y], "D", color=colors[label], label=f"{label} (bars: its layers)")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, ncols=2)
    return figure


def weight_histograms(payload: Mapping[str, Any]):
    """Every layer's weights before and after quantization."""
    found = payload["seeds"][0]["histograms"]
    layers = found["layers"]
    figure, rows = plt.subplots(1, len(layers), figsize=(3.1 * len(layers), 2.9))
    for axes, (name, h) in zip(np.atleast_1d(rows), layers.items(), strict=True):
        edges = np.linspace(-h["edge"], h["edge"], len(h["before"]) + 1)
        axes.stairs(h["before"], edges, fill=True, color="#9db8d6", label="float32")
        axes.stairs(h["after"], edges, color="#b5452c", linewidth=1, label=f"{found['bits']} bits")
        axes.set_yscale("symlog", linthresh=1)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelsize=7)
    first = np.atleast_1d(rows)[0]
    first.set_ylabel("weights in the bin (log)")
    figure.suptitle(
        f"{payload['config']['dataset']}: weights before and after, one scale per layer",
        fontsize=11,
    )
    figure.tight_layout()
    handles = first.get_legend_handles_labels()
    figure.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=9)
    return figure
