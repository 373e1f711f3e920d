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
COLORS = ("#1f5fa8", "#b3541e", "#2f7d4f", "#7a4a9e", "#555555", "#a8821f", "#1f8f9e", "#b0305c")
Rows = list[dict[str, Any]]
STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans CJK TC", sans-serif; max-width: 720px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fdfcf9 }
h1, h2 { font-weight: 600 } img, svg { max-width: 100%; height: auto } figure { margin: 1.5em 0 }
figcaption, .note { color: #666; font-size: 14px } table { border-collapse: collapse; font-size: 14px }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top } img { image-rendering: pixelated }
.row { display: flex; flex-wrap: wrap; gap: 12px } .row figure { margin: 0; width: 31% }
.warning { background: #fbe9d7; padding: 6px 12px; border-left: 4px solid #b3541e }
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
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 16 * len(kept)}" font-size="12" '
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
        x = round(x) if x_range[1] - x_range[0] >= 8 else x         # steps are whole
        height, right = place(x_range[0], y)[1], place(x, 10**y_range[0] if log else y_range[0])[0]
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>'
                     f'<text x="{MARGIN - 6}" y="{height + 4:.1f}" text-anchor="end">{_tick(y)}</text>'
                     f'<text x="{right:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{x:.4g}</text>')
    labels = (f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{html.escape(x_label)}</text>'
              f'<text x="{MARGIN}" y="14">{html.escape(y_label)}</text>')
    return "".join(parts) + labels


def _tick(value: float) -> str:
    """Three digits in the width of the margin: 0.251, 1.7e+03, 6.3e-04."""
    text = f"{value:.3g}"
    return text if len(text) <= 6 else f"{value:.1e}"


def _legend(names: list[str]) -> str:
    """Below the axes: inside them it would lie on lines that end at the top, as those of R@1 should."""
    return "".join(f'<text x="{MARGIN}" y="{HEIGHT + 8 + 16 * i}" fill="{COLORS[i % len(COLORS)]}">— {html.escape(name)}</text>'
                   for i, name in enumerate(names) if name)


# ---- what a run's numbers say


def series(rows: Rows, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def smooth(points: Series) -> list[tuple[float, float]]:
    """An exponential mean over about 20 steps: a diffusion loss is mostly variance."""
    smoothed, mean = [], math.nan
    for step, value in points:
        mean = 0.95 * mean + 0.05 * value if math.isfinite(mean) else value
        smoothed.append((step, mean))
    return smoothed


def diagnose(rows: Rows) -> list[str]:
    """What is wrong with a run, in words, from its metrics; nothing if nothing is."""
    found = []
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if bad := [(step, value) for step, value in series(rows, name) if not math.isfinite(value)]:
            found.append(f"Not a number: the {words} is {bad[0][1]} at step {bad[0][0]} and {len(bad)} times in all.")
    losses = smooth([point for point in series(rows, "loss") if math.isfinite(point[1])])
    if len(losses) >= 100:
        half, end = losses[len(losses) // 2], losses[-1]
        if half[1] > 0 and end[1] > 0.98 * half[1]:
            found.append(f"Plateau: the smoothed loss is {end[1]:.4g}, and was {half[1]:.4g} at step {half[0]} already.")
    checks = [point for point in series(rows, "val") if math.isfinite(point[1])]
    best = min(checks, key=lambda point: point[1], default=None)
    if best and len(checks) >= 3 and checks[-1][1] > 1.1 * best[1]:
        found.append(f"Validation rises: {checks[-1][1]:.4g} now, {best[1]:.4g} at step {best[0]}; best.pt holds that one.")
    return found + _diagnose_clip(rows)


def _diagnose_clip(rows: Rows) -> list[str]:
    found = []
    blind = dict(series(rows, "blind"))
    late = [(step, loss, blind[step]) for step, loss in series(rows, "loss")[-20:] if step in blind]
    if len(late) == 20 and all(loss > 0.97 * none for _, loss, none in late):
        found.append(f"Not learning: the loss sits at {late[-1][2]:.3f}, that of a model for which all pictures are alike.")
    scales = series(rows, "logit_scale")
    last = scales[-len(scales) // 4:]
    if len(scales) >= 20 and len({value for _, value in last}) == 1:
        limit = {0.0: "at its lower limit, exp 0 = 1", round(math.log(100), 4): "at its upper limit, exp = 100"}
        where = limit.get(round(last[0][1], 4), "and does not learn")
        found.append(f"Dead temperature: logit_scale has been {last[0][1]:.4g} since step {last[0][0]}, {where}.")
    return found


def curves(runs: dict[str, tuple[Rows, Rows]]) -> list[str]:
    """Plots for one run or several: name -> (rows of metrics.jsonl, rows of speed.jsonl)."""
    def plot(title: str, name: str, label: str, of: int = 0, log: bool = True) -> list[str]:
        lines = {run: series(both[of], name) for run, both in runs.items()}
        lines = {run: smooth(points) if name in ("loss", "grad_norm") else points for run, points in lines.items()}
        return [f"<h2>{title}</h2>", curve(lines, "step", label, log)] if any(lines.values()) else []

    parts = plot("Training loss", "loss", "smoothed") + plot("Validation", "val", "mean squared error of x0")
    for run, (rows, _) in runs.items():
        bins = [name for name in (rows[0] if rows else {}) if name.startswith("val_") and name[4:].isdigit()]
        if bins:
            lines = {f"timestep {name[4:]}": series(rows, name) for name in bins}
            parts += [f"<h2>Validation by timestep {html.escape(run)}</h2>", curve(lines, "step", "mean squared error of x0")]
    for way in ("image_to_text_R@1", "text_to_image_R@1", "held_out_image_to_text_R@1", "held_out_text_to_image_R@1"):
        parts += plot(way.replace("_", " "), way, "R@1", log=False)
    parts += plot("Temperature", "logit_scale", "ln of the factor", log=False)
    parts += plot("Gradient norm", "grad_norm", "before clipping, smoothed") + plot("Learning rate", "lr", "share of the peak")
    parts += plot("Throughput", "pictures_per_second", "pictures a second", of=1, log=False)
    return parts + plot("Memory", "memory_mib", "MiB at most", of=1, log=False)


def notes(rows: Rows) -> str:
    return "".join(f'<p class="warning">{html.escape(line)}</p>' for line in diagnose(rows))


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
