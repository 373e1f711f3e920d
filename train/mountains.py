"""Mountains as the old painters built them: folds that overlap, dark at the crest, lost in mist below.

Read after brushwork.py, before landscape.py.
Shapes: h height, w width of the paper; three pigments (ink, ochre, indigo); lengths in pixels, y down.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .brushwork import Strokes, cloud, joined, lay_down, smoothstep, wave


class Fold(NamedTuple):
    """One fold of a mountain: centre x, half its width, top and base; near 0 far away .. 1 in front."""

    x: float
    half: float
    top: float
    base: float
    near: float
    steep: float = 1.6      # the power of its outline: 1 pointed, 3 like a loaf
    rough: float = 1.0      # how broken its outline is


def crest_of(fold: Fold, columns: np.ndarray, rng: np.random.Generator, unit: float) -> np.ndarray:
    """The y of the fold's outline at these columns [w]."""
    u = np.clip((columns - fold.x) / fold.half, -1, 1)
    u = np.clip(u + rng.uniform(-0.3, 0.3) * (1 - u * u), -1, 1)
    rise = (1 - np.abs(u)**fold.steep)**1.15
    n, height = len(columns), fold.base - fold.top
    swings = max(2.0, 2 * fold.half / max(height, 1) * 2.2)
    broken = 0.36 * fold.rough * min(height, 1.5 * fold.half) * (0.5 + fold.near)
    rough = wave(rng, n, swings, 5, 0.55, 0.35) * broken
    rough += wave(rng, n, max(2.0, 2 * fold.half / (40 * unit)), 4, 0.6, 0.3) * (3 + 7 * fold.near) * unit
    crest = fold.base - height * rise + rough * np.minimum(1, 1.2 * rise)**0.6
    return fold.base - (fold.base - crest) * height / max(1.0, fold.base - crest.min())


