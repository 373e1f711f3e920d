"""A seal: characters cut into a square stone, pressed in vermilion, its edge worn.

Read after ink.py, before paint.py.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .brushwork import cloud, smoothstep
from .ink import blur

VERMILION = np.array([0.70, 0.16, 0.11], np.float32)
CUTS = ("朱文", "白文")          # red characters on paper; paper-coloured ones on red
MOST = 4                        # characters on a seal
FINER = 3                       # it is cut so many times larger than it is pressed
FRAME = 0.06                    # the frame's width, as a share of the side


def stamp(inks: list[np.ndarray], side: int, cut: str, rng: np.random.Generator) -> np.ndarray:
    """How much paste [side, side] the seal leaves, 0..1, with characters from their inks [h, w] in 0..1."""
    size = side * FINER
    red = engraved(inks, size) if cut == CUTS[0] else white_cut(inks, size)
    ragged = red + 0.07 * cloud(rng, red.shape, (size / 7, size / 7), 0.6, 2)
    pressed = smoothstep(0.30, 0.62, blur(ragged, max(0.4, size / 160)))
    worn = cloud(rng, red.shape, (size / 4, size / 4), 0.75, 1) + 1.1 * rim(size)
    pressure = 0.90 + 0.10 * cloud(rng, red.shape, (size / 3, size / 3), 0.5, 2)
    paste = pressed * smoothstep(2.6, 2.1, worn) * np.clip(pressure, 0.5, 1)
    return paste.astype(np.float32).reshape(side, FINER, side, FINER).mean((1, 3))


def rim(side: int) -> np.ndarray:
    """0 within, rising to 1 at the edge and above at the corners, [side, side]: where stone chips first."""
    t = np.abs(np.linspace(-1, 1, side))
    return (t[:, None]**14 + t[None]**14) * 0.75


def rounded(side: int, inset: float) -> np.ndarray:
    """A square with soft corners, `inset` (a share of the side) from the edge."""
    t = np.abs(np.linspace(-1, 1, side)) / (1 - 2 * inset)
    distance = (t[:, None]**9 + t[None]**9)**(1 / 9)
    return smoothstep(1 + 2.5 / side, 1 - 2.5 / side, distance)


def engraved(inks: list[np.ndarray], side: int) -> np.ndarray:
    """朱文: a frame and characters."""
    frame = rounded(side, 0.01) - rounded(side, 0.01 + FRAME)
    return np.maximum(frame, filled(inks, side, FRAME + 0.045))


def white_cut(inks: list[np.ndarray], side: int) -> np.ndarray:
    """白文: a red field out of which characters are cut."""
    return np.clip(rounded(side, 0.01) - filled(inks, side, 0.075), 0, 1)


def filled(inks: list[np.ndarray], side: int, inset: float) -> np.ndarray:
    """Characters that fill the square but for `inset` of its side all around: columns from right to left."""
    out, gap = np.zeros((side, side), np.float32), 0.03 * side
    columns = [inks[:2], inks[2:]] if len(inks) > 2 else [inks]
    room = side * (1 - 2 * inset)
    for k, column in enumerate(columns):
        wide = (room - gap * (len(columns) - 1)) / len(columns)
        tall = (room - gap * (len(column) - 1)) / len(column)
        left = side * (1 - inset) - wide * (k + 1) - gap * k
        for row, ink in enumerate(column):
            top = side * inset + (tall + gap) * row
            x0, y0, x1, y1 = round(left), round(top), round(left + wide), round(top + tall)
            if x1 > x0 and y1 > y0:
                out[y0:y1, x0:x1] = stretched(ink, y1 - y0, x1 - x0)
    return out


def stretched(ink: np.ndarray, height: int, width: int) -> np.ndarray:
    """The box of the ink [h, w] fitted to a cell, its strokes made of one strength: [height, width]."""
    rows, columns = np.flatnonzero((ink > 0.3).any(1)), np.flatnonzero((ink > 0.3).any(0))
    if not len(rows):
        return np.zeros((height, width), np.float32)
    box = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    image = Image.fromarray(box.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    bold = blur(np.asarray(image), max(0.3, 0.018 * min(height, width)))
    return smoothstep(0.12, 0.5, bold)


def pressed_on(rgb: np.ndarray, paste: np.ndarray) -> np.ndarray:
    """The paper [3, h, w] under paste [h, w]: it covers, but lets a little of the paper's tone through."""
    tone = VERMILION[:, None, None] * (0.75 + 0.35 * rgb.mean(0, keepdims=True))
    return rgb + 0.93 * paste * (tone - rgb)
