"""Trees, boats, pavilions and birds, as brush strokes.

Read after brushwork.py, before landscape.py. Everything stands on the point (x, y) and is `size` pixels high,
but for what is said to be wide. Strokes: brushwork.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .brushwork import Strokes, joined, lay_down, resampled, wave

INK = (1.0, 0.0, 0.0)                   # the pigments of a stroke: ink, ochre, indigo
OCHRE, INDIGO, RUSSET = (0.2, 0.8, 0.0), (0.2, 0.25, 0.9), (0.3, 1.3, 0.0)
THATCH = (0.7, 0.7, 0.0)


class Part(NamedTuple):
    """Strokes of one pigment; hides: what is behind does not show through them; dry as in lay_down."""

    strokes: Strokes
    pigment: tuple[float, float, float] = INK
    hides: bool = False
    dry: float = 0.3


def paint_parts(layers: np.ndarray, parts: list[Part], rng: np.random.Generator) -> None:
    """Lays the parts over layers [3, h, w], one after another, in place."""
    for part in parts:
        low = np.floor(part.strokes.points.min((0, 1)) - part.strokes.widths.max() - 2).astype(int)
        high = np.ceil(part.strokes.points.max((0, 1)) + part.strokes.widths.max() + 2).astype(int)
        (x0, y0), (x1, y1) = np.maximum(low, 0), np.minimum(high, layers.shape[:0:-1])
        if x1 <= x0 or y1 <= y0:
            continue
        here, strokes = layers[:, y0:y1, x0:x1], part.strokes.moved(-x0, -y0)
        if part.hides:
            solid = strokes._replace(tones=np.ones_like(strokes.tones))
            here *= 1 - np.minimum(1, lay_down(here.shape[1:], solid, rng))
        ink = lay_down(here.shape[1:], strokes, rng, part.dry)
        here += np.array(part.pigment, np.float32)[:, None, None] * np.minimum(ink, 1.5)


def line(points: list | np.ndarray, width: float | np.ndarray, tone: float) -> Strokes:
    """One stroke through points [P, 2]; width: one or P."""
    points = np.asarray(points, float)[None]
    return Strokes(points, np.broadcast_to(np.asarray(width, float), points.shape[:2]),
                   np.full(points.shape[:2], tone))


def curve(start: np.ndarray, bend: np.ndarray, end: np.ndarray, count: int = 12) -> np.ndarray:
    """Quadratic curves [N, count, 2] from start by way of bend to end, each [N, 2]."""
    t = np.linspace(0, 1, count)[None, :, None]
    return (1 - t)**2 * start[:, None] + 2 * t * (1 - t) * bend[:, None] + t * t * end[:, None]


# ------------------------------------------------------------------------------------------------------ trees


class Wood(NamedTuple):
    """A skeleton: its branches as strokes, its tips [N, 2] and the directions [N] in which they point."""

    strokes: Strokes
    tips: np.ndarray
    angles: np.ndarray


def grow(rng: np.random.Generator, x: float, y: float, size: float, lean: float, levels: int = 6,
         spread: float = 0.55, droop: float = 0.0) -> Wood:
    """A crooked trunk that forks again and again. Angles: 0 is up, positive to the right."""
    at, angles = np.array([[x, y]], float), np.array([lean])
    length, width, parts = size * 0.32, size * 0.055, []
    for level in range(levels):
        steps = rng.normal(0, 0.16, (len(at), 7)).cumsum(1) + angles[:, None] + droop * level
        reach = length * rng.uniform(0.7, 1.25, (len(at), 1)) / 7
        path = np.stack([np.sin(steps), -np.cos(steps)], 2).cumsum(1) * reach[..., None] + at[:, None]
        path = np.concatenate([at[:, None], path], 1)
        taper = np.linspace(1, 0.68, 8)[None] * width * rng.uniform(0.85, 1.1, (len(at), 1))
        parts.append(Strokes(path, taper, np.full(taper.shape, 0.8 if level < 2 else 0.65)))
        forks = 2 if level < 1 else rng.integers(2, 4)
        pick = rng.random((len(at), forks)) * 0.5 + 0.5                             # where on the branch
        pick[:, 0] = 1
        index = np.minimum((pick * 7).round().astype(int), 7)
        at = path[np.arange(len(path))[:, None], index].reshape(-1, 2)
        turn = np.linspace(-1, 1, forks)[None] * spread * rng.uniform(0.6, 1.4, (len(path), forks))
        turn = turn * rng.choice([-1, 1], (len(path), 1))
        angles = (np.clip(steps[:, -1:], -1.7, 1.7) * 0.85 + turn).ravel()
        length, width = length * 0.72, width * 0.62
    return Wood(joined(parts, 8), at, angles)


def trunk(wood: Strokes) -> list[Part]:
    """The skeleton as a pale body between dark edges where it is thick, as ink where it is thin."""
    thick = wood.widths.max(1) > 3
    body = Strokes(*(a[thick] for a in wood))
    parts = [Part(Strokes(*(a[~thick] for a in wood)), dry=0.4)] if (~thick).any() else []
    if not thick.any():
        return parts
    normal = np.gradient(body.points, axis=1)[..., ::-1] * np.array([-1, 1])
    normal /= np.maximum(np.linalg.norm(normal, axis=2, keepdims=True), 1e-6)
    edges = [Strokes(body.points + side * 0.46 * body.widths[..., None] * normal,
                     np.clip(0.2 * body.widths, 0.8, 2.6) * weight, np.full(body.widths.shape, 0.8))
             for side, weight in ((-1, 0.8), (1, 1.3))]
    return [*parts, Part(body._replace(tones=body.tones * 0.45), OCHRE, True, 0.5),
            Part(body._replace(points=body.points + 0.2 * body.widths[..., None] * normal,
                               widths=body.widths * 0.5, tones=body.tones * 0.5), INK, False, 0.9),
            Part(joined(edges, 12), INK, False, 0.4)]


def bare_tree(rng: np.random.Generator, x: float, y: float, size: float, lean: float = 0.0) -> list[Part]:
    """A tree in winter, its twigs hooked like crab claws (蟹爪)."""
    wood = grow(rng, x, y, size, lean, 6, 0.6)
    return trunk(wood.strokes)


def leafy_tree(rng: np.random.Generator, x: float, y: float, size: float, lean: float = 0.0) -> list[Part]:
    """A round tree whose leaves are dots, in ink, russet or green."""
    wood = grow(rng, x, y, size, lean, 5, 0.6)
    many = 10
    at = np.repeat(wood.tips, many, 0) + rng.normal(0, 0.06 * size, (len(wood.tips) * many, 2))
    tint = [INDIGO, RUSSET, INDIGO][rng.integers(3)]
    return [*trunk(wood.strokes), Part(dots(rng, at[::2], 0.045 * size, 0.13), tint, False, 0.2),
            Part(dots(rng, at, 0.017 * size, 0.42), INK, False, 0.2)]


def dots(rng: np.random.Generator, at: np.ndarray, size: float, tone: float) -> Strokes:
    """Dabs [N, 2] of a brush held slanting."""
    tilt = rng.normal(0.1, 0.4, len(at))
    along = np.linspace(-0.5, 0.5, 4)[None] * size * rng.uniform(0.6, 1.5, (len(at), 1))
    points = at[:, None] + np.stack([along * np.cos(tilt)[:, None], along * np.sin(tilt)[:, None]], 2)
    widths = np.array([0.4, 0.75, 0.8, 0.5])[None] * size * np.ones((len(at), 1))
    return Strokes(points, widths, np.broadcast_to(tone * rng.uniform(0.5, 1.1, (len(at), 1)), widths.shape))


def willow(rng: np.random.Generator, x: float, y: float, size: float, lean: float = 0.0) -> list[Part]:
    """A bare willow: from every branch hang long thin strands."""
    wood = grow(rng, x, y, size * 0.95, lean, 4, 0.7)
    start = np.repeat(wood.tips, 7, 0) + rng.normal(0, 0.02 * size, (len(wood.tips) * 7, 2))
    out = np.sin(np.repeat(wood.angles, 7))[:, None] * rng.uniform(0.04, 0.2, (len(start), 1)) * size
    fall = rng.uniform(0.18, 0.5, (len(start), 1)) * size
    fall = np.minimum(fall, (y - size * rng.uniform(0.03, 0.3, fall.shape) - start[:, 1:]).clip(4))
    bend = start + np.concatenate([out, -0.05 * size + 0 * out], 1)
    end = start + np.concatenate([out * 1.5 + rng.normal(0, 0.015 * size, out.shape), fall], 1)
    strands = curve(start, bend, end, 16)
    widths = np.linspace(1, 0.5, 16)[None] * max(0.5, 0.0035 * size) * np.ones((len(start), 1))
    tones = np.broadcast_to(rng.uniform(0.25, 0.65, (len(start), 1)), widths.shape)
    return [*trunk(wood.strokes), Part(Strokes(strands, widths * 2, tones * 0.3), INDIGO, False, 0.2),
            Part(Strokes(strands, widths, tones), INK, False, 0.3)]


def pine(rng: np.random.Generator, x: float, y: float, size: float, lean: float = 0.0) -> list[Part]:
    """An old pine: a bent trunk with scales, level branches, and needles in fans."""
    t = np.linspace(0, 1, 24)
    bend = lean * size * 0.6 * t + wave(rng, 24, 2.2, 3) * 0.10 * size * np.sin(np.pi * t)
    path = np.stack([x + bend, y - size * t], 1)
    stem = Strokes(path[None], (0.062 * size * (1 - 0.75 * t) + 1)[None], np.full((1, 24), 0.8))
    branches, pads = pine_branches(rng, path, size)
    scales = pine_scales(rng, path, stem.widths[0], size)
    return [*trunk(stem), Part(scales, INK, False, 0.3), *trunk(branches), *needles(rng, pads, size)]


def pine_branches(rng: np.random.Generator, path: np.ndarray, size: float) -> tuple[Strokes, np.ndarray]:
    """Branches that leave the trunk to either side and the places [N, 2] of their needles."""
    heights = np.sort(rng.uniform(0.42, 0.98, 11))
    index = (heights * 23).astype(int)
    side = np.where(np.arange(11) % 2, 1, -1) * rng.choice([-1, 1])
    reach = size * (0.44 * (1.08 - heights) + 0.06) * rng.uniform(0.7, 1.2, 11) * side
    start = path[index]
    end = start + np.stack([reach, (rng.uniform(-0.06, 0.04, 11) + 0.25 * (0.75 - heights)) * size], 1)
    middle = start + np.stack([0.5 * reach, rng.uniform(-0.07, 0.0, 11) * size], 1)
    lines = curve(start, middle, end, 12)
    lines[:, 1:-1] += rng.normal(0, 0.006 * size, (11, 10, 2))
    widths = np.linspace(0.020, 0.006, 12)[None] * size * np.ones((11, 1))
    spots = lines[:, [5, 7, 9, 10, 11]].reshape(-1, 2)
    spots = np.concatenate([spots, spots[rng.random(len(spots)) < 0.7], path[[-1, -1, -2]]])
    spots = spots + rng.normal(0, 1, spots.shape) * np.array([0.035, 0.014]) * size
    return Strokes(lines, widths, np.full(widths.shape, 0.75)), spots


def pine_scales(rng: np.random.Generator, path: np.ndarray, widths: np.ndarray, size: float) -> Strokes:
    """The bark: small rings on the lower trunk."""
    at = rng.uniform(0, 15, 40)
    place = np.stack([np.interp(at, np.arange(24), path[:, k]) for k in (0, 1)], 1)
    wide = np.interp(at, np.arange(24), widths)
    place[:, 0] += rng.uniform(-0.32, 0.32, 40) * wide
    turn = np.linspace(0.3, 5.2, 9)[None] + rng.uniform(0, 6, (40, 1))
    ring = np.stack([np.cos(turn), 1.3 * np.sin(turn)], 2) * (0.14 * wide)[:, None, None]
    return Strokes(place[:, None] + ring, np.full((40, 9), max(0.6, 0.0022 * size)), np.full((40, 9), 0.5))


def needles(rng: np.random.Generator, pads: np.ndarray, size: float) -> list[Part]:
    """A fan of needles over each of the places [N, 2], on a wash of dark green."""
    each = 15
    angle = np.linspace(-1.75, 1.75, each)[None] + rng.normal(0, 0.12, (len(pads), each))
    length = 0.048 * size * rng.uniform(0.75, 1.2, (len(pads), each)) * (1 - 0.12 * np.abs(angle))
    tip = pads[:, None] + np.stack([np.sin(angle), -0.8 * np.cos(angle)], 2) * length[..., None]
    root = np.repeat(pads[:, None] + np.array([0, 0.004 * size]), each, 1)
    lines = root[..., None, :] + (tip - root)[..., None, :] * np.linspace(0, 1, 4)[:, None]
    lines = lines.reshape(-1, 4, 2)
    widths = np.array([1, 1, 0.8, 0.4])[None] * max(0.6, 0.0032 * size) * np.ones((len(lines), 1))
    tones = np.broadcast_to(np.repeat(rng.uniform(0.45, 0.85, len(pads)), each)[:, None], widths.shape)
    under = pads + np.array([0, -0.014 * size])
    wash = Strokes(under[:, None] + np.linspace(-0.03, 0.03, 5)[None, :, None] * size * np.array([1, 0]),
                   np.full((len(pads), 5), 0.034 * size), np.full((len(pads), 5), 0.16))
    return [Part(wash, INDIGO, False, 0), Part(Strokes(lines, widths, tones), INK, False, 0.2)]


def grove(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, size: float, tone: float) -> list[Part]:
    """Small trees far off, one on each of the points x, y [N]: a stem and a cloud of dots."""
    n = len(x)
    tall = size * rng.uniform(0.6, 1.3, n)
    root, top = np.stack([x, y], 1), np.stack([x + rng.normal(0, 0.1, n) * tall, y - tall], 1)
    stems = curve(root, (root + top) / 2 + rng.normal(0, 0.05, (n, 2)) * size, top, 6)
    each = 15
    spot = top[:, None] + np.array([0, 0.30]) * tall[:, None, None]
    spot = spot + rng.normal(0, 1, (n, each, 2)) * np.array([0.17, 0.25]) * tall[:, None, None]
    spot = spot.reshape(-1, 2)
    wide = np.full((n, 6), max(0.7, 0.06 * size))
    return [Part(Strokes(stems, wide, np.full((n, 6), tone)), INK, False, 0.2),
            Part(dots(rng, spot[::3], 0.34 * size, 0.3 * tone), INDIGO, False, 0.1),
            Part(dots(rng, spot, 0.15 * size, tone), INK, False, 0.1)]


# --------------------------------------------------------------------------------------- what people made


def filled(left: np.ndarray, right: np.ndarray, tone: float) -> Strokes:
    """The area between two edges [P, 2] that run alongside one another, as strokes from one to the other."""
    length = np.linalg.norm(np.diff((left + right) / 2, axis=0), axis=1).sum()
    rows = max(2, int(np.ceil(length / 1.2)))
    left, right = resampled(left[None], rows)[0], resampled(right[None], rows)[0]
    points = np.stack([left + (right - left) * t for t in np.linspace(0, 1, 5)], 1)
    return Strokes(points, np.full(points.shape[:2], length / rows), np.full(points.shape[:2], tone))


def pavilion(rng: np.random.Generator, x: float, y: float, size: float) -> list[Part]:
    """A roof with upturned corners on four posts (亭)."""
    s, thin = size, max(0.7, 0.02 * size)
    t = np.linspace(0, 1, 12)
    reach, drop = 0.03 + 0.55 * t**1.25, -1.0 + 0.36 * t**0.8 - 0.05 * np.clip(t - 0.8, 0, 1) * 5
    left, right = (np.stack([x + k * reach * s, y + drop * s], 1) for k in (-1, 1))
    eave = curve(left[-1:], np.array([[x, y - 0.55 * s]]), right[-1:], 12)[0]
    tiles = [line(np.stack([x + k * reach * s, y + (drop + 0.035 * (1 - k * k) * t) * s], 1), thin, 0.4)
             for k in np.linspace(-0.85, 0.85, 9)]
    posts = [line([[x + k * s, y - 0.62 * s], [x + k * s, y]], 1.6 * thin, 0.8)
             for k in (-0.4, -0.16, 0.16, 0.4)]
    rails = [line([[x - 0.42 * s, y - d * s], [x + 0.42 * s, y - d * s]], thin, 0.6)
             for d in (0.0, 0.14, 0.2)]
    inside = filled(np.array([[x - 0.4 * s, y - k * s] for k in np.linspace(0.6, 0, 9)]),
                    np.array([[x + 0.4 * s, y - k * s] for k in np.linspace(0.6, 0, 9)]), 0.12)
    knob = line([[x, y - 1.1 * s], [x, y - 0.98 * s]], 2.5 * thin, 0.9)
    edges = [line(left, 1.5 * thin, 0.9), line(right, 1.5 * thin, 0.9), line(eave, 2.2 * thin, 0.9)]
    return [Part(inside, OCHRE, True, 0), Part(joined([*posts, *rails]), INK),
            Part(filled(left, right, 0.5), THATCH, True, 0), Part(joined([*tiles, *edges, knob]), INK)]


def hut(rng: np.random.Generator, x: float, y: float, size: float) -> list[Part]:
    """A house with a thatched gable roof; `size` is its width."""
    s, thin, k = size, max(0.7, 0.018 * size), rng.choice([-1, 1])
    corner = np.array([[-0.5, 0], [0.5, 0], [0.5, -0.32], [-0.5, -0.32], [-0.56, -0.27], [0.56, -0.27],
                       [0.42, -0.58], [-0.42, -0.58]]) * s * np.array([k, 1]) + np.array([x, y])
    wall = filled(np.linspace(corner[3], corner[0], 7), np.linspace(corner[2], corner[1], 7), 0.15)
    roof = filled(np.linspace(corner[7], corner[4], 7), np.linspace(corner[6], corner[5], 7), 0.55)
    reeds = [line([corner[7] + (corner[6] - corner[7]) * t, corner[4] + (corner[5] - corner[4]) * t], thin,
                  0.35) for t in np.linspace(0.05, 0.95, 14)]
    frame = [line(corner[[a, b]], thin * 1.4, 0.8)
             for a, b in ((7, 6), (7, 4), (6, 5), (4, 5), (0, 3), (1, 2), (0, 1))]
    door = line([[x - 0.05 * s, y - 0.02 * s], [x - 0.05 * s, y - 0.22 * s]], 0.14 * s, 0.55)
    lines = joined([*reeds, *frame, door])
    return [Part(wall, OCHRE, True, 0), Part(roof, THATCH, True, 0), Part(lines, INK)]


def boat(rng: np.random.Generator, x: float, y: float, size: float) -> list[Part]:
    """A fisherman in a flat boat with an awning, `size` pixels long."""
    s, thin, k = size, max(0.7, 0.014 * size), rng.choice([-1, 1])

    def at(points: list) -> np.ndarray:
        return np.asarray(points, float) * np.array([k * s, s]) + np.array([x, y])

    t = np.linspace(-0.5, 0.5, 17)
    rim = np.stack([t, -0.075 - 0.35 * np.abs(t)**2.4], 1)
    keel = np.stack([t * 0.92, 0.012 - 0.06 * (2 * np.abs(t))**4 - 0.02 * (t > 0.4)], 1)
    arch = np.linspace(0, np.pi, 13)
    awning = np.stack([-0.10 - 0.17 * np.cos(arch), -0.09 - 0.15 * np.sin(arch)], 1)
    ribs = [line(at(awning + np.array([d, 0.004])), thin, 0.45) for d in (-0.03, 0.03)]
    body = [line(at([[0.27, -0.10], [0.28, -0.17], [0.265, -0.21]]), np.array([0.075, 0.06, 0.03]) * s, 0.75),
            line(at([[0.225, -0.215], [0.265, -0.25], [0.315, -0.21]]), 0.028 * s, 0.85),
            line(at([[0.28, -0.16], [0.36, -0.17]]), 0.02 * s, 0.7)]
    rod = line(at([[0.34, -0.165], [0.6, -0.33], [0.78, -0.40]]), thin * 0.8, 0.6)
    wake = [line(at([[a, d], [(a + b) / 2, d + 0.008], [b, d]]), thin, 0.25)
            for a, b, d in ((-0.62, -0.1, 0.05), (-0.3, 0.55, 0.085), (0.1, 0.7, 0.045))]
    shade = filled(at(np.stack([awning[:7, 0], awning[:7, 1]], 1)), at(awning[:5:-1]), 0.5)
    edges = [line(at(rim), 1.6 * thin, 0.85), line(at(keel), 2 * thin, 0.8),
             line(at(awning), 1.5 * thin, 0.8)]
    return [Part(joined(wake), INK), Part(filled(at(rim), at(keel), 0.45), THATCH, True, 0),
            Part(shade, THATCH, True, 0), Part(joined([*edges, *ribs, *body, rod]), INK)]


def geese(rng: np.random.Generator, x: float, y: float, size: float) -> list[Part]:
    """A skein of birds far off, along a bent line `size` pixels long."""
    n = int(rng.integers(5, 10))
    t = np.linspace(0, 1, n) + rng.normal(0, 0.02, n)
    at = np.stack([x + size * t, y - size * 0.22 * t + size * 0.10 * np.sin(5 * t)], 1)
    wing = np.array([[-1, -0.35], [-0.45, -0.5], [0, 0], [0.5, -0.55], [1, -0.25]]) * 0.03 * size
    scale = rng.uniform(0.7, 1.1, n)[:, None, None]
    return [Part(Strokes(at[:, None] + wing * scale, np.array([[0.5, 1, 1.4, 1, 0.5]]) * 0.005 * size
                         * np.ones((n, 1)) + 0.4, np.full((n, 5), 0.6)), INK, False, 0)]


def ripples(rng: np.random.Generator, x: float, y: float, width: float, depth: float, count: int,
            unit: float) -> list[Part]:
    """Thin level lines on water in an area centred on (x, y)."""
    cx, cy = x + rng.normal(0, 0.3, count) * width, y + rng.uniform(-0.5, 0.5, count) * depth
    half = rng.uniform(0.03, 0.16, count) * width
    t = np.linspace(-1, 1, 14)[None]
    sway = np.stack([wave(rng, 14, 2.5, 2) for _ in range(count)])
    points = np.stack([cx[:, None] + half[:, None] * t, cy[:, None] + sway * 2.2 * unit], 2)
    press = np.sqrt(np.clip(1 - t * t, 0, 1)) * np.ones((count, 1))
    return [Part(Strokes(points, (0.4 + 0.9 * press) * unit, 0.22 * press), INK, False, 0.6)]