class Relief(NamedTuple):
    """Spines and gullies that fan out from the crest: a profile [K] along `position`."""

    profile: np.ndarray
    drift: np.ndarray       # how spines wander, by depth

    def facing(self, across: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """How far the slope faces right (1) or left (-1): at across -1..1 and depth 0..1 of the fold."""
        last = len(self.profile) - 1
        wander = np.interp(depth, np.linspace(0, 2, len(self.drift)), self.drift)
        at = np.clip(across / (1 + 0.55 * depth) + 0.10 * wander, -1, 1)
        return np.interp(at, np.linspace(-1, 1, last + 1), self.profile)


def relief_of(fold: Fold, rng: np.random.Generator, unit: float) -> Relief:
    """A spine about every 55 units: steep on one side, so that its faces are light and dark."""
    spines = np.clip(2 * fold.half / (60 * unit), 2, 14)
    return Relief(np.tanh(2.5 * wave(rng, 400, spines, 3, 0.45)), wave(rng, 60, 5, 3))


def paint_fold(layers: np.ndarray, fold: Fold, rng: np.random.Generator, unit: float,
               light: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays a fold over layers [3, h, w], in place: it hides what is behind, and its foot fades.

    light: the side, -1 or 1, from which it is lit. Returns the x and y [N] of its outline.
    """
    _, h, w = layers.shape
    left, right = int(fold.x - fold.half), int(fold.x + fold.half) + 1
    columns = np.arange(left, right) + 0.5
    crest = crest_of(fold, columns, rng, unit)
    top, bottom = int(max(0, crest.min() - 4)), int(min(h, fold.base + 2))
    span = slice(max(0, -left), len(columns) - max(0, right - w))
    if bottom - top < 4 or span.stop - span.start < 4:
        return columns, crest
    depth = np.arange(top, bottom)[:, None] + 0.5 - crest[None]                     # below the outline
    slope = np.gradient(crest)
    cover = np.clip(depth / np.sqrt(1 + slope**2) + 0.5, 0, 1) * foot(fold, depth.shape, top, rng, unit)
    relief = relief_of(fold, rng, unit)
    wash = shades(fold, depth, (columns - fold.x) / fold.half, relief, rng, light)
    strokes = fold_strokes(fold, crest, left, relief, rng, unit, light)
    ink = lay_down(depth.shape, strokes.moved(-left, -top), rng, 0.5)
    wash[0] += np.minimum(ink, 1.3)
    here = layers[:, top:bottom, max(0, left):min(w, right)]
    cover = cover[None, :, span]
    here += cover * (wash[:, :, span] - here)
    return columns, crest


def foot(fold: Fold, shape: tuple[int, int], top: int, rng: np.random.Generator, unit: float) -> np.ndarray:
    """1 in the body of the fold, falling to 0 at its base along a drifting edge: [h, w]."""
    height = fold.base - fold.top
    drift = cloud(rng, shape, (max(8, height * 0.35), max(16, height * 0.9)), 0.5, 6)
    at = (np.arange(top, top + shape[0])[:, None] - fold.top) / height + 0.12 * np.abs(drift)
    return 1 - smoothstep(0.5 + 0.2 * fold.near, 0.97, at)


def shades(fold: Fold, depth: np.ndarray, u: np.ndarray, relief: Relief, rng: np.random.Generator,
           light: int) -> np.ndarray:
    """The washes of ink, ochre and indigo on a fold, [3, h, w]."""
    height, near = fold.base - fold.top, fold.near
    down = np.maximum(depth, 0) / height
    facing = relief.facing(u[None] + 0 * depth, down)
    mottle = cloud(rng, depth.shape, (max(8, height * 0.3), max(8, height * 0.3)), 0.6, 3)
    shadow = 0.5 - 0.5 * light * (0.9 * facing + 0.4 * u[None]) + 0.15 * mottle
    fall = np.exp(-down / 0.32)
    dark = np.clip(shadow, 0.05, 1.3) * (0.25 + 0.75 * fall) + 0.35 * np.exp(-down / 0.05)
    ink = (0.07 + 0.55 * near) * dark + 0.10 * (0.3 - near) * (near < 0.3)
    ochre = near * (0.14 + 0.26 * np.clip(1 - shadow, 0, 1)) * (0.3 + 0.7 * fall)
    blue = np.maximum(0, 0.34 - 0.5 * near) * (0.3 + 0.7 * fall) + 0.20 * near * np.clip(shadow - 0.4, 0, 1)
    return np.stack([ink, ochre, blue]).astype(np.float32)


def fold_strokes(fold: Fold, crest: np.ndarray, left: int, relief: Relief, rng: np.random.Generator,
                 unit: float, light: int) -> Strokes:
    """The outline, the hemp-fibre strokes (披麻皴) that run down from it, and dots of moss along it."""
    if fold.near < 0.25:
        return outline(fold, crest, left, rng, unit)
    return joined([outline(fold, crest, left, rng, unit), fibres(fold, crest, left, relief, rng, unit, light),
                   moss(fold, crest, left, rng, unit)])


def outline(fold: Fold, crest: np.ndarray, left: int, rng: np.random.Generator, unit: float) -> Strokes:
    """The crest in short overlapping strokes, pressed here and lifted there."""
    n = len(crest)
    pieces = max(2, int(n / (34 * unit)))
    at = np.linspace(0, n - 1, pieces * 11 + 1)
    y = np.interp(at, np.arange(n), crest) + wave(rng, len(at), pieces / 2, 2) * 0.8 * unit
    points = np.stack([at + left, y + 0.6 * unit], 1)
    index = np.arange(pieces)[:, None] * 11 + np.arange(12)
    press = 0.45 + np.abs(wave(rng, len(at), pieces * 0.8, 2))
    return Strokes(points[index], (press * (0.9 + 1.5 * fold.near) * unit)[index],
                   (np.clip(press, 0.3, 1) * (0.12 + 0.75 * fold.near))[index])


def fibres(fold: Fold, crest: np.ndarray, left: int, relief: Relief, rng: np.random.Generator,
           unit: float, light: int) -> Strokes:
    """Long loose strokes down the slopes, more of them on faces in shadow."""
    n, height = len(crest), fold.base - fold.top
    count = int(np.clip(fold.half * height / (22 * unit * unit) * (0.4 + 0.6 * fold.near), 20, 12000))
    at, start = rng.uniform(0.01, 0.99, count), rng.exponential(0.24, count)
    facing = relief.facing(2 * at - 1, start)
    shadow = np.clip(0.5 - 0.5 * light * (0.8 * facing + 0.4 * (2 * at - 1)), 0, 1)
    keep = rng.random(count) < 0.10 + 0.9 * shadow**1.5
    at, start, facing = at[keep], start[keep], facing[keep]
    length = rng.uniform(12, 40, len(at)) * unit * (0.5 + 0.6 * fold.near)
    lean = 0.8 * (2 * at - 1) + 0.55 * facing + rng.normal(0, 0.12, len(at))
    t = np.linspace(0, 1, 10)[None]
    x = (at * n)[:, None] + length[:, None] * lean[:, None] * t * (1 - 0.3 * t)
    x += rng.normal(0, 0.3 * unit, x.shape).cumsum(1)
    y = np.interp(at * n, np.arange(n), crest)[:, None] + start[:, None] * height + length[:, None] * t
    press = np.sin(np.pi * np.clip(t * 0.85 + 0.15, 0, 1))**0.7
    weak = np.exp(-start / 0.5)[:, None] * rng.uniform(0.3, 1, (len(at), 1))
    return Strokes(np.stack([x + left, y], 2), press * rng.uniform(0.7, 1.9, (len(at), 1)) * unit,
                   weak * press * (0.15 + 0.55 * fold.near))


def moss(fold: Fold, crest: np.ndarray, left: int, rng: np.random.Generator, unit: float) -> Strokes:
    """Dots (苔點), in clusters where the crest has hollows."""
    n = len(crest)
    count = int(n / (5 * unit))
    at = rng.uniform(0.03, 0.97, count)
    at = at[rng.random(count) < smoothstep(0.0, 0.9, np.interp(at * n, np.arange(n), wave(rng, n, 5, 2)))]
    x, y = at * n, np.interp(at * n, np.arange(n), crest)
    y = y + rng.exponential(5, len(at)) * unit - 2 * unit
    size = rng.uniform(1.5, 4, len(at)) * unit * (0.5 + 0.6 * fold.near)
    tilt = rng.normal(0, 0.35, len(at))
    along = np.linspace(-0.5, 0.5, 4)[None] * size[:, None]
    points = np.stack([x[:, None] + left + along * np.cos(tilt)[:, None],
                       y[:, None] + along * np.sin(tilt)[:, None]], 2)
    press = np.array([0.6, 1, 1, 0.6])[None] * size[:, None] * 0.85
    return Strokes(points, press, np.full(press.shape, 0.15 + 0.55 * fold.near))


def massif(rng: np.random.Generator, x: float, half: float, top: float, base: float, near: float,
           count: int) -> list[Fold]:
    """A mountain, its folds far to near: a peak among lesser ones, then shoulders and alum-heads (礬頭) that
    step down from it to the foot. x, half, top, base, near: as of a Fold; count: of the lower folds.
    """
    height = base - top
    folds = [Fold(x, 0.72 * half, top, base - 0.1 * height, near, rng.uniform(1.2, 1.6))]
    for side in (-1, 1, -1, 1, -1, 1):
        away = rng.uniform(0.2, 0.68)
        folds.append(Fold(x + side * away * half, half * rng.uniform(0.3, 0.46),
                          top + height * (0.12 + 0.70 * away + rng.uniform(-0.06, 0.06)),
                          base - rng.uniform(0, 0.15) * height, near, rng.uniform(1.2, 1.9)))
    for i in range(count):
        t = (i + rng.uniform(0, 1)) / count                                         # 0 peak .. 1 foot
        size = half * rng.uniform(0.12, 0.34) * (0.7 + 0.5 * t)
        foot_y = top + height * (0.3 + 0.7 * t)
        room = max(0.0, half * (0.18 + 0.72 * t) - 0.85 * size)
        rise = size * rng.uniform(0.45, 1.1)
        folds.append(Fold(x + room * np.clip(rng.normal(0, 0.55), -1, 1), size, foot_y - rise, foot_y,
                          near + 0.15 * t, rng.uniform(1.4, 2.6)))
    return sorted(folds, key=lambda fold: fold.base - 0.3 * (fold.base - fold.top))
