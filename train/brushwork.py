"""Brush strokes and noise, the two things that a procedural painting is made of.

Read before scenery.py and landscape.py. Strokes are rows of points; many are laid down at once.
Shapes: N strokes, P points each, h height, w width; all lengths in pixels, x to the right, y down.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

SPACING = 0.8       # pixels between two dabs, along the stroke and across it


class Strokes(NamedTuple):
    """points [N, P, 2]; widths [N, P] of the brush; tones [N, P], the ink's density."""

    points: np.ndarray
    widths: np.ndarray
    tones: np.ndarray

    def moved(self, dx: float, dy: float) -> Strokes:
        """The same strokes elsewhere."""
        return self._replace(points=self.points + np.array([dx, dy]))


def joined(parts: list[Strokes], count: int = 24) -> Strokes:
    """All strokes of the parts, each resampled to `count` points."""
    fitted = [Strokes(*(resampled(np.asarray(a, float), count) for a in part)) for part in parts]
    return Strokes(*(np.concatenate(arrays) for arrays in zip(*fitted, strict=True)))


def resampled(rows: np.ndarray, count: int) -> np.ndarray:
    """[N, P] or [N, P, 2] -> `count` in place of P, linearly."""
    at = np.linspace(0, rows.shape[1] - 1, count)
    low = np.minimum(at.astype(int), max(rows.shape[1] - 2, 0))
    high = np.minimum(low + 1, rows.shape[1] - 1)
    share = (at - low).reshape(1, -1, *[1] * (rows.ndim - 2))
    return rows[:, low] * (1 - share) + rows[:, high] * share


def lay_down(shape: tuple[int, int], strokes: Strokes, rng: np.random.Generator,
             dry: float = 0.0) -> np.ndarray:
    """The density of ink [h, w] that the strokes leave; dry 0..1: how far single bristles run out of ink."""
    points, normals, widths, tones, steps = dabs(strokes)
    hairs = np.maximum(1, np.ceil(widths / SPACING)).astype(int)
    which = np.repeat(np.arange(len(points)), hairs)
    index = np.arange(len(which)) - np.repeat(np.cumsum(hairs) - hairs, hairs)
    across = ((index + 0.5) / hairs[which] - 0.5) * widths[which]
    ink = (tones * steps * widths / hairs)[which]
    if dry:
        ink = ink * bristles(index, which, rng, dry)
    return splat(shape, points[which] + across[:, None] * normals[which], ink)


def dabs(strokes: Strokes) -> tuple[np.ndarray, ...]:
    """Points [M, 2], normals [M, 2], widths, tones and step lengths [M] of all strokes, evenly spaced."""
    points, widths, tones = (np.asarray(a, np.float32) for a in strokes)
    delta = np.diff(points, axis=1)
    lengths = np.hypot(delta[..., 0], delta[..., 1])                                # [N, P - 1]
    counts = np.maximum(1, np.ceil(lengths / SPACING)).astype(int).ravel()
    piece = np.repeat(np.arange(counts.size), counts)
    index = np.arange(piece.size) - np.repeat(np.cumsum(counts) - counts, counts)
    share = ((index + 0.5) / counts[piece]).astype(np.float32)

    def between(values: np.ndarray) -> np.ndarray:
        first, last = values[:, :-1].ravel()[piece], values[:, 1:].ravel()[piece]
        return first + (last - first) * share

    unit = (delta / np.maximum(lengths, 1e-6)[..., None]).reshape(-1, 2)[piece]
    where = np.stack([between(points[..., 0]), between(points[..., 1])], 1)
    normals = np.stack([-unit[:, 1], unit[:, 0]], 1)
    return where, normals, between(widths), between(tones), lengths.ravel()[piece] / counts[piece]


def bristles(index: np.ndarray, which: np.ndarray, rng: np.random.Generator, dry: float) -> np.ndarray:
    """How much ink each bristle still has at each dab: streaks along the stroke."""
    table = rng.random((64, 4096)).astype(np.float32)
    table = (table + np.roll(table, 1, 1) + np.roll(table, 2, 1) + np.roll(table, 3, 1)) / 4
    wet = table[index % 64, (which // 5) % 4096]
    return np.clip((wet - 0.5 * dry) / (1 - 0.5 * dry) * 4 - 1, 0, None).clip(0, 1.4) * dry + (1 - dry)


def splat(shape: tuple[int, int], points: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """Amounts [M] shared out to the four pixels around each point [M, 2]: float32 [h, w]."""
    h, w = shape
    at = points - 0.5
    low = np.floor(at).astype(np.int64)
    fx, fy = (at - low).T
    total = np.zeros(h * w)
    for dx, dy, share in ((0, 0, (1 - fx) * (1 - fy)), (1, 0, fx * (1 - fy)), (0, 1, (1 - fx) * fy),
                          (1, 1, fx * fy)):
        x, y = low[:, 0] + dx, low[:, 1] + dy
        inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
        total += np.bincount((y * w + x)[inside], (amounts * share)[inside], h * w)
    return total.reshape(h, w).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ noise


def wave(rng: np.random.Generator, count: int, cells: float, octaves: int = 6, fall: float = 0.5,
         sharp: float = 0.0) -> np.ndarray:
    """A fractal curve [count] in about -1..1 with `cells` swings; sharp: from 0, round, to 1, with ridges."""
    total, amplitude = np.zeros(count), 1.0
    for octave in range(octaves):
        knots = rng.uniform(-1, 1, int(np.ceil(cells * 2**octave)) + 4)
        at = np.linspace(1, 1 + cells * 2**octave, count)
        curve = cubic(knots, at)
        total += amplitude * ((1 - sharp) * curve + sharp * (0.6 - 1.6 * np.abs(curve)))
        amplitude *= fall
    return total


def cubic(knots: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A B-spline through, nearly, the knots [K] at positions 1 .. K - 3: smooth and without overshoot."""
    low = np.minimum(at.astype(int), len(knots) - 3)
    f = at - low
    a, b, c, d = (knots[np.clip(low + k, 0, len(knots) - 1)] for k in (-1, 0, 1, 2))
    return 1.5 * (a * (1 - f)**3 + b * (3 * f**3 - 6 * f**2 + 4) + c * (1 + 3 * f + 3 * f**2 - 3 * f**3)
                  + d * f**3) / 6


def cloud(rng: np.random.Generator, shape: tuple[int, int], cell: tuple[float, float], fall: float = 0.5,
          finest: float = 2.0) -> np.ndarray:
    """Fractal noise float32 [h, w] of mean 0 and deviation about 1.

    cell: height and width of its largest swings in pixels; fall: how much less each halving adds, down to
    cells of `finest` pixels.
    """
    rows, columns = (int(np.ceil(side / c)) + 2 for side, c in zip(shape, cell, strict=True))
    x = torch.from_numpy(rng.standard_normal((1, 1, rows, columns)).astype(np.float32))
    size, amplitude, power = min(cell), 1.0, 1.0
    while size / 2 >= finest and fall:
        amplitude, size = amplitude * fall, size / 2
        x = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
        x = x + amplitude * torch.from_numpy(rng.standard_normal(x.shape).astype(np.float32))
        power += amplitude**2
    scale = 2.0**round(np.log2(max(min(cell) / size, 1)))
    h, w = (max(2, round(side / c * scale)) for side, c in zip(shape, cell, strict=True))
    x = F.interpolate(x[:, :, :h + 1, :w + 1], shape, mode="bicubic", align_corners=True)[0, 0]
    return (x / power**0.5).numpy()


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """0 up to low, 1 from high on, smooth between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
