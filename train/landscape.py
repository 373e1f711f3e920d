"""A landscape in the old manner (仿古), painted by arithmetic: another one for each seed.

    landscape(1536, 1024, seed=7)       # uint8 [3, 1536, 1024], a hanging scroll

Read after brushwork.py, mountains.py and scenery.py.
Shapes: h height, w width; three pigments (ink, ochre, indigo) as densities: out = silk * exp(-density).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .brushwork import Strokes, cloud, lay_down, smoothstep
from .mountains import Fold, massif, paint_fold
from .scenery import (
    bare_tree,
    boat,
    geese,
    grove,
    hut,
    leafy_tree,
    paint_parts,
    pavilion,
    pine,
    ripples,
    willow,
)

ABSORBS = np.array([[1.20, 1.25, 1.30],         # of red, green and blue, by the ink,
                    [0.20, 0.52, 0.92],         # the ochre
                    [0.85, 0.52, 0.30]])        # and the indigo
SILK = np.array([0.80, 0.715, 0.565])           # its colour, aged


def landscape(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [3, height, width]: mountains in mist, water, trees; the same picture for the same arguments."""
    rng = np.random.default_rng(seed)
    layers = np.zeros((3, height, width), np.float32)
    scene = Scene(layers, rng, min(height, width) / 1024, int(rng.choice([-1, 1])))
    (hanging_scroll if height > width else hand_scroll)(scene)
    ground = silk((height, width), rng, scene.unit)
    density = np.tensordot(ABSORBS.T.astype(np.float32), layers, 1)
    return (255 * np.clip(ground * np.exp(-density), 0, 1) + 0.5).astype(np.uint8)


class Scene(NamedTuple):
    """What is painted on: layers [3, h, w]; the pixels of a unit; side of the light: -1 left, 1 right."""

    layers: np.ndarray
    rng: np.random.Generator
    unit: float
    side: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.layers.shape[2], self.layers.shape[1]

    def place(self, x: float, y: float) -> tuple[float, float]:
        """In pixels, of x from 0 at the dark side to 1 at the light side, and y from 0 to 1."""
        w, h = self.size
        return w * (x if self.side > 0 else 1 - x), h * y


def hanging_scroll(scene: Scene) -> None:
    """Seen from below (高遠): a mountain above mist, hills, water with a boat, trees in front."""
    rng, (w, h), unit = scene.rng, scene.size, scene.unit
    far_ranges(scene, 0.44, 0.13)
    low = rng.random() < 0.35                   # a lower, wider mountain, paler as it is farther away
    x, top = scene.place(rng.uniform(0.30, 0.46), rng.uniform(*((0.27, 0.32) if low else (0.14, 0.21))))
    mountain(scene, massif(rng, x, (0.62 if low else 0.50) * w, top, 0.61 * h, 0.34 if low else 0.42, 26))
    mist(scene, 0.585, 0.05, 0.9)
    x, top = scene.place(rng.uniform(0.80, 0.95), rng.uniform(0.56, 0.60))
    mountain(scene, massif(rng, x, 0.42 * w, top, 0.74 * h, 0.55, 14))
    shore(scene, 0.75, 0.735, 0.45)
    water(scene, 0.66, 0.93)
    boat_at(scene, rng.uniform(0.70, 0.84), rng.uniform(0.79, 0.84), 95 * unit)
    foreground(scene, rng.uniform(0.16, 0.26), 0.93, 0.42 * w)
    paint_parts(scene.layers, geese(rng, *scene.place(0.66, rng.uniform(0.27, 0.31)), 120 * unit), rng)


def hand_scroll(scene: Scene) -> None:
    """Seen across water (平遠): a mountain at one side, low hills far away, trees in front."""
    rng, (w, h), unit = scene.rng, scene.size, scene.unit
    far_ranges(scene, 0.50, 0.16)
    low = rng.random() < 0.35
    x, top = scene.place(rng.uniform(0.18, 0.30), rng.uniform(*((0.28, 0.34) if low else (0.12, 0.19))))
    mountain(scene, massif(rng, x, (0.38 if low else 0.30) * w, top, 0.66 * h, 0.34 if low else 0.42, 26))
    mist(scene, 0.62, 0.07, 0.9)
    x, top = scene.place(rng.uniform(0.50, 0.60), rng.uniform(0.52, 0.58))
    mountain(scene, massif(rng, x, 0.20 * w, top, 0.70 * h, 0.5, 12))
    shore(scene, 0.45, 0.70, 0.35)
    water(scene, 0.68, 0.95)
    near = rng.choice([0.12, 0.86])
    away = (0.55, 0.66) if near < 0.5 else (0.30, 0.42)
    boat_at(scene, rng.uniform(*away), rng.uniform(0.78, 0.84), 95 * unit)
    foreground(scene, near, 0.92, 0.26 * w)
    paint_parts(scene.layers, geese(rng, *scene.place(0.66, rng.uniform(0.36, 0.42)), 120 * unit), rng)


