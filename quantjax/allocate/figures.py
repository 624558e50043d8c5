"""Three figures as SVG text: lines over layers, bars, and a matrix. Colours are the page's."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

HEIGHT, LEFT, RIGHT, TOP = 260, 58, 16, 12
LETTER = 6.6  # pixels of one character of an axis label


def _svg(width: float, height: float, body: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(body)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", turn: float = 0) -> str:
    turned = f' transform="rotate({turn:g} {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{html.escape(text)}</text>'
    )


def _line(x0: float, y0: float, x1: float, y1: float, colour: str = "var(--line)") -> str:
    return f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" stroke="{colour}" fill="none"/>'


def _short(names: Sequence[str], most: int = 28) -> list[str]:
    """Names cut in the middle."""
    half = most // 2
    return [n if len(n) <= most else f"{n[: half - 1]}…{n[-half:]}" for n in names]


def _frame(names: Sequence[str]) -> tuple[float, float, float, list[str]]:
    """Width, step between layers, room below for their names, and those names, turned."""
    names = _short(names)
    step = max(15.0, min(60.0, 940 / len(names)))
    # Names hang to the left of their place: the first ones must not leave the figure.
    below = 0.82 * LETTER * max(map(len, names)) + 16
    width = LEFT + step * len(names) + RIGHT
    labels = [
        _text(LEFT + (i + 0.5) * step + 4, TOP + HEIGHT + 14, name, "end", -55)
        for i, name in enumerate(names)
    ]
    return width, step, below, labels


def curves(names: Sequence[str], series: Mapping[str, Sequence[float]]) -> str:
    """One line of positive numbers over the layers for each name, on a logarithmic scale."""
    positive = [x for values in series.values() for x in values if x > 0]
    if not positive:
        return "<p>No loss is above zero.</p>"
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    low = max(math.floor(math.log10(min(positive))), high - 10)
    high = max(high, low + 1)
    width, step, below, body = _frame(names)

    def place(x: float) -> float:
        share = (math.log10(x) - low) / (high - low)
        return TOP + HEIGHT * (1 - max(share, 0.0))

    for power in range(low, high + 1):
        y = place(10.0**power)
        body += [_line(LEFT, y, width - RIGHT, y), _text(LEFT - 6, y + 4, f"1e{power}", "end")]
    for i, (label, values) in enumerate(series.items()):
        colour = f"var(--c{i % 8})"
        points = [
            (LEFT + (k + 0.5) * step, place(x), names[k], x) for k, x in enumerate(values) if x > 0
        ]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in points)
        if points:
            body.append(f'<path d="M{path}" stroke="{colour}" stroke-width="1.6" fill="none"/>')
        for x, y, name, loss in points:
            tip = html.escape(f"{name}, {label}: {loss:.3g}")
            body.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{tip}</title>'
                "</circle>"
            )
    return _svg(width, TOP + HEIGHT + below, body, "loss of every layer")


def bars(names: Sequence[str], series: Mapping[str, Sequence[float | None]], unit: str) -> str:
    """Bars side by side for each layer; what is not known or not finite is left out."""
    known = [x for v in series.values() for x in v if x is not None and math.isfinite(x)]
    high, low = max([*known, 1.0]), min([*known, 0.0])
    width, step, below, body = _frame(names)

    def place(x: float) -> float:
        return TOP + HEIGHT * (high - x) / (high - low)

    tick = 10.0 ** math.floor(math.log10(high - low))
    tick = tick / 2 if (high - low) / tick < 3 else tick
    for k in range(math.ceil(low / tick), math.floor(high / tick) + 1):
        y = place(k * tick)
        body += [_line(LEFT, y, width - RIGHT, y), _text(LEFT - 6, y + 4, f"{k * tick:g}", "end")]
    body.append(_text(14, TOP + HEIGHT / 2, unit, "middle", -90))
    wide = 0.8 * step / len(series)
    for i, (label, values) in enumerate(series.items()):
        for k, x in enumerate(values):
            if x is None or not math.isfinite(x):
                continue
            left = LEFT + k * step + 0.1 * step + i * wide
            top, bottom = sorted((place(x), place(0.0)))
            tip = html.escape(f"{names[k]}, {label}: {x:.1f} {unit}")
            body.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" '
                f'height="{bottom - top:.1f}" fill="var(--c{i % 8})"><title>{tip}</title></rect>'
            )
    return _svg(width, TOP + HEIGHT + below, body, "SQNR of products")


def heat(names: Sequence[str], matrix: Float[np.ndarray, "n n"]) -> str:
    """A matrix of numbers from -1 to 1: orange above zero, blue below."""
    short = _short(names)
    left = LETTER * max(map(len, short)) + 14
    side = max(8.0, min(30.0, 620 / len(names)))
    size = side * len(names)
    body = []
    every = max(1, math.ceil(13 / side))
    for i, name in enumerate(short):
        if i % every == 0:
            body.append(_text(left - 6, TOP + (i + 0.5) * side + 4, name, "end"))
        for j in range(len(names)):
            x = float(np.clip(matrix[i, j], -1, 1))
            colour = "var(--c1)" if x > 0 else "var(--c0)"
            tip = html.escape(f"{names[i]} and {names[j]}: {x:.2f}")
            body.append(
                f'<rect x="{left + j * side:.1f}" y="{TOP + i * side:.1f}" '
                f'width="{side - 0.5:.1f}" height="{side - 0.5:.1f}" '
                f'fill="{colour}" fill-opacity="{abs(x):.2f}">'
                f"<title>{tip}</title></rect>"
            )
    body.append(
        f'<rect x="{left:.1f}" y="{TOP}" width="{size:.1f}" height="{size:.1f}" fill="none" '
        'stroke="var(--line)"/>'
    )
    return _svg(left + size + RIGHT, TOP + size + 8, body, "how errors of layers meet")
