"""Strokes as a brush leaves them: outlines that are sharp at any size, and ink in pixels.

Read after data/strokes.py. The brush's tuft is an ellipse that leans as a right hand holds it, so that
strokes begin and end on a slant. It is pressed where a stroke begins and at corners, ink pools where it
stops, and where it runs fast its hairs part and paper shows (飛白).
Shapes: n places along a stroke, m corners of an outline; float32, in boxes, y down. Ink is 0..1, 1 is full
ink.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .data.strokes import Character, Stroke, normals, resample

PLACES = 320                # along a box's length
LEAN = math.radians(52)     # of the tuft's long axis, from upper left to lower right
ASPECT = 0.62               # of the tuft: short axis by long axis
TIP = 0.22                  # how far the tuft's tip reaches out where it touches down, in widths
POOL = 0.04                 # how much wider a stroke is where the brush stops
ROUGH = 0.028               # unevenness of the edges, in widths
STEP = 0.004                # along an outline, in boxes
CORNER = math.radians(55)   # a sharper turn within a brush's width is a corner
FAST = 0.38                 # a stroke longer than this, in boxes, runs dry towards its end
WET = 0.05                  # boxes: a brush this wide begins to hold more ink than it can spend
OVERSAMPLE = 4              # pixels are means of so many by so many
PALE = 0.9                  # ink where nothing pools


class Marks(NamedTuple):
    """What a stroke leaves: polygons of ink, all of one winding, and polygons of paper within, of the other.
    """

    ink: list[np.ndarray]
    paper: list[np.ndarray]


# ------------------------------------------------------------------------------------------------ the stroke


def fine(stroke: Stroke) -> tuple[np.ndarray, np.ndarray]:
    """A smooth line through a stroke's points: points [n, 2] close together, widths [n]."""
    rows = np.column_stack([stroke.points, stroke.widths]).astype(np.float64)
    count = max(24, round(stroke.length() * PLACES))
    padded = np.concatenate([2 * rows[:1] - rows[1:2], rows, 2 * rows[-1:] - rows[-2:-1]])
    at = np.linspace(0, len(rows) - 1 - 1e-6, 4 * count)
    k, t = at.astype(int), (at % 1)[:, None]
    a, b, c, d = (padded[k + i] for i in range(4))              # Catmull and Rom's cubic from b to c
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    curve = resample(curve, count)
    return curve[:, :2], np.maximum(curve[:, 2], 0.003)


def corners(points: np.ndarray, widths: np.ndarray) -> list[int]:
    """Where a line turns sharply within a brush's width: places along it, the sharpest of each turn."""
    step = np.linalg.norm(points[1] - points[0])
    reach = np.maximum(2, (widths / 2 / max(step, 1e-6)).astype(int))
    here = np.arange(len(points))
    before, after = (points[np.clip(here + sign * reach, 0, len(points) - 1)] for sign in (-1, 1))
    into, out = points - before, after - points
    size = np.linalg.norm(into, axis=1) * np.linalg.norm(out, axis=1)
    turn = np.arccos(np.clip((into * out).sum(1) / np.maximum(size, 1e-9), -1, 1))
    turn[(here < reach) | (here >= len(points) - reach)] = 0
    found: list[int] = []
    for k in np.argsort(-turn):
        if turn[k] < CORNER:
            break
        if all(abs(k - other) > 2 * reach[k] for other in found):
            found.append(int(k))
    return sorted(found)


def stops(points: np.ndarray, widths: np.ndarray) -> list[int]:
    """Where the brush rests: the beginning, the corners, and the end unless it is lifted there in a point."""
    pressed = widths[-1] > 0.45 * np.median(widths)
    return [0, *corners(points, widths), *([len(points) - 1] if pressed else [])]