def far_ranges(scene: Scene, level: float, size: float) -> None:
    """Pale blue ridges across the whole width, whose feet stand at the height `level` and a little lower."""
    rng, (w, h) = scene.rng, scene.size
    for i in range(3):
        for _ in range(3):
            base = (level + 0.35 * size * i) * h
            top = base - size * h * rng.uniform(0.5, 1.0)
            x, half, steep = rng.uniform(0, w), w * rng.uniform(0.2, 0.4), rng.uniform(1.4, 2.2)
            fold = Fold(x, half, top, base, 0.04 * i, steep)
            paint_fold(scene.layers, fold, rng, scene.unit, scene.side)


def mountain(scene: Scene, folds: list[Fold]) -> None:
    """The folds, far to near, with small trees on the crests of the nearer ones."""
    for fold in folds:
        x, y = paint_fold(scene.layers, fold, scene.rng, scene.unit, scene.side)
        if fold.near > 0.4 and scene.rng.random() < 0.75:
            trees_on(scene, x, y, fold)


def trees_on(scene: Scene, x: np.ndarray, y: np.ndarray, fold: Fold) -> None:
    """A grove where the crest [N] of the fold is not too steep."""
    rng = scene.rng
    middle = rng.uniform(0.2, 0.8)
    at = rng.normal(middle, 0.12, int(rng.integers(4, 14)))
    at = at[(at > 0.08) & (at < 0.92)] * (len(x) - 1)
    steep = np.abs(np.interp(at, np.arange(len(x)), np.gradient(y)))
    at = at[steep < 1.6].astype(int)
    if len(at):
        size = scene.unit * (10 + 24 * fold.near**1.5)
        parts = grove(rng, x[at], y[at] + 2 * scene.unit, size, 0.2 + 0.3 * fold.near)
        paint_parts(scene.layers, parts, rng)


def mist(scene: Scene, level: float, depth: float, strength: float) -> None:
    """A bank of mist in which all that has been painted grows pale."""
    w, h = scene.size
    drift = cloud(scene.rng, (h, w), (0.1 * h, 0.35 * w), 0.55, 8)
    y = np.linspace(0, 1, h)[:, None]
    bank = np.exp(-(((y - level) / depth + 0.45 * drift)**2))
    scene.layers[:] *= (1 - strength * bank).astype(np.float32)


def shore(scene: Scene, x: float, y: float, half: float) -> None:
    """Flat banks of land that reach out into the water, at the foot of the hills."""
    rng, unit, reach = scene.rng, scene.unit, half * scene.size[0]
    for i in range(4):
        px, py = scene.place(x + rng.uniform(-0.5, 0.5) * half, y + 0.008 * i)
        top = py - rng.uniform(8, 22) * unit
        mountain(scene, [Fold(px, reach * rng.uniform(0.3, 0.6), top, py + 6 * unit, 0.5, 2.5)])
        if i < 2:
            for _ in range(2):
                at, size = px + rng.uniform(-60, 60) * unit, rng.uniform(30, 44) * unit
                paint_parts(scene.layers, hut(rng, at, py - 4 * unit, size), rng)


def water(scene: Scene, top: float, bottom: float) -> None:
    """Level lines in loose groups."""
    rng, (w, h) = scene.rng, scene.size
    for _ in range(7):
        x, y = scene.place(rng.uniform(0.1, 0.9), rng.uniform(top + 0.05, bottom))
        paint_parts(scene.layers, ripples(rng, x, y, 0.3 * w, 0.03 * h, 9, scene.unit), rng)


def boat_at(scene: Scene, x: float, y: float, size: float) -> None:
    """A boat at a place."""
    paint_parts(scene.layers, boat(scene.rng, *scene.place(x, y), size), scene.rng)


