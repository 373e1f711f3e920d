"""Curves as SVG and one self-contained HTML page for a run: no library, no script,
nothing from the network."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from miniclip.loss import COLLAPSED
from miniclip.weights import atomic_write

from .run.log import series

Series = Sequence[tuple[float, float]]

Ticks = list[tuple[float, str]]         # where, and what is written there

WIDTH, HEIGHT = 400, 240    # of the axes with their labels; the page gives them 480 pixels at most:
FONT, LINE = 14, 19         # letters of 12 pixels on a phone, 17 on a desk, beside text of 16
ABOVE, BELOW, RIGHT = 30, 44, 16
COLORS = ("#1f5fa8", "#b3541e", "#2f7d4f", "#7a4a9e", "#555555", "#a8821f", "#1f8f9e", "#b0305c")
Rows = list[dict[str, Any]]
SMOOTHING = 0.95        # of curves: an exponential mean over about 20 steps
PLATEAU = 0.98          # of the loss at half time: what ends above has not fallen in the second half
RISE = 1.1              # times the lowest validation error: what ends above has risen
LAST = 20               # steps that all have to lie above it
STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans CJK TC", sans-serif; max-width: 720px; margin: 2em auto;
padding: 0 1em;
       color: #222; background: #fdfcf9 }
h1, h2 { font-weight: 600 } img { max-width: 100%; height: auto }
svg { display: block; width: 100%; max-width: 480px; height: auto } figure { margin: 1.5em 0 }
figcaption, .note { color: #666; font-size: 14px } table { border-collapse: collapse; font-size: 14px }
td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top } img { image-rendering: pixelated }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }
.row { display: flex; flex-wrap: wrap; gap: 12px } .row figure { margin: 0; width: 31% }
.warning { background: #fbe9d7; padding: 6px 12px; border-left: 4px solid #b3541e }
"""


