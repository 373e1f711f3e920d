"""Finds the strokes of printed characters in pictures of brush writing, and keeps those that pass the gates.

Read after train/registration.py, which does it. What it made of calligraphy/ is committed in strokes/HAND/.
    python -m data.register --out out/strokes --look out/strokes-look
Hands that join strokes (草書) are left out: printed kai has no order for them. Whatever else fails is named.
"""

import argparse
import colorsys
import csv
import datetime
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.make_calligraphy import start
from data.packages import MakerError
from miniclip.weights import WeightsError, atomic_write
from train.data.image import read_whole
from train.data.strokes import JOINED, Character, read_kai, write_character
from train.data.table import open_table
from train.errors import DataError
from train.registration import Fit, fit, problems

MOST_SIDE = 512             # pixels of a picture; larger ones are made smaller
LOOK = 768                  # pixels of a picture to look at
NOTICE = ("Derived from {char}.json of npm hanzi-writer-data 2.0.1, Copyright (C) 1999 Arphic Technology "
          "Co., Ltd., Arphic Public License (ARPHICPL.TXT). Changed on {date} by data/register.py: outlines "
          "left out, medians resampled and moved onto a picture of the {hand} hand, widths added.")


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's captions.csv with the columns file, character and hand. Raises MakerError."""
    try:
        rows = list(open_table(folder / "captions.csv"))
    except (DataError, csv.Error) as error:
        raise MakerError(f"{folder}/captions.csv: cannot be read ({error})") from None
    if not rows or not {"file", "character", "hand"} <= set(rows[0]):
        raise MakerError(f"{folder}/captions.csv: needs rows of file, character and hand")
    return rows


def register(row: dict[str, str], pictures: Path, strokes: Path) -> tuple[np.ndarray, Fit]:
    """The ink [h, h] of a row's picture, and its strokes. Raises DataError."""
    ink = 1 - read_whole(pictures / row["file"], 1, MOST_SIDE)[0].numpy() / np.float32(255)
    if ink.shape[0] != ink.shape[1] or ink.max() < 0.5:
        raise DataError(f"{row['file']}: must be square, with ink")
    return ink, fit(ink, read_kai(strokes / f"{row['character']}.json"))


def picture(ink: np.ndarray, found: Fit) -> Image.Image:
    """The strokes over the picture, coloured and numbered where they begin, to be looked at."""
    paper = Image.fromarray((255 - 90 * ink).astype(np.uint8)).resize((LOOK, LOOK)).convert("RGB")
    pen = ImageDraw.Draw(paper)
    for k, stroke in enumerate(found.strokes):
        colour = tuple(round(200 * c) for c in colorsys.hsv_to_rgb(0.37 * k % 1, 1, 1))
        points = [tuple(p) for p in (stroke.points * LOOK).tolist()]
        for (x, y), width in zip(points, stroke.widths * LOOK / 2, strict=True):
            pen.ellipse((x - width, y - width, x + width, y + width), outline=colour)
        pen.line(points, fill=colour, width=5)
        x, y = points[0]
        pen.ellipse((x - 13, y - 13, x + 13, y + 13), fill=colour)
        pen.text((x, y), str(k + 1), fill="white", anchor="mm", font_size=18)
    return paper


def arguments(argv=None) -> argparse.Namespace:
    """The flags of data.register; argv None stands for those of the process."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser("python -m data.register", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, default=here / "calligraphy", help="has a captions.csv")
    parser.add_argument("--strokes", type=Path, default=here / "strokes", help="hanzi-writer's files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, HAND/CHARACTER.json")
    parser.add_argument("--look", type=Path, help="folder for pictures of strokes over ink")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="of each file's notice")
    return parser.parse_args(argv)


def one(row: dict[str, str], args: argparse.Namespace) -> bool:
    """Registers a picture, says how it went, and writes its files. Returns whether it passed."""
    char, hand, began = row["character"], row["hand"], time.process_time()
    ink, found = register(row, args.pictures, args.strokes)
    doubts = problems(found)
    print(f"{char} {hand}  overlap {found.iou:.3f}  {time.process_time() - began:4.1f} s  "
          f"{'; '.join(doubts) or 'passed'}", flush=True)
    if args.look:
        args.look.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.look / f"{char}_{hand}.png") as file:
            picture(ink, found).save(file, "png")
    if not doubts:
        (args.out / hand).mkdir(parents=True, exist_ok=True)
        notice = NOTICE.format(char=char, hand=hand, date=args.date)
        write_character(Character(char, hand, found.strokes), args.out / hand / f"{char}.json", notice)
    return not doubts


def main(argv=None) -> int:
    """Writes the files of the pictures that pass. Raises MakerError, DataError or WeightsError."""
    args = arguments(argv)
    torch.set_num_threads(1)                        # so that the same picture gives the same file
    rows = [row for row in rows_of(args.pictures) if row["hand"] not in JOINED]
    print(f"left out, as its strokes are joined: {' '.join(JOINED)}")
    passed = sum(one(row, args) for row in rows)
    print(f"{passed} of {len(rows)} passed: {args.out}")
    return 0


if __name__ == "__main__":
    start(main, DataError, WeightsError)
