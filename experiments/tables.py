"""The numbers of the article's experiment over seeds, and the tables they make."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.report import mean_sd, spread

COLUMNS = (
    "format",
    "scales",
    "accuracy %",
    "lost points",
    "test loss",
    "kB",
    "bits/weight",
    "SQNR dB",
)


def aggregate(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of the float network and of every row; `lost` is paired, per seed."""
    floats = [seed["float"] for seed in seeds]
    rows = []
    for i, first in enumerate(seeds[0]["rows"]):
        same = [seed["rows"][i] for seed in seeds]
        lost = [f["accuracy"] - r["accuracy"] for f, r in zip(floats, same, strict=True)]
        cells = {k: spread(r[k] for r in same) for k in ("accuracy", "loss", "bytes")}
        optional = {
            k: spread(r[k] for r in same)
            for k in ("bits_per_weight", "sqnr_db")
            if all(r.get(k) is not None for r in same)
        }
        names = {"format": first["format"], "method": first["method"]}
        rows.append({**names, **cells, "lost": spread(lost), **optional})
    head = {k: spread(f[k] for f in floats) for k in ("accuracy", "loss", "bytes")}
    return {"float": head, "rows": rows}


def table_rows(payload: Mapping[str, Any]) -> tuple[tuple[str, ...], Iterable[tuple[str, ...]]]:
    """Columns and rows of the table of one JSON, the float network first."""
    summary = payload["summary"]
    top = summary["float"]
    kilobytes = f"{top['bytes']['mean'] / 1000:.1f}"
    head = ("float32", "", mean_sd(top["accuracy"], 100), "", mean_sd(top["loss"], 1, 3))
    return COLUMNS, [(*head, kilobytes, "32", ""), *(_cells(row) for row in summary["rows"])]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["format"],
        row["method"],
        mean_sd(row["accuracy"], 100),
        mean_sd(row["lost"], 100),
        mean_sd(row["loss"], 1, 3),
        f"{row['bytes']['mean'] / 1000:.1f}",
        f"{row['bits_per_weight']['mean']:.2f}" if "bits_per_weight" in row else "",
        f"{row['sqnr_db']['mean']:.1f}" if "sqnr_db" in row else "",
    )


METHODS = ("absmax", "mse", "output", "fine-tuned")
# Rows of their own, under absmax.
OTHERS = (
    ("w8", "absmax, biases too"),
    ("w8a8", "dynamic"),
    ("w8a8", "static"),
    ("w8", "printed rule"),
)


