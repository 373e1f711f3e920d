"""Characters as strokes in writing order: files of hanzi-writer and our own, read strictly; ours written.

Read after image.py. Every file is hostile until parsed, and fails with one clear line.
hanzi-writer has 1024 units to the em, y up, and its baseline at 124: pixel = (x, 900 - y). Here x points
right, y down, and the character's box is 0..1 x 0..1.
Shapes: n points of a stroke; float32 throughout. The order of hanzi-writer is that of mainland China.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from miniclip.weights import WeightsError, atomic_write, read_json

from ..errors import DataError

EM, TOP = 1024, 900         # of hanzi-writer: units to the em, and the height of the box's upper edge
JOINED = ("草書",)         # hands that write several strokes as one: printed kai gives them no order
MAX_STROKES = 64            # of a character; 龘 has 51
MAX_POINTS = 512            # of a stroke
MAX_PATH = 20_000           # characters of an outline's text
FAR = 1.0                   # how far outside of its box a character may reach, as a share of the box
PER_CURVE = 8               # straight pieces that a curve of an outline becomes
POINTS = 24                 # of a stroke as it is given here
TOKEN = re.compile(r"[MLQCZ]|-?(?:\d+(?:\.\d+)?|\.\d+)(?:e-?\d+)?")
NUMBERS = {"M": 2, "L": 2, "Q": 4, "C": 6, "Z": 0}      # that follow each letter of a path


class Stroke(NamedTuple):
    """One stroke from start to end: points [n, 2] and the full width of the brush at each, [n], both in
    boxes."""

    points: np.ndarray
    widths: np.ndarray

    def length(self) -> float:
        """Along its points, in boxes."""
        return float(np.linalg.norm(np.diff(self.points, axis=0), axis=1).sum())


class Character(NamedTuple):
    """Strokes in writing order, and what they write in which hand."""

    char: str
    hand: str
    strokes: list[Stroke]


# --------------------------------------------------------------------------------------------- files of ours


def read_character(path: str | Path) -> Character:
    """Reads {"char", "hand", "strokes": [{"points": [[x, y], ...], "widths": [w, ...]}, ...]}; other keys are
    left alone. Raises DataError that names the file."""
    values = _read(path)
    char, hand = values.get("char"), values.get("hand")
    if not isinstance(char, str) or len(char) != 1 or not isinstance(hand, str) or len(hand) > 40:
        raise DataError(f"{path}: char must be one character, hand a short text")
    return Character(char, hand, [_stroke_of(entry, f"{path}: stroke {k}")
                                  for k, entry in enumerate(_strokes_in(values, "strokes", path), 1)])


def write_character(character: Character, path: str | Path, notice: str = "") -> None:
    """Writes a file that `read_character` reads, atomically. notice: its source, terms and changes."""
    values = {**({"notice": notice} if notice else {}), **as_json(character)}
    strokes = ",\n ".join(json.dumps(stroke) for stroke in values.pop("strokes"))
    head = json.dumps(values, ensure_ascii=False).removesuffix("}")
    with atomic_write(path) as file:
        file.write(f'{head}, "strokes": [\n {strokes}]}}\n'.encode())


def as_json(character: Character) -> dict[str, Any]:
    """As the files have it, to a ten-thousandth of the box."""
    return {"char": character.char, "hand": character.hand,
            "strokes": [{"points": np.round(stroke.points.astype(float), 4).tolist(),
                         "widths": np.round(stroke.widths.astype(float), 4).tolist()}
                        for stroke in character.strokes]}


def _stroke_of(entry: Any, where: str) -> Stroke:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object of points and widths")
    points = _points(entry.get("points"), where, -FAR, 1 + FAR)
    widths = entry.get("widths")
    if not isinstance(widths, list) or len(widths) != len(points):
        raise DataError(f"{where}: {len(points)} points need a list of as many widths")
    return Stroke(points, np.array([_number(w, where, 0, 1) for w in widths], np.float32))


# -------------------------------------------------------------------------------------- hanzi-writer's files


class Outlined(NamedTuple):
    """A stroke as hanzi-writer draws it: the pen's path [n, 2] and the outline, a closed polygon [m, 2]."""

    median: np.ndarray
    outline: np.ndarray


def read_outlined(path: str | Path) -> list[Outlined]:
    """The strokes of a file of hanzi-writer-data, in boxes, y down. Raises DataError that names the file."""
    values = _read(path)
    outlines, medians = (_strokes_in(values, name, path) for name in ("strokes", "medians"))
    if len(outlines) != len(medians):
        raise DataError(f"{path}: {len(outlines)} outlines but {len(medians)} medians")
    strokes = []
    for k, (outline, median) in enumerate(zip(outlines, medians, strict=True), 1):
        where = f"{path}: stroke {k}"
        points = _points(median, where, -FAR * EM, (1 + FAR) * EM)
        strokes.append(Outlined(in_boxes(points), in_boxes(polygon(outline, where))))
    return strokes


def read_kai(path: str | Path, hand: str = "印刷楷書") -> Character:
    """A file of hanzi-writer-data as a character: each median resampled, moved to the middle of its stroke,
    and the width of the brush along it. The file's name is the character. Raises DataError."""
    char = Path(path).stem
    if len(char) != 1:
        raise DataError(f"{path}: its name must be the one character that it holds")
    return Character(char, hand, [centred(stroke) for stroke in read_outlined(path)])


def in_boxes(points: np.ndarray) -> np.ndarray:
    """hanzi-writer's units, y up -> boxes, y down; [n, 2]."""
    return np.stack([points[:, 0], TOP - points[:, 1]], 1).astype(np.float32) / EM


