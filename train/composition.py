"""Writing on a painting: where each character stands, the ink, the halo, the seal, and how it comes to be.

    compose(painting, inks, layout="column", place="auto", seal=Seal(inks, "朱文"), seed=7)

Read after ink.py, placement.py and seal.py, before paint.py. The painting comes from landscape.py or a file.
Shapes: H height, W width of the painting, h and w of the sheet, the part of it that changes; a painting is
uint8 [3, H, W], an ink float32 [s, s] in 0..1 (1 ink), each of any size of its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from .errors import UserError
from .ink import halo_of, inked, soaked
from .placement import emptiest
from .seal import pressed_on, stamp

LAYOUTS = ("column", "row")
CHARACTER = 0.095           # its side, as a share of the square root of the painting's area
SMALLEST = 24               # pixels of its side, where there is room
ROOM = 0.8                  # the most of a side of the painting that the text takes
PITCH, COLUMN = 1.0, 1.18   # from one character to the next, and from column to column, in sides
SEAL, GAP = 0.66, 0.20      # the seal's side and the space above it, in sides
BLANK = 0.66                # around the text: the halo stays within it, in sides
MARGIN = 0.045              # from the painting's edges, as a share of its shorter side


class Seal(NamedTuple):
    """The inks of 1 to 4 characters and how they are cut: one of seal.CUTS."""

    inks: list[np.ndarray]
    cut: str


class Box(NamedTuple):
    """A square of the painting, in pixels."""

    x: int
    y: int
    side: int


class Sheet(NamedTuple):
    """What compose changes: the part of the painting from (x, y) on, float32 [3, h, w], in layers.

    paper: with halo, without ink; density: of the ink [h, w]; paste: of the seal [h, w]; halo: its weight
    [h, w]; cells: of the characters in order, and stamp: of the seal, on the painting; emptier: the share of
    windows that are emptier than the chosen one (None: the place was given).
    """

    x: int
    y: int
    paper: np.ndarray
    density: np.ndarray
    paste: np.ndarray
    halo: np.ndarray
    cells: list[Box]
    stamp: Box | None
    emptier: float | None

    @property
    def touched(self) -> np.ndarray:
        """Which pixels [h, w] may change."""
        return (self.density > 0) | (self.paste > 0) | (self.halo > 0)


def compose(painting: np.ndarray, inks: list[np.ndarray], layout: str = "column", place: str = "auto",
            seal: Seal | None = None, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """The painting with the text on it, uint8 [3, H, W].

    layout: column, from top to bottom, or row; both go on from right to left. place: "auto" or "x,y", the
    upper left corner in pixels. scale: of the characters. Raises UserError for a place where it does not fit.
    """
    return finished(painting, write_on(painting, inks, layout, place, seal, seed, scale))


def write_on(painting: np.ndarray, inks: list[np.ndarray], layout: str, place: str, seal: Seal | None,
             seed: int, scale: float = 1.0) -> Sheet:
    """The sheet with the text, as `compose` has it."""
    rng = np.random.default_rng(seed)
    cells, stamp_box, emptier = places(painting, len(inks), layout, place, seal is not None, scale)
    side = cells[0].side
    window = around([*cells, *([stamp_box] if stamp_box else [])], int(BLANK * side), painting.shape)
    x0, y0, x1, y1 = window
    rgb = painting[:, y0:y1, x0:x1].astype(np.float32) / 255
    ink = np.zeros(rgb.shape[1:], np.float32)
    for cell, one in zip(cells, inks, strict=True):
        put(ink, fitted_ink(one, cell.side), cell.x - x0, cell.y - y0)
    paste = np.zeros_like(ink)
    if stamp_box:
        put(paste, stamp(seal.inks, stamp_box.side, seal.cut, rng), stamp_box.x - x0, stamp_box.y - y0)
    halo, paper = halo_of(np.maximum(ink, paste), rgb, side)
    density = soaked(ink, paper, rng, max(0.5, side / 160))
    return Sheet(x0, y0, paper, density, paste, halo, cells, stamp_box, emptier)


def finished(painting: np.ndarray, sheet: Sheet, ink: bool = True) -> np.ndarray:
    """A copy of the painting with the sheet on it; ink=False: with the halo alone."""
    rgb = pressed_on(inked(sheet.paper, sheet.density), sheet.paste) if ink else sheet.paper
    out, (h, w) = painting.copy(), sheet.density.shape
    here = out[:, sheet.y:sheet.y + h, sheet.x:sheet.x + w]
    changed = (255 * np.clip(rgb, 0, 1) + 0.5).astype(np.uint8)
    here[:, sheet.touched] = changed[:, sheet.touched]
    return out


# ----------------------------------------------------------------------------------------------------- layout


def grid_of(count: int, layout: str) -> tuple[int, int]:
    """Rows and columns. Verses of five or seven characters get a column each."""
    if layout == "row":
        rows = math.ceil(count / 8)
        return rows, math.ceil(count / rows)
    rows = count
    if count > 8:
        rows = next((k for k in (7, 5) if count % k == 0), math.ceil(math.sqrt(2 * count)))
    return rows, math.ceil(count / rows)


def places(painting: np.ndarray, count: int, layout: str, place: str, sealed: bool,
           scale: float) -> tuple[list[Box], Box | None, float | None]:
    """The cells of the characters, the place of the seal, and how many windows are emptier."""
    _, height, width = painting.shape
    rows, columns = grid_of(count, layout)
    tall = PITCH * rows + (SEAL + GAP if sealed else 0)
    wide = 1 + COLUMN * (columns - 1)
    side = max(CHARACTER * math.sqrt(height * width) * min(1, 8 / count)**0.35, SMALLEST) * scale
    side = max(1, int(min(side, ROOM * height / tall, ROOM * width / wide)))
    h, w = math.ceil(tall * side), math.ceil(wide * side)
    if place == "auto":
        x, y, emptier = emptiest(painting, h, w, int(MARGIN * min(height, width)))
    else:
        (x, y), emptier = given(place, h, w, painting.shape), None
    cells = [Box(int(x + w - (column * COLUMN + 1) * side), int(y + row * PITCH * side), side)
             for row, column in order(count, rows, columns, layout)]
    below = Box(int(cells[-1].x + (1 - SEAL) / 2 * side), int(cells[-1].y + (PITCH + GAP) * side),
                max(1, int(SEAL * side)))
    return cells, below if sealed else None, emptier


def order(count: int, rows: int, columns: int, layout: str) -> list[tuple[int, int]]:
    """Row and column, counted from the right, of each character."""
    return [divmod(i, columns) if layout == "row" else divmod(i, rows)[::-1] for i in range(count)]


def given(place: str, h: int, w: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """x and y of a place "x,y". Raises UserError where the text would not fit."""
    try:
        x, y = (int(part) for part in place.split(","))
    except ValueError:
        raise UserError(f"--place {place[:40]}: auto, or x,y in pixels such as 120,80") from None
    if not (0 <= x <= shape[2] - w and 0 <= y <= shape[1] - h):
        raise UserError(f"--place {place[:40]}: the text takes {w}x{h} pixels of the painting's "
                        f"{shape[2]}x{shape[1]}: x is at most {shape[2] - w}, y at most {shape[1] - h}; "
                        "--scale makes it smaller")
    return x, y


def around(boxes: list[Box], margin: int, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of what holds all boxes and a margin, within the painting."""
    return (max(0, min(box.x for box in boxes) - margin), max(0, min(box.y for box in boxes) - margin),
            min(shape[2], max(box.x + box.side for box in boxes) + margin),
            min(shape[1], max(box.y + box.side for box in boxes) + margin))