def article_markdown(
    payload: Mapping[str, Any], sgd: Mapping[str, Any] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The README's table: a row per format, accuracy (and points lost) per kind of scales; the
    float network of another run, with the article's optimizer, as the second row."""
    summary = payload["summary"]
    by_name = {(row["format"], row["method"]): row for row in summary["rows"]}
    columns = ("weights", "kB", "absmax", "weights' MSE", "outputs' MSE", "fine-tuned")
    top = summary["float"]
    size = f"{top['bytes']['mean'] / 1000:.0f}"
    control = _lost(by_name.pop(("float32", "fine-tuned"), None))
    first = ("float32", size, mean_sd(top["accuracy"], 100), "", "", control)
    rows: list[tuple[str, ...]] = [first]
    if sgd is not None:
        accuracy = mean_sd(sgd["summary"]["float"]["accuracy"], 100)
        rows.append(("float32, the article's SGD", size, accuracy, "", "", ""))
    for name in dict.fromkeys(name for name, method in by_name if method == "absmax"):
        cells = [_lost(by_name.get((name, method))) for method in METHODS]
        size = f"{by_name[name, 'absmax']['bytes']['mean'] / 1000:.0f}"
        rows.append((name, size, *cells))
    for name, method in OTHERS:
        if row := by_name.get((name, method)):
            size = f"{row['bytes']['mean'] / 1000:.0f}"
            rows.append((f"{name}, {method}", size, _lost(row), "", "", ""))
    return columns, rows


def _lost(row: Mapping[str, Any] | None) -> str:
    """Accuracy, and in brackets the points lost against the float network of the same seed."""
    if row is None:
        return ""
    lost = mean_sd(row["lost"], 100)
    return f"{100 * row['accuracy']['mean']:.2f} ({lost})"


def bench_markdown(
    payload: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Median milliseconds, and the ratio to the read-and-cast pass of the same run."""
    columns = ("case", "how", "ms", "times the pass", "peak memory, MB")
    rows: list[tuple[str, ...]] = [
        (
            row["case"],
            row["how"],
            f"{row['median_ms']:.1f}",
            f"{row['ratio_to_pass']:.2f}",
            f"{row['peak_mb']:.0f}" if row.get("peak_mb") is not None else "",
        )
        for row in payload["rows"]
    ]
    return columns, rows


def normal_markdown(
    payload: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Mean squared error by bits and levels, and in brackets how far it is from the optimum."""
    kinds = ("half", "full", "narrow", "learned")
    found = {(row["bits"], row["levels"]): row for row in payload["rows"]}
    rows = []
    for bits in dict.fromkeys(row["bits"] for row in payload["rows"]):
        cells = [found.get((bits, kind)) for kind in kinds]
        texts = [f"{c['error']['mean']:.5f} ({c['ratio'] - 1:+z.1%})" if c else "" for c in cells]
        rows.append((str(bits), *texts))
    return ("bits", "half-integer levels", "full", "narrow", "learned codebook"), rows


def inference_markdown(
    payload: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """float32 in milliseconds, then how many times faster each candidate is; in brackets the
    share of what the machine could do at best, by operations or by bytes of weights, whichever
    is nearer. The last rows: the same of tracing and compiling."""
    found = {(row["case"], row["how"]): row for row in payload["rows"]}
    hows = list(dict.fromkeys(how for _, how in found if how != "float32"))
    rows = []
    for case in dict.fromkeys(case for case, _ in found):
        base = found[case, "float32"]
        cells = [found.get((case, how)) for how in hows]
        texts = [f"{c['times_float32']:.2f} {_share(c)}" if c else "" for c in cells]
        rows.append((case, f"{base['median_ms']:.3g} ms {_share(base)}", *texts))
    compiled = {(row["case"], row["how"]): row for row in payload["compile"]}
    for case in dict.fromkeys(case for case, _ in compiled):
        cells = [compiled.get((case, how)) for how in hows]
        texts = [f"{1 / c['times_as_long']:.2f}" if c else "" for c in cells]
        seconds = f"{compiled[case, 'float32']['median_s']:.2f} s"
        rows.append((f"compiling the {case}", seconds, *texts))
    return ("case", "float32", *hows), rows


def ratios_markdown(
    payload: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """How long the first kind of call takes, then how many times as long each other kind does."""
    found = {(row["network"], row["how"]): row for row in payload["rows"]}
    first, *hows = dict.fromkeys(how for _, how in found)
    rows = []
    for network in dict.fromkeys(network for network, _ in found):
        ms = found[network, first]["median_ms"]
        base = f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"
        rows.append((network, base, *(f"{found[network, h]['times_as_long']:.2f}" for h in hows)))
    return ("network", first, *hows), rows


def _share(row: Mapping[str, Any]) -> str:
    return f"({max(row['share_of_ops'], row['share_of_bandwidth']):.0%})"


NETWORKS = {
    "mnist": "article's CNN, MNIST",
    "fashion_mnist": "article's CNN, Fashion-MNIST",
    "cifar10": "article's CNN, CIFAR-10",
    "resnet32": "ResNet-32, CIFAR-10",
}


def activations_markdown(
    payload: Mapping[str, Any],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A row per format and kind of activation scales, a column per network."""
    networks = payload["networks"]
    found = {
        (row["format"], row["method"], name): row
        for name, network in networks.items()
        for row in network["summary"]
    }
    rows = []
    for name, how in dict.fromkeys((name, how) for name, how, _ in found):
        cells = [found.get((name, how, network)) for network in networks]
        if name == "float32":
            texts = [mean_sd(cell["accuracy"], 100) if cell else "" for cell in cells]
        else:
            texts = [_lost(cell) for cell in cells]
        rows.append((name, how, *texts))
    return ("format", "activations", *(NETWORKS[name] for name in networks)), rows
