"""Write stroke by stroke: python -m train.write --run out/strokes --text 春滿乾坤 --hand 楷書 --seed 7

Read after strokes.py and animate.py. Leaves in --out: TEXT.gif, in which the characters are written one after
the other, TEXT.png, and for each character CHAR.svg, which moves too and is sharp at any size,
CHAR_stages.png, and CHAR.json, its strokes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .animate import animation, write_gif, write_png, write_strip, write_svg
from .brush import layers
from .data.strokes import Character, write_character
from .run.cli import MAX_SEED, check_flags, flag, parse_flags, start
from .run.folder import make_folder
from .run.log import Progress
from .strokes import load_run, written

EVERY = 2                   # of an animation's frames one is kept, so that a text of four stays small
STAGE = 256                 # pixels of a stage before it is made smaller


@dataclass(frozen=True)
class WriteConfig:
    """The flags of train.write."""

    run: str = flag("out/strokes", "run folder of train.train_diffusion on strokes")
    text: str = flag("春滿乾坤", "what to write")
    hand: str = flag("楷書", "in which hand")
    seed: int = flag(0, "one seed, one result", at_least=0, at_most=MAX_SEED)
    size: int = flag(160, "pixels of a character in the GIF", at_least=32, at_most=1024)
    guidance: float = flag(1.5, "as in train.sample", at_least=-1000, at_most=1000)
    steps: int = flag(30, "denoising steps", at_least=1, at_most=1000)
    out: str = flag("out/written", "folder for the files")


def main(cfg: WriteConfig) -> None:
    """Writes the text. Raises UserError for what the run cannot write, WeightsError for a broken one."""
    check_flags(cfg)
    characters = written(load_run(cfg.run), cfg.text, cfg.hand, cfg.seed, cfg.steps, cfg.guidance)
    out = make_folder(cfg.out)
    progress = Progress(len(characters), unit="character")
    frames: list[np.ndarray] = []
    for place, character in enumerate(characters):
        frames += beside(frames, animation(character, cfg.size, cfg.seed + place)[::-EVERY][::-1],
                         place, len(characters))
        write_files(character, out, cfg.seed + place)
        progress.show(place + 1, character.char)
    progress.close()
    write_gif(frames, out / f"{cfg.text}.gif")
    write_png(frames[-1], out / f"{cfg.text}.png")
    size = (out / f"{cfg.text}.gif").stat().st_size
    strokes = sum(len(character.strokes) for character in characters)
    print(f"{strokes} strokes in {out}: {cfg.text}.gif ({size / 1024:.0f} KiB) and .png; of each character "
          ".svg, .json and _stages.png")


def write_files(character: Character, out: Path, seed: int) -> None:
    """What is left of one character."""
    write_svg(character, out / f"{character.char}.svg", seed)
    write_strip(layers(character, STAGE, seed), out / f"{character.char}_stages.png")
    write_character(character, out / f"{character.char}.json")


def beside(before: list[np.ndarray], frames: list[np.ndarray], place: int, count: int) -> list[np.ndarray]:
    """Frames [s, s] of one character in a row of `count` characters, [s, count s], beside those before it."""
    side = frames[0].shape[0]
    row = before[-1] if before else np.zeros((side, count * side), np.float32)
    rows = []
    for frame in frames:
        row = row.copy()
        row[:, place * side:(place + 1) * side] = frame
        rows.append(row)
    return rows


if __name__ == "__main__":
    start(lambda: main(parse_flags(WriteConfig, __doc__.split("\n\n")[0])))