def put(sheet: np.ndarray, patch: np.ndarray, x: int, y: int) -> None:
    """Lays a patch on the sheet, in place; where both have ink the stronger stays."""
    here = sheet[y:y + patch.shape[0], x:x + patch.shape[1]]
    np.maximum(here, patch[:here.shape[0], :here.shape[1]], out=here)


def fitted_ink(ink: np.ndarray, side: int) -> np.ndarray:
    """An ink at another size; one that has to grow keeps sharp edges."""
    if ink.shape == (side, side):
        return ink
    image = Image.fromarray(np.ascontiguousarray(ink, np.float32))
    grown = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    steep = max(1.0, 0.6 * side / max(ink.shape))
    return np.clip((grown - 0.5) * steep + 0.5, 0, 1)


# -------------------------------------------------------------------------------------------------- animation


def frames_of(painting: np.ndarray, sheet: Sheet, stages: list[list[np.ndarray]],
              width: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """For a small animation: the painting without and with the writing, uint8 [h, width, 3], and how much of
    the difference each frame shows, float32 [h, width] in 0..1, growing to 1 everywhere.

    stages: of each character the inks from its first stroke to all of it.
    """
    bare, whole = (shrunk(finished(painting, sheet, ink), width) for ink in (False, True))
    zoom = width / painting.shape[2]
    shown, frames = np.zeros(bare.shape[:2], np.float32), []
    for cell, inks in zip(sheet.cells, stages, strict=True):
        x, y, side = round(cell.x * zoom), round(cell.y * zoom), max(2, round(cell.side * zoom))
        full = spread(fitted_ink(inks[-1], side))
        for ink in inks:
            part = np.clip(spread(fitted_ink(ink, side)) / np.maximum(full, 1e-3), 0, 1)
            here = shown[y:y + side, x:x + side]
            np.maximum(here, part[:here.shape[0], :here.shape[1]], out=here)
            frames.append(shown.copy())
    return bare, whole, [*frames, np.ones_like(shown)]


def shrunk(painting: np.ndarray, width: int) -> np.ndarray:
    """uint8 [3, H, W] -> [h, width, 3]."""
    height = max(1, round(painting.shape[1] * width / painting.shape[2]))
    image = Image.fromarray(np.ascontiguousarray(painting.transpose(1, 2, 0)))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX if width < image.width
                                   else Image.Resampling.NEAREST))


def spread(ink: np.ndarray) -> np.ndarray:
    """The greatest ink [h, w] within a pixel of each: as far as it bleeds."""
    padded = np.pad(ink, 1)
    h, w = ink.shape
    return np.max([padded[dy:dy + h, dx:dx + w] for dy in range(3) for dx in range(3)], axis=0)