def foreground(scene: Scene, x: float, y: float, half: float) -> None:
    """A bank at the lower edge with tall trees, a pavilion and rocks."""
    rng, (w, h), unit = scene.rng, scene.size, scene.unit
    cx, cy = scene.place(x, y)
    bank = Fold(cx, half * 1.35, cy - 30 * unit, h + 60 * unit, 0.7, 3.5, 0.22)
    columns, crest = paint_fold(scene.layers, bank, rng, unit, scene.side)

    def ground(at: float) -> float:
        return float(np.interp(at, columns, crest))

    half = half if cx < w / 2 else -half                    # along it towards the middle of the picture
    at = cx + half * rng.uniform(0.68, 0.82)
    paint_parts(scene.layers, pavilion(rng, at, ground(at) + 12 * unit, 84 * unit), rng)
    kinds = [pine, rng.choice([willow, bare_tree]), pine, leafy_tree, rng.choice([leafy_tree, bare_tree])]
    places = rng.permutation(np.linspace(-0.75, 0.40, len(kinds))) + rng.uniform(-0.06, 0.06, len(kinds))
    for kind, place in zip(kinds, places, strict=True):
        tall = unit * rng.uniform(240, 330) * {pine: 1.25, willow: 1.15}.get(kind, 0.95)
        at = cx + half * place
        root = ground(at) + rng.uniform(8, 30) * unit
        paint_parts(scene.layers, kind(rng, at, root, tall, rng.uniform(-0.2, 0.2)), rng)
    rocks(scene, [(cx + half * p, ground(cx + half * p)) for p in [*places, *rng.uniform(-1, 1, 7)]])


def rocks(scene: Scene, places: list[tuple[float, float]]) -> None:
    """A boulder before each of the places, the highest first."""
    rng, unit = scene.rng, scene.unit
    for x, y in sorted(places, key=lambda place: place[1]):
        tall = rng.uniform(22, 62) * unit
        base = y + tall * 0.3 + rng.uniform(24, 70) * unit
        half = tall * rng.uniform(0.9, 1.7)
        mountain(scene, [Fold(x + rng.normal(0, 20) * unit, half, base - tall * 1.4, base, 0.8,
                              rng.uniform(2, 3.2), 0.8)])


def silk(shape: tuple[int, int], rng: np.random.Generator, unit: float) -> np.ndarray:
    """Old silk, rgb [3, h, w] in 0..1: threads, wear, stains and darker borders."""
    h, w = shape
    y, x = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)[None]
    tone = 0.035 * cloud(rng, shape, (h / 2.5, w / 2.5), 0.65, 3) - 0.12 * (np.abs(y)**7 + np.abs(x)**7)
    tone += 0.012 * cloud(rng, shape, (3 * unit + 1, 3 * unit + 1), 0.8, 1)
    for along, across in (((14 * unit + 2), 1.0), (1.0, (14 * unit + 2))):          # weft and warp
        tone += 0.011 * cloud(rng, shape, (across, along), 0, 1)
    tone -= stains(shape, rng, unit)
    aged = np.exp(tone[None] * np.array([0.8, 1, 1.35])[:, None, None])             # brown, where it is dark
    return (SILK[:, None, None] * aged).astype(np.float32)


def stains(shape: tuple[int, int], rng: np.random.Generator, unit: float) -> np.ndarray:
    """Where water has dried, with darker rims, and small brown spots: density [h, w]."""
    h, w = shape
    field = cloud(rng, shape, (0.45 * h, 0.45 * w), 0.55, 3)
    rim = np.exp(-((field - 1.15) / 0.035)**2) * 0.035 + 0.035 * smoothstep(1.15, 1.9, field)
    count = int(rng.integers(25, 60))
    at = rng.uniform(0, 1, (count, 2)) * np.array([w, h])
    size = np.minimum(rng.exponential(2, (count, 1)), 7) * unit + 0.8
    along = np.linspace(-0.5, 0.5, 8)
    points = at[:, None] + along[None, :, None] * size[..., None] * np.array([1, 0])
    spots = Strokes(points, size * np.sqrt(1.02 - 4 * along**2), np.full((count, 8), 0.2))
    return rim + np.minimum(0.2, lay_down(shape, spots, rng))


