"""What both training scripts do around data.folder.Stream: look at a few pictures, and remember the broken files.

Read after parallel.py. Shapes: N pictures, C channels, S picture size.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from data.folder import PictureFolder, Stream
from miniclip.weights import atomic_write
from train.common import UserError
from train.parallel import Group


def check_workers(workers: int, stream: bool) -> None:
    if workers < 0 or (workers and not stream):
        raise UserError(f"--workers {workers}: only --stream reads ahead")


def first_pictures(folder: PictureFolder) -> tuple[Tensor, list[int]]:
    """Up to 64 pictures of the first shuffle of seed 0, as [N, C, S, S] in [-1, 1], and their places in the folder."""
    pixels, indices, _ = Stream(folder, min(64, len(folder)), 0, 1)[0]
    return pixels.float() / 127.5 - 1, indices.tolist()


class Skipped:
    """The broken files of a stream, each once, in skipped.txt of the run folder."""

    def __init__(self, out: Path, group: Group):
        self.path = out / ("skipped.txt" if group.main else f"skipped.{group.rank}.txt")
        self.files: dict[str, None] = {}

    def add(self, messages: list[str]) -> None:
        if new := [message for message in messages if message not in self.files]:
            self.files |= dict.fromkeys(new)
            with atomic_write(self.path) as file:
                file.write("".join(line + "\n" for line in self.files).encode("utf-8"))