def curve(series: dict[str, Series], x_label: str, y_label: str, log: bool = True) -> str:
    """An SVG line plot of named series of (x, y), y on a logarithmic axis by default."""
    kept = {name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
            for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return '<p class="note">nothing to plot yet</p>'
    xs, ys = ([point[i] for points in kept.values() for point in points] for i in (0, 1))
    across, up = inner_ticks(min(xs), max(xs)), (log_ticks if log else ticks)(min(ys), max(ys))
    left = 14 + round(0.6 * FONT * max(len(text) for _, text in up))
    scale = math.log10 if log else float
    x_range, y_range = (min(xs), max(xs)), (scale(min(up[0][0], *ys)), scale(max(up[-1][0], *ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        right, top = _fraction(x, x_range), _fraction(scale(y), y_range)
        return left + right * (WIDTH - left - RIGHT), HEIGHT - BELOW - top * (HEIGHT - BELOW - ABOVE)

    lines = [_line(points, place, color) for points, color in zip(kept.values(), cycle(COLORS))]
    labels = x_label, f"{y_label}, log scale" if log else y_label
    height = HEIGHT + LINE * sum(map(bool, kept))           # a line of legend for each that has a name
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="{FONT}" '
            f'font-family="sans-serif">{_axes(across, up, place, left, *labels)}'
            f'{"".join(lines)}{_legend(list(kept))}</svg>')


def _fraction(value: float, bounds: tuple[float, float]) -> float:
    return (value - bounds[0]) / ((bounds[1] - bounds[0]) or 1)


def _line(points: Series, place: Any, color: str) -> str:
    spots = [place(x, y) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    ends = f'<circle cx="{spots[-1][0]:.1f}" cy="{spots[-1][1]:.1f}" r="2.5" fill="{color}"/>'
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>{ends}'


def _axes(across: Ticks, up: Ticks, place: Any, left: float, x_label: str, y_label: str) -> str:
    parts = []
    for y, text in up:
        height = place(0, y)[1]
        parts.append(f'<path d="M{left} {height:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
                     f'<text x="{left - 6}" y="{height + 5:.1f}" text-anchor="end">{text}</text>')
    for x, text in across:
        right, bottom = place(x, up[0][0])[0], HEIGHT - BELOW
        parts.append(f'<path d="M{right:.1f} {bottom}v4" stroke="#999"/>'
                     f'<text x="{right:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    middle = (left + WIDTH - RIGHT) / 2
    return (f'{"".join(parts)}<text x="4" y="{FONT + 2}">{html.escape(y_label)}</text>'
            f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>')


def _legend(names: list[str]) -> str:
    """Below the axes: inside them it would lie on lines that end at the top, as those of R@1 should."""
    return "".join(f'<text x="4" y="{HEIGHT + 10 + LINE * i}" fill="{color}">— {html.escape(name)}</text>'
                   for i, (name, color) in enumerate(zip(names, cycle(COLORS))) if name)


# ---------------------------------------------------------------------------------- round numbers for an axis


def ticks(low: float, high: float) -> Ticks:
    """Up to seven round numbers, evenly spaced, that enclose low..high; from 0 if the two are one."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = min(low, 0.0), max(high, 0.0 if low else 1.0)
    step = _round_step((high - low) / 5)
    multiples = range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)
    return _labelled([i * step for i in multiples], step)


def log_ticks(low: float, high: float) -> Ticks:
    """For a logarithmic axis: 1, 2, 5 of each decade; powers of ten if those are many, evenly if few."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    grid = [float(f"{digit}e{e}") for e in exponents for digit in (1, 2, 5)]
    first = max(i for i, value in enumerate(grid) if value <= low * (1 + 1e-9))
    last = min(i for i, value in enumerate(grid) if value >= high * (1 - 1e-9))
    round_ones = grid[first:last + 1]
    if len(round_ones) < 4:
        return [tick for tick in ticks(low, high) if tick[0] > 0]
    if len(round_ones) > 8:
        tens = [float(f"1e{e}") for e in exponents if grid[first] <= float(f"1e{e}") <= grid[last]]
        round_ones = tens[::math.ceil(len(tens) / 7)]
    return [_labelled([value], value)[0] for value in round_ones]


def inner_ticks(low: float, high: float) -> Ticks:
    """Up to five round numbers within low..high, whole ones if both ends are; low if the two are one."""
    if high == low:
        return _labelled([low], abs(low) or 1.0)
    step = _round_step((high - low) / 4)
    if float(low).is_integer() and float(high).is_integer():
        step = max(step, 1.0)
    multiples = range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)
    return _labelled([i * step for i in multiples], step)


def _round_step(least: float) -> float:
    """The least of ... 0.5, 1, 2, 5, 10 ... that is no less."""
    power = math.floor(math.log10(least))
    steps = [float(f"{digit}e{power}") for digit in (1, 2, 5, 10)]
    return next(step for step in steps if step >= least * (1 - 1e-9))


def _labelled(values: list[float], step: float) -> Ticks:
    """With the digits that numbers `step` apart need: 1,400 or 0.25, or 3e-6 where zeros would be many."""
    size, power = max(map(abs, values)), math.floor(math.log10(step) + 1e-9)
    if size and not 1e-4 <= size < 1e7:
        digits = max(0, math.floor(math.log10(size) + 1e-9) - power)
        return [(v, re.sub(r"e\+?(-?)0*", r"e\1", f"{v:.{digits}e}") if v else "0") for v in values]
    return [(round(v, max(0, -power)), f"{v:,.{max(0, -power)}f}") for v in values]


# ----------------------------------------------------------------------------------- what a run's numbers say


def smooth(points: Series) -> list[tuple[float, float]]:
    """An exponential mean over about 20 steps: a diffusion loss is mostly variance."""
    smoothed, mean = [], math.nan
    for step, value in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value if math.isfinite(mean) else value
        smoothed.append((step, mean))
    return smoothed


def diagnose(rows: Rows) -> list[str]:
    """What is wrong with a run, in words, from its metrics; nothing if nothing is."""
    found = []
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if bad := [(step, value) for step, value in series(rows, name) if not math.isfinite(value)]:
            found.append(f"Not a number: the {words} is {bad[0][1]} at step {bad[0][0]} and {len(bad)} times "
                         "in all.")
    losses = smooth([point for point in series(rows, "loss") if math.isfinite(point[1])])
    if len(losses) >= 100:
        half, end = losses[len(losses) // 2], losses[-1]
        if half[1] > 0 and end[1] > PLATEAU * half[1]:
            found.append(f"Plateau: the smoothed loss is {end[1]:.4g}, and was {half[1]:.4g} at step "
                         f"{half[0]} already.")
    checks = [point for point in series(rows, "val") if math.isfinite(point[1])]
    best = min(checks, key=lambda point: point[1], default=None)
    if best and len(checks) >= 3 and checks[-1][1] > RISE * best[1]:
        found.append(f"Validation rises: {checks[-1][1]:.4g} now, {best[1]:.4g} at step {best[0]}; best.pt "
                     "holds that one.")
    return found + _diagnose_clip(rows)


def _diagnose_clip(rows: Rows) -> list[str]:
    found = []
    blind = dict(series(rows, "blind"))
    late = [(step, loss, blind[step]) for step, loss in series(rows, "loss")[-LAST:] if step in blind]
    if len(late) == LAST and all(loss > COLLAPSED * none for _, loss, none in late):
        found.append(f"Not learning: the loss sits at {late[-1][2]:.3f}, that of a model for which all "
                     "pictures are alike.")
    scales = series(rows, "logit_scale")
    last = scales[-len(scales) // 4:]
    if len(scales) >= 20 and len({value for _, value in last}) == 1:
        limit = {0.0: "at its lower limit, exp 0 = 1",
                 round(math.log(100), 4): "at its upper limit, exp = 100"}
        where = limit.get(round(last[0][1], 4), "and does not learn")
        found.append(f"Dead temperature: logit_scale has been {last[0][1]:.4g} since step {last[0][0]}, "
                     f"{where}.")
    return found


def curves(runs: dict[str, tuple[Rows, Rows]]) -> list[str]:
    """Plots for one run or several: name -> (rows of metrics.jsonl, rows of speed.jsonl)."""
    def plot(title: str, name: str, label: str, of: int = 0, log: bool = True) -> list[str]:
        lines = {run: series(both[of], name) for run, both in runs.items()}
        lines = {run: smooth(points) if name in ("loss", "grad_norm") else points
                 for run, points in lines.items()}
        return [f"<h2>{title}</h2>", curve(lines, "step", label, log)] if any(lines.values()) else []

    parts = plot("Training loss", "loss", "smoothed") + plot("Validation", "val", "mean squared error of x0")
    for run, (rows, _) in runs.items():
        bins = [name for name in (rows[0] if rows else {}) if name.startswith("val_") and name[4:].isdigit()]
        if bins:
            lines = {f"timestep {name[4:]}": series(rows, name) for name in bins}
            parts += [f"<h2>Validation by timestep {html.escape(run)}</h2>",
                      curve(lines, "step", "mean squared error of x0")]
    for way in ("image_to_text_R@1", "text_to_image_R@1", "held_out_image_to_text_R@1",
                "held_out_text_to_image_R@1"):
        parts += plot(way.replace("_", " "), way, "R@1", log=False)
    parts += plot("Temperature", "logit_scale", "ln of the factor", log=False)
    parts += plot("Gradient norm", "grad_norm", "before clipping, smoothed")
    parts += plot("Learning rate", "lr", "share of the peak")
    parts += plot("Throughput", "pictures_per_second", "pictures a second", of=1, log=False)
    return parts + plot("Memory", "memory_mib", "MiB at most", of=1, log=False)


def notes(rows: Rows) -> str:
    """The words of `diagnose` as HTML; empty if nothing is wrong."""
    return "".join(f'<p class="warning">{html.escape(line)}</p>' for line in diagnose(rows))


def data_uri(picture: bytes, kind: str) -> str:
    """The bytes of a picture file, kind png, gif or jpeg, as an address that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def picture(path: Path, caption: str) -> str:
    """A PNG or GIF as a figure that carries its bytes."""
    source = data_uri(path.read_bytes(), path.suffix[1:])
    return (f'<figure><img src="{source}" alt="{html.escape(caption)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """An HTML table of any values, escaped; without a header all rows are alike."""
    cells = [["th" if i == 0 and header else "td", row]
             for i, row in enumerate([header, *rows] if header else rows)]
    return "<table>" + "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>"
        for tag, row in cells
    ) + "</table>"


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Writes the page, whole or not at all. title: plain text; parts: HTML."""
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>")
    with atomic_write(path) as file:
        file.write(page.encode("utf-8"))
