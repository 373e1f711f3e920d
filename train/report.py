"""Curves as SVG and one self-contained HTML page for a run: no library, no script, nothing from the network."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniclip.weights import atomic_write

Series = Sequence[tuple[float, float]]

WIDTH, HEIGHT, MARGIN = 640, 260, 48
COLORS = ("#1f5fa8", "#b3541e", "#2f7d4f", "#7a4a9e", "#555555")
STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans CJK TC", sans-serif; max-width: 720px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fdfcf9 }
h1, h2 { font-weight: 600 } img, svg { max-width: 100%; height: auto } figure { margin: 1.5em 0 }
figcaption, .note { color: #666; font-size: 14px } table { border-collapse: collapse; font-size: 14px }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top } img { image-rendering: pixelated }
"""


def curve(series: dict[str, Series], x_label: str, y_label: str, log: bool = True) -> str:
    """An SVG line plot of named series of (x, y), y on a logarithmic axis unless told otherwise."""
    kept = {name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
            for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return '<p class="note">nothing to plot yet</p>'
    scale = math.log10 if log else float
    xs = [x for points in kept.values() for x, _ in points]
    ys = [scale(y) for points in kept.values() for _, y in points]
    x_range, y_range = (min(xs), max(xs)), (min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right, top = _fraction(x, x_range), _fraction(scale(y), y_range)
        return MARGIN + right * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - top * (HEIGHT - 1.6 * MARGIN)

    lines = [_line(points, place, COLORS[i % len(COLORS)]) for i, points in enumerate(kept.values())]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" '
            f'font-family="sans-serif">{_axes(x_range, y_range, place, log, x_label, y_label)}'
            f'{"".join(lines)}{_legend(list(kept))}</svg>')


def _fraction(value: float, bounds: tuple[float, float]) -> float:
    return (value - bounds[0]) / ((bounds[1] - bounds[0]) or 1)


def _line(points: Series, place: Any, color: str) -> str:
    spots = [place(x, y) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    ends = f'<circle cx="{spots[-1][0]:.1f}" cy="{spots[-1][1]:.1f}" r="2.5" fill="{color}"/>'
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>{ends}'


def _axes(x_range: tuple, y_range: tuple, place: Any, log: bool, x_label: str, y_label: str) -> str:
    parts = []
    for i in range(5):
        y = y_range[0] + (y_range[1] - y_range[0]) * i / 4
        y = 10**y if log else y
        x = x_range[0] + (x_range[1] - x_range[0]) * i / 4
        height, right = place(x_range[0], y)[1], place(x, 10**y_range[0] if log else y_range[0])[0]
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>'
                     f'<text x="{MARGIN - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.3g}</text>'
                     f'<text x="{right:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{x:.4g}</text>')
    labels = (f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{html.escape(x_label)}</text>'
              f'<text x="{MARGIN}" y="14">{html.escape(y_label)}</text>')
    return "".join(parts) + labels


def _legend(names: list[str]) -> str:
    return "".join(f'<text x="{WIDTH - MARGIN}" y="{30 + 16 * i}" text-anchor="end" '
                   f'fill="{COLORS[i % len(COLORS)]}">{html.escape(name)}</text>' for i, name in enumerate(names))


def picture(path: Path, caption: str) -> str:
    """A PNG as a figure that carries its bytes."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return (f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    cells = [["th" if i == 0 and header else "td", row] for i, row in enumerate([header, *rows] if header else rows)]
    return "<table>" + "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>" for tag, row in cells
    ) + "</table>"


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>")
    with atomic_write(path) as file:
        file.write(page.encode("utf-8"))
