"""What the scripts do around data.folder.Stream: look at some pictures or at all, and remember the broken files.

Read after parallel.py. Shapes: N pictures, C channels, S picture size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.folder import DataError, PictureFolder, Stream, read_picture
from miniclip.weights import atomic_write
from train.common import UserError
from train.parallel import Group


def check_workers(workers: int, stream: bool) -> None:
    if workers and not stream:
        raise UserError(f"--workers {workers}: only --stream reads ahead")


def first_pictures(folder: PictureFolder) -> tuple[Tensor, list[int]]:
    """Up to 64 pictures of the first shuffle of seed 0, as [N, C, S, S] in [-1, 1], and their places in the folder."""
    pixels, indices, _ = Stream(folder, min(64, len(folder)), 0, 1)[0]
    return pixels.float() / 127.5 - 1, indices.tolist()


def from_step(stream: Stream, start: int, workers: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """What the steps from `start` on train on; with workers, read ahead."""
    own = torch.Generator()                             # the loader draws a number: not one of the global ones
    return iter(DataLoader(stream, None, sampler=range(start, len(stream)), num_workers=workers, generator=own))


def readable(files: Sequence[str], size: int, broken: list[str], batch: int = 256) -> Iterator[tuple[list[int], Tensor]]:
    """(places in the list, pictures [n, 3, S, S] in -1..1), a batch at a time; `broken` grows by the files left out."""
    for first in range(0, len(files), batch):
        places, pictures = [], []
        for i in range(first, min(first + batch, len(files))):
            try:
                pictures.append(read_picture(files[i], size, channels=3))
                places.append(i)
            except DataError as error:
                broken.append(str(error))
        if pictures:
            yield places, torch.stack(pictures).float() / 127.5 - 1


class Skipped:
    """The broken files of a stream, each once, in skipped.txt of the run folder. A resumed run keeps those it had."""

    def __init__(self, out: Path, group: Group, resume: bool = False):
        self.group, self.path = group, out / ("skipped.txt" if group.main else f"skipped.{group.rank}.txt")
        known = self.path.read_text(encoding="utf-8").splitlines() if resume and self.path.exists() else []
        self.files: dict[str, None] = dict.fromkeys(known)

    def add(self, messages: list[str]) -> None:
        if new := [message for message in messages if message not in self.files]:
            self.files |= dict.fromkeys(new)
            with atomic_write(self.path) as file:
                file.write("".join(line + "\n" for line in self.files).encode("utf-8"))

    def add_those_of_others(self) -> None:
        """At the end of a run, for all processes to call: from then on the first one's list is that of all."""
        everywhere = self.group.union(self.files)
        if self.group.main:
            self.add(everywhere)