def polygon(path: Any, where: str) -> np.ndarray:
    """The corners [m, 2] of an SVG path of one outline, its curves cut into straight pieces.

    Only absolute M, L, Q, C and Z, numbers after their letter, M first and Z last. Raises DataError.
    """
    if not isinstance(path, str) or len(path) > MAX_PATH:
        raise DataError(f"{where}: an outline must be a text of at most {MAX_PATH} characters")
    tokens = TOKEN.findall(path)
    if TOKEN.sub("", path).strip(" ,\t\r\n") or tokens[:1] != ["M"] or tokens[-1] != "Z":
        raise DataError(f"{where}: an outline must be M ... Z, of M L Q C Z and numbers: {path[:50]!r}")
    corners, place = [], 0
    while place < len(tokens):
        letter, count = tokens[place], NUMBERS.get(tokens[place])
        numbers = tokens[place + 1:place + 1 + (count or 0)]
        if count is None or len(numbers) < count or any(n in NUMBERS for n in numbers) or (
                letter in "MZ" and place not in (0, len(tokens) - 1)):
            raise DataError(f"{where}: the outline has {letter} out of place")
        values = [_number(float(n), where, -FAR * EM, (1 + FAR) * EM) for n in numbers]
        corners += curve([*corners[-1:], *zip(values[::2], values[1::2], strict=True)]) if values else []
        place += 1 + count
    return np.array(corners)


def curve(controls: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points on a Bezier curve of any degree but its first: one for a line, else PER_CURVE."""
    if len(controls) < 3:
        return controls[-1:] if controls else []
    found = []
    for k in range(1, PER_CURVE + 1):
        t, points = k / PER_CURVE, controls
        while len(points) > 1:
            points = [(ax + t * (bx - ax), ay + t * (by - ay))
                      for (ax, ay), (bx, by) in zip(points, points[1:])]
        found += points
    return found


# -------------------------------------------------------------------------------------------------- geometry


def resample(points: np.ndarray, count: int) -> np.ndarray:
    """`count` points [count, d] at equal distances along a line whose first two columns are x and y."""
    steps = np.linalg.norm(np.diff(points[:, :2], axis=0), axis=1)
    along = np.concatenate([[0], np.cumsum(steps)])
    wanted = np.linspace(0, along[-1], count)
    return np.stack([np.interp(wanted, along, column) for column in points.T], 1).astype(np.float32)


def distance_to(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """From each of the points [..., 2] to the nearest edge of a closed polygon [m, 2]."""
    start = polygon
    edge = np.roll(polygon, -1, axis=0) - start
    off = points[..., None, :] - start
    t = np.clip((off * edge).sum(-1) / np.maximum((edge ** 2).sum(-1), 1e-12), 0, 1)
    return np.sqrt(((off - t[..., None] * edge) ** 2).sum(-1).min(-1))


def inside(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether each of the points [..., 2] lies in a closed polygon [m, 2]."""
    (ax, ay), (bx, by) = polygon.T, np.roll(polygon, -1, axis=0).T
    x, y = points[..., None, 0], points[..., None, 1]
    crosses = (ay > y) != (by > y)
    at = ax + (y - ay) * (bx - ax) / np.where(by == ay, 1, by - ay)
    return (crosses & (x < at)).sum(-1) % 2 == 1


def normals(points: np.ndarray) -> np.ndarray:
    """Unit normals [n, 2] of a line [n, 2]: its direction turned by a right angle, to the left as one sees
    it."""
    along = np.gradient(points, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    return np.stack([along[:, 1], -along[:, 0]], 1)


def centred(stroke: Outlined, count: int = POINTS, reach: float = 0.03) -> Stroke:
    """The median in the middle of its outline, with the width of the largest disc that fits there.

    Each point looks up to `reach` boxes to either side. Ends stay where they are: there the brush lifts.
    """
    points = resample(stroke.median, count)
    shifts = np.linspace(-reach, reach, 25) * np.linspace(0, 1, 25)[12] * 2
    places = points[:, None] + normals(points)[:, None] * shifts[:, None]       # [count, shifts, 2]
    radius = distance_to(stroke.outline, places) * inside(stroke.outline, places)
    best = shifts[(radius - 0.15 * abs(shifts)).argmax(1)]
    best = np.convolve(np.pad(best, 2, mode="edge"), np.ones(5) / 5, "valid")
    best *= np.sin(np.linspace(0, math.pi, count)) ** 0.5
    points = resample(points + normals(points) * best[:, None], count)
    radius = distance_to(stroke.outline, points) * inside(stroke.outline, points)
    return Stroke(points, np.clip(2 * radius, 0.004, 1).astype(np.float32))


# ---------------------------------------------------------------------------------------------------- checks


def _read(path: str | Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except WeightsError as error:
        raise DataError(str(error)) from None


def _strokes_in(values: dict[str, Any], name: str, path: str | Path) -> list:
    found = values.get(name)
    if not isinstance(found, list) or not 1 <= len(found) <= MAX_STROKES:
        raise DataError(f"{path}: {name} must be a list of 1 to {MAX_STROKES}")
    return found


def _points(value: Any, where: str, low: float, high: float) -> np.ndarray:
    if not isinstance(value, list) or not 2 <= len(value) <= MAX_POINTS:
        raise DataError(f"{where}: needs a list of 2 to {MAX_POINTS} points")
    if not all(isinstance(point, list) and len(point) == 2 for point in value):
        raise DataError(f"{where}: a point must be [x, y]")
    points = np.array([[_number(n, where, low, high) for n in point] for point in value], np.float32)
    if not np.diff(points, axis=0).any():
        raise DataError(f"{where}: all of its points are one")
    return points


def _number(value: Any, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise DataError(f"{where}: {str(value)[:40]} is not a number from {low:g} to {high:g}")
    return float(value)
