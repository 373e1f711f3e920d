"""Replays a picture of a character stroke by stroke: python -m train.replay --of FILE --char 春

Read after true_ink.py. The picture may be one of train.sample's or anybody's: dark ink on
light paper, one character that fills most of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from .animate import frame_counts, reveal, write_gif, write_png, write_strip
from .data.strokes import Character, write_character
from .errors import UserError
from .registration import problems
from .run.cli import check_flags, flag, parse_flags, start
from .run.folder import make_folder
from .true_ink import assigned, ink_of, printed_strokes, registered, squared


@dataclass(frozen=True)
class ReplayConfig:
    """The flags of train.replay."""

    of: str = flag("", "the picture of one character")
    char: str = flag("", "which character it is")
    strokes: str = flag("data/strokes", "folder of hanzi-writer's files: 春.json and so on")
    out: str = flag("out/replayed", "folder for GIF, strip of stages, PNG and JSON")


def main(cfg: ReplayConfig) -> None:
    """Leaves CHAR.gif, CHAR.png, CHAR_stages.png and CHAR.json in --out.

    Raises UserError or DataError for a picture or a character that cannot be replayed.
    """
    check_flags(cfg)
    if not cfg.of:
        raise UserError("--of: which picture? A file of one character, dark ink on light paper")
    printed = printed_strokes(cfg.char, cfg.strokes)
    ink = ink_of(cfg.of)
    out = make_folder(cfg.out)
    found = registered(ink, printed)
    if doubts := problems(found):
        print(f"warning: not every stroke was found: {'; '.join(doubts[:4])}", file=sys.stderr)
    owners, arrivals = assigned(ink, found.strokes)
    frames = reveal(owners, arrivals, frame_counts(found.strokes))
    write_gif(frames, out / f"{cfg.char}.gif")
    write_png(ink, out / f"{cfg.char}.png")
    write_strip(squared(owners), out / f"{cfg.char}_stages.png")
    write_character(Character(cfg.char, "", found.strokes), out / f"{cfg.char}.json")
    print(f"{cfg.char}: {len(found.strokes)} strokes, overlap {found.iou:.2f}, {len(frames)} frames: "
          f"{out / cfg.char}.gif, .png, .json and {cfg.char}_stages.png")


if __name__ == "__main__":
    start(lambda: main(parse_flags(ReplayConfig, __doc__.split("\n\n")[0])))