def pooled(points: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """How much ink pools at each place [n], 0 to 1."""
    found = np.zeros(len(points))
    for k in stops(points, widths):
        away = np.linalg.norm(points - points[k], axis=1) / max(widths[k], np.median(widths))
        found = np.maximum(found, np.exp(-away ** 2))
    return found


# -------------------------------------------------------------------------------------------------- outlines


def marks(stroke: Stroke, seed: int = 0) -> Marks:
    """The outline of a stroke, of the same seed the same. Pieces between corners overlap where they meet."""
    rng = np.random.default_rng(seed)
    points, widths = fine(stroke)
    widths = widths * (1 + POOL * pooled(points, widths))
    cuts = [0, *corners(points, widths), len(points) - 1]
    ink = [envelope(points[a:b + 1], widths[a:b + 1], rng, a == 0, b == cuts[-1])
           for a, b in zip(cuts, cuts[1:])]
    return Marks(ink, hairs(points, widths, cuts, rng))


def envelope(points: np.ndarray, widths: np.ndarray, rng: np.random.Generator, begins: bool,
             ends: bool) -> np.ndarray:
    """The edge [m, 2] of what the tuft sweeps along a line without corners: one side, the end, the other side
    back, the beginning, where the tip shows if the stroke `begins` there. At a corner
    both are round."""
    across = normals(points)
    first, last = (math.atan2(y, x) for x, y in (across[0], across[-1]))
    half_turn = np.linspace(0, math.pi, 24)[1:-1]
    ways = np.concatenate([across, unit(last + half_turn), -across[::-1], unit(first + math.pi + half_turn)])
    place = np.concatenate([np.arange(len(points)), np.full(22, len(points) - 1),
                            np.arange(len(points))[::-1], np.zeros(22, int)])
    size = widths[place][:, None]
    reach = tuft(ways, across[place])
    if not ends:
        reach[len(points):len(points) + 22] = ways[len(points):len(points) + 22] / 2
    if begins:
        reach[-22:] += TIP * (ways[-22:] @ -unit(LEAN)).clip(0)[:, None] ** 6 * ways[-22:]
    else:
        reach[-22:] = ways[-22:] / 2
    edge = points[place] + reach * size
    edge += ROUGH * noise(edge, size[:, 0], rng)[:, None] * ways * size
    return smoothed(without_loops(edge[~swept_over(edge, points, widths)])).astype(np.float32)


def swept_over(edge: np.ndarray, points: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Which corners of an edge [m] the tuft has passed over from elsewhere: the inner side of a bend
    folds."""
    away = np.hypot(edge[:, None, 0] - points[:, 0], edge[:, None, 1] - points[:, 1])
    return (away < 0.43 * widths).any(1)


def without_loops(edge: np.ndarray) -> np.ndarray:
    """A closed edge [m, 2] without the small loops where it crosses itself."""
    edge = np.roll(edge, -(len(edge) // 8), axis=0)             # begin amid a side: no loop lies across there
    step = np.roll(edge, -1, axis=0) - edge
    off = edge[None] - edge[:, None]                            # [from, to, 2]
    side = np.sign(step[:, None, 0] * off[..., 1] - step[:, None, 1] * off[..., 0])
    parted = side * np.roll(side, -1, axis=1) < 0      # the ends of line j lie on two sides of i
    crosses = np.triu(parted & parted.T, 2) & ~np.triu(parted, len(edge) // 3)
    kept, k = [], 0
    while k < len(edge):
        kept.append(k)
        ahead = crosses[k].nonzero()[0]
        k = ahead[-1] + 1 if len(ahead) else k + 1
    return edge[kept]


def smoothed(edge: np.ndarray) -> np.ndarray:
    """A closed edge [m, 2] with equal steps and without spurs shorter than those."""
    closed = np.concatenate([edge, edge[:1]])
    length = np.linalg.norm(np.diff(closed, axis=0), axis=1).sum()
    edge = resample(closed, max(16, round(length / STEP)) + 1)[:-1]
    for _ in range(2):
        edge = (np.roll(edge, 1, axis=0) + 2 * edge + np.roll(edge, -1, axis=0)) / 4
    return edge


def unit(angle: float | np.ndarray) -> np.ndarray:
    """One long, in this direction: [2], or [m, 2] of many."""
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def tuft(ways: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The point of the tuft that lies farthest in each of these ways [m, 2], where the stroke goes `across`
    [m, 2]: the tuft is as wide there as the stroke, which is 1."""
    long, short = unit(LEAN), unit(LEAN + math.pi / 2)
    shape = np.outer(long, long) + ASPECT ** 2 * np.outer(short, short)
    farthest, half_width = ways @ shape, np.sqrt(((across @ shape) * across).sum(1))
    return 0.5 * farthest / (np.sqrt((farthest * ways).sum(1)) * half_width)[:, None]


def noise(places: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth unevenness along an edge [m, 2], about -1 to 1: waves of a brush's width, and of a fifth of it.
    """
    steps = np.linalg.norm(np.diff(places, axis=0, prepend=places[:1]), axis=1)
    along = np.cumsum(steps / np.maximum(sizes, 0.01))
    total = np.zeros(len(places))
    for per_width, weight in ((1.1, 0.7), (5.0, 0.35)):
        knots = rng.standard_normal(int(along[-1] * per_width) + 3)
        at = along * per_width
        k, t = at.astype(int), at % 1
        t = t * t * (3 - 2 * t)
        total += weight * (knots[k] * (1 - t) + knots[k + 1] * t)
    return total.clip(-1.5, 1.5)


def hairs(points: np.ndarray, widths: np.ndarray, cuts: list[int], rng: np.random.Generator
          ) -> list[np.ndarray]:
    """Slivers of paper where a fast brush's hairs part, along the line and clear of ends and corners."""
    step = float(np.linalg.norm(points[1] - points[0]))
    long = step * len(points)
    slivers, across = [], normals(points)
    wet = np.clip(np.median(widths) / WET - 1, 0, 1)            # a full brush does not run dry
    for _ in range(rng.poisson(max(0, 18 * (long - FAST)) * (1 - wet))):
        middle = int(len(points) * (0.68 + 0.17 * rng.standard_normal()))
        half = max(3, int(rng.uniform(0.015, 0.06) / step))
        span = slice(middle - half, middle + half + 1)
        clear = min(abs(middle - cut) for cut in cuts) - half
        if clear * step < 0.7 * np.median(widths) or not half <= middle < len(points) - half:
            continue
        side = rng.uniform(-0.42, 0.42) * widths[span, None]
        thick = rng.uniform(0.012, 0.045) * np.sin(np.linspace(0, math.pi, 2 * half + 1))[:, None] ** 0.7
        line = points[span] + across[span] * side
        edge = across[span] * thick * widths[span, None]
        slivers.append(np.concatenate([(line - edge), (line + edge)[::-1]]).astype(np.float32))
    return slivers


# ---------------------------------------------------------------------------------------------------- pixels


def layer(stroke: Stroke, size: int, seed: int = 0) -> np.ndarray:
    """The ink of one stroke, float32 [size, size]."""
    shape, side = marks(stroke, seed), size * OVERSAMPLE
    canvas = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(canvas)
    for polygons, value in ((shape.ink, 255), (shape.paper, 0)):
        for polygon in polygons:
            pen.polygon([tuple(corner) for corner in (polygon * side - 0.5).tolist()], fill=value)
    covered = np.asarray(canvas, np.float32).reshape(size, OVERSAMPLE, size, OVERSAMPLE).mean((1, 3)) / 255
    return covered * (PALE + (1 - PALE) * pools(stroke, size))


def pools(stroke: Stroke, size: int) -> np.ndarray:
    """Where ink gathers, float32 [size, size], 0..1: about the places where the brush stops."""
    points, widths = fine(stroke)
    places, found = centres(size, size), np.zeros((size, size), np.float32)
    for k in stops(points, widths):
        away = ((places - points[k]) ** 2).sum(-1) / max(widths[k], np.median(widths)) ** 2
        found = np.maximum(found, np.exp(-away))
    return found


def layers(character: Character, size: int, seed: int = 0) -> np.ndarray:
    """The ink of each stroke by itself, float32 [S, size, size]."""
    return np.stack([layer(stroke, size, 1000 * seed + k) for k, stroke in enumerate(character.strokes)])


def write(character: Character, size: int, seed: int = 0) -> np.ndarray:
    """The ink of a character, float32 [size, size]."""
    return together(layers(character, size, seed))


def together(inks: np.ndarray) -> np.ndarray:
    """Ink over ink, [S, h, w] -> [h, w]: never lighter than either."""
    return inks.max(0)


def centres(height: int, width: int) -> np.ndarray:
    """[height, width, 2]: the middle of each pixel, in boxes of the longer side, the picture in the box's
    middle."""
    side = max(height, width)
    x = (np.arange(width) + (side - width) / 2 + 0.5) / side
    y = (np.arange(height) + (side - height) / 2 + 0.5) / side
    return np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1).astype(np.float32)


def arrival(stroke: Stroke, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When the brush reaches each of the places [h, w, 2], 0 at the stroke's beginning to 1 at its end, and
    how far they are from the stroke's edge, in boxes, below 0 within it: two float32 [h, w].

    The front is round, as the tuft is; what the tuft never touches goes with the nearest part of the line.
    """
    points, widths = fine(stroke)
    rows = resample(np.column_stack([points, widths]), min(len(points), 64))
    when, edge = np.ones(places.shape[:2], np.float32), np.full(places.shape[:2], np.inf, np.float32)
    for t, (x, y, width) in zip(np.linspace(0, 1, len(rows)), rows, strict=True):
        away = np.hypot(places[..., 0] - x, places[..., 1] - y) - width / 2
        when[(edge > 0.1 * width) & (away < edge)] = t          # not touched yet, and nearer than ever
        edge = np.minimum(edge, away)
    return when, edge
