"""Writing as it happens: frames that only ever gain ink, as a GIF, a strip of stages, or an SVG that moves.

Read after brush.py. Shapes: S strokes, h and w pixels. Ink is float32 [h, w], 0 paper to 1 full ink; an
animation is a list of inks, the last of which is the finished picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from miniclip.weights import atomic_write

from .brush import arrival, centres, fine, layers, marks, together
from .data.strokes import Character, Stroke

PER_BOX = 16                # frames for a stroke as long as the box's side
AT_LEAST = 3                # frames for a dot
LIFTED = 2                  # frames between strokes
FRAME_MS = 40               # of a GIF; browsers slow down below 20
HOLD_MS = 2500              # the finished picture
SOFT = 0.025                # of a stroke's time: how long a pixel takes to fill with ink
GREYS = 32                  # of a GIF
STAGE = 128                 # pixels a side of a stage in a strip
PER_ROW = 8                 # stages
NEWEST = (178, 34, 24)      # the colour of a stage's last stroke


# ---------------------------------------------------------------------------------------------------- frames


def animation(character: Character, size: int, seed: int = 0) -> list[np.ndarray]:
    """The inks [size, size] of a character as the brush writes it; the last one is what `brush.write` gives.
    """
    places = centres(size, size)
    arrivals = np.stack([arrival(stroke, places)[0] for stroke in character.strokes])
    return reveal(layers(character, size, seed), arrivals, frame_counts(character.strokes))


def frame_counts(strokes: list[Stroke]) -> list[int]:
    """How many frames each stroke takes."""
    return [AT_LEAST + round(PER_BOX * stroke.length()) for stroke in strokes]


def reveal(inks: np.ndarray, arrivals: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    """Frames [h, w] in which each stroke's ink [S, h, w] appears when the brush arrives there [S, h, w].

    counts: frames of each stroke; between strokes the brush is lifted for a few. Only ever gains ink.
    """
    frames, done = [np.zeros_like(inks[0])], np.zeros_like(inks[0])
    for ink, when, count in zip(inks, arrivals, counts, strict=True):
        for step in range(1, count):
            now = eased(step / count) * (1 + SOFT)
            frames.append(np.maximum(done, ink * ((now - when) / SOFT).clip(0, 1)))
        done = np.maximum(done, ink)
        frames += [done] * (1 + LIFTED)
    return frames[:-LIFTED]


def eased(t: float) -> float:
    """A brush starts and stops slowly: 0 to 1 for 0 to 1."""
    return t + 0.6 * (t * t * (3 - 2 * t) - t)


def grey(ink: np.ndarray) -> Image.Image:
    """Black ink on white paper, mode L."""
    return Image.fromarray(np.round(255 * (1 - ink.clip(0, 1))).astype(np.uint8))


# ----------------------------------------------------------------------------------------------------- files


def write_gif(frames: list[np.ndarray], path: str | Path) -> None:
    """An animated GIF that repeats, in greys; its last frame stays longer. Equal frames become one, longer.
    """
    levels = np.round(np.linspace(0, 255, GREYS)).astype(np.uint8)
    images, times = [], []
    for frame in frames:
        indices = np.round((1 - frame.clip(0, 1)) * (GREYS - 1)).astype(np.uint8)
        if images and np.array_equal(indices, images[-1]):
            times[-1] += FRAME_MS
        else:
            images.append(indices)
            times.append(FRAME_MS)
    times[-1] += HOLD_MS
    pages = [Image.fromarray(indices, "P") for indices in images]
    for page in pages:
        page.putpalette(np.repeat(levels, 3).tobytes())
    with atomic_write(path) as file:
        pages[0].save(file, "gif", save_all=True, append_images=pages[1:], duration=times, loop=0, disposal=1,
                      optimize=False)


def write_png(ink: np.ndarray, path: str | Path) -> None:
    """The finished picture."""
    with atomic_write(path) as file:
        grey(ink).save(file, "png")


def write_strip(inks: np.ndarray, path: str | Path) -> None:
    """The character [S, h, w] after each of its strokes, the newest red, PER_ROW to a row, as a PNG."""
    rows = -(-len(inks) // PER_ROW)
    strip = Image.new("RGB", (min(len(inks), PER_ROW) * STAGE, rows * STAGE), "white")
    for k in range(len(inks)):
        before = together(inks[:k]) if k else np.zeros_like(inks[0])
        page = Image.merge("RGB", [grey(before)] * 3)
        page.paste(NEWEST, mask=grey(1 - inks[k]))
        spot = (k % PER_ROW * STAGE, k // PER_ROW * STAGE)
        strip.paste(page.resize((STAGE, STAGE), Image.Resampling.LANCZOS), spot)
    with atomic_write(path) as file:
        strip.save(file, "png")


# ------------------------------------------------------------------------------------------------------- SVG


def write_svg(character: Character, path: str | Path, seed: int = 0) -> None:
    """An SVG that writes the character again and again, sharp at any size, without script.

    A viewer that knows no animation shows it finished.
    """
    times = np.cumsum([0, *(count + LIFTED for count in frame_counts(character.strokes))]) * FRAME_MS
    whole = float(times[-1] + HOLD_MS)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 1000" role="img" '
             f'aria-label="{character.char}"><rect width="1000" height="1000" fill="#fff"/>']
    for k, stroke in enumerate(character.strokes):
        shape = marks(stroke, 1000 * seed + k)
        outline = "".join(f"M{corners_of(polygon)}Z" for polygon in [*shape.ink, *shape.paper])
        begin, end = times[k] / whole, (times[k + 1] - LIFTED * FRAME_MS) / whole
        parts.append(
            f'<clipPath id="s{k}"><path d="{outline}"/></clipPath>'
            f'<path clip-path="url(#s{k})" d="M{corners_of(pen_path(stroke))}" pathLength="1" fill="none" '
            f'stroke="#111" stroke-width="{1450 * stroke.widths.max() + 12:.0f}" stroke-linecap="round" '
            f'stroke-linejoin="round" stroke-dasharray="1 3"><animate attributeName="stroke-dashoffset" '
            f'values="1.01;1.01;0;0" keyTimes="0;{begin:.5f};{end:.5f};1" dur="{whole / 1000:.2f}s" '
            f'repeatCount="indefinite"/></path>')
    with atomic_write(path) as file:
        file.write(("\n".join(parts) + "\n</svg>\n").encode("utf-8"))


def pen_path(stroke: Stroke) -> np.ndarray:
    """A stroke's line [n, 2], longer at both ends by what the brush reaches beyond them."""
    points, widths = fine(stroke)
    points = points[np.unique(np.linspace(0, len(points) - 1, 40).astype(int))]
    ends = []
    for last, other, width in ((0, 1, widths[0]), (-1, -2, widths[-1])):
        along = points[last] - points[other]
        ends.append(points[last] + along / max(np.linalg.norm(along), 1e-6) * width * 0.8)
    return np.concatenate([ends[:1], points, ends[1:]])


def corners_of(polygon: np.ndarray) -> str:
    """Points [m, 2] as SVG has them, in thousandths of the box."""
    return " ".join(f"{x:.1f} {y:.1f}" for x, y in 1000 * polygon)
