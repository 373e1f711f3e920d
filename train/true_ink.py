"""A picture's own ink, dealt out to the strokes of its character, so that it can be written again.

Read after registration.py and animate.py. Ink is float32 [h, w], 0 paper to 1 full ink; S strokes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .animate import frame_counts, reveal
from .brush import arrival, centres
from .data.image import read_whole
from .data.strokes import Character, Stroke, read_kai
from .errors import DataError, UserError
from .registration import Fit, fit

MOST_SIDE = 512             # pixels; larger pictures are made smaller
LEAST_INK = 0.002           # share of a picture
MOST_INK = 0.6


def printed_strokes(char: str, folder: str | Path) -> Character:
    """The strokes of a character as hanzi-writer has them. Raises UserError where there are none."""
    path = Path(folder) / f"{char}.json"
    if len(char) != 1 or char in "./\\" or not path.is_file():
        known = "".join(sorted(p.stem for p in Path(folder).glob("?.json"))[:40])
        raise UserError(f"--char {char[:20]}: no strokes of it in {folder}, only of {known or 'none'}")
    return read_kai(path)


def ink_of(path: str | Path) -> np.ndarray:
    """The ink [h, w] of a picture, 0 where it is as light as its paper, 1 where it is darkest.

    Raises DataError for one that is empty or dark all over.
    """
    light = read_whole(path, 1, MOST_SIDE)[0].numpy().astype(np.float32)
    paper, black = np.percentile(light, 90), light.min()
    if paper - black < 40:
        raise DataError(f"{path}: no ink in it, nothing is much darker than its paper")
    ink = ((paper - light) / (paper - black)).clip(0, 1)
    if not LEAST_INK < (share := (ink > 0.5).mean()) < MOST_INK:
        raise DataError(f"{path}: {share:.1%} of it is dark; one character on light paper has 1 to 60 %")
    return ink


def replay(ink: np.ndarray, char: str, strokes: str | Path = "data/strokes") -> list[np.ndarray]:
    """The ink [h, w] of a picture of a character, stroke by stroke: inks [h, w] that only gain, the last is
    all.

    strokes: folder of hanzi-writer's files. Raises UserError for a character that is not there. Whether each
    stroke was found is for `registration.problems` to say.
    """
    found = registered(ink, printed_strokes(char, strokes))
    owners, arrivals = assigned(ink, found.strokes)
    return reveal(owners, arrivals, frame_counts(found.strokes))


def registered(ink: np.ndarray, printed: Character) -> Fit:
    """The printed strokes on a picture's ink [h, w], in boxes of its longer side."""
    return fit(squared(ink[None])[0], printed)


def squared(inks: np.ndarray) -> np.ndarray:
    """[S, h, w] in the middle of a square of paper, [S, side, side]."""
    _, height, width = inks.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(inks, ((0, 0), (top, side - height - top), (left, side - width - left)))


def assigned(ink: np.ndarray, strokes: list[Stroke]) -> tuple[np.ndarray, np.ndarray]:
    """Whose ink is whose [S, h, w], and when the brush reaches each pixel in the course of each stroke [S, h,
    w].

    A pixel goes to the first stroke in which it lies at least half as deep as in any other, else to the one
    whose edge is nearest. The owners' inks add up to the picture, exactly.
    """
    places = centres(*ink.shape)
    when, edge = map(np.stack, zip(*(arrival(stroke, places) for stroke in strokes), strict=True))
    deep = (edge <= edge.min(0) / 2) & (edge < 0)
    owner = np.where(deep.any(0), deep.argmax(0), edge.argmin(0))
    owners = np.where(np.arange(len(strokes))[:, None, None] == owner, ink, 0)
    return owners.astype(np.float32), when
