"""A folder of captioned images as a dataset, and as a stream that reads them as they are needed.

Read after table.py and image.py. Shapes: N images, C channels, H height, W width.
Values: uint8 0..255 as decoded, float32 -1..1 for a model, white being 1.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import DataError
from .image import check_format, read_image, to_float
from .table import Captioned, list_captioned, list_indexed

CACHE_BYTES = 1024 * 2**20      # decoded uint8 images that one CaptionedImages keeps
STACK_BYTES = 4096 * 2**20      # the most that CaptionedImages.images() builds
SEED_STRIDE = 1_000_003         # a prime: epoch e of seed s is shuffled by seed s * stride + e
GIVE_UP = 1000                  # broken files in a row that a stream steps over


class CaptionedImages(torch.utils.data.Dataset):
    """A dataset of (picture float32 [C, H, W] in -1..1 with white = 1, caption).

    `jitter`: None, or a function [1, C, H, W] -> [1, C, H, W]: functools.partial(jitter, generator=g).
    Pictures are decoded once and kept as uint8 until CACHE_BYTES are full.
    `index`: a file to keep the list of a large table in;
    it is read instead while captions.csv stays as it is.
    `entries`: the list itself; then `root` is not looked at.
    """

    def __init__(self, root, size=64, channels=1, caption_column="caption", fit="pad", jitter=None,
                 index=None, entries: list[Captioned] | None = None):
        self.height, self.width = check_format(size, channels, fit)
        self.channels, self.fit, self.jitter = channels, fit, jitter
        if entries is None:
            entries = list_indexed(Path(root), caption_column,
                                   Path(index)) if index else list_captioned(root, caption_column)
        self.entries = entries
        self.captions = [entry.caption for entry in self.entries]
        self._cache: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        picture = to_float(self._bytes(range(len(self))[index]))                             # [C, H, W]
        if self.jitter is not None:
            picture = self.jitter(picture[None])[0]
        return picture, self.captions[index]

    def _bytes(self, index: int) -> torch.Tensor:
        if index in self._cache:
            return self._cache[index]
        picture = self._decoded(index)
        if (len(self._cache) + 1) * picture.numel() <= CACHE_BYTES:
            self._cache[index] = picture
        return picture

    def _decoded(self, index: int) -> torch.Tensor:
        return read_image(self.entries[index].path, (self.height, self.width), self.channels, self.fit)

    def images(self) -> torch.Tensor:
        """All pictures without jitter, float32 [N, C, H, W] in -1..1."""
        size = 4 * len(self) * self.channels * self.height * self.width
        if size > STACK_BYTES:
            raise DataError(f"{len(self)} pictures need {size} bytes at once, the limit is {STACK_BYTES}: "
                            "train with --stream")
        return to_float(torch.stack([self._bytes(index) for index in range(len(self))]))


class Stream(torch.utils.data.Dataset):
    """Item s is what step s trains on: (uint8 [rows, C, H, W], their indices [rows], files that are broken).

    Which pictures that are follows from (seed, s) alone: a run goes on in the middle of an epoch,
    with any number of workers, which draw no random numbers. Each epoch is a new shuffle of all.
    A broken file gives way to the next in the list. `rows`: the part of a batch to read.
    For a DataLoader with batch_size=None.
    """

    def __init__(self, folder: CaptionedImages, batch: int, seed: int, steps: int, rows: slice = slice(None)):
        self.folder, self.batch, self.seed, self.steps, self.rows = folder, batch, seed, steps, rows
        self.shuffled: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        places = range(step * self.batch, (step + 1) * self.batch)[self.rows]
        broken: list[str] = []
        found = [self._read(self.index(place), broken) for place in places]
        return torch.stack([picture for picture, _ in found]), torch.tensor([i for _, i in found]), broken

    def index(self, place: int) -> int:
        """The picture at a place of the endless list of shuffled epochs."""
        epoch, place = divmod(place, len(self.folder))
        if self.shuffled[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * SEED_STRIDE + epoch) % 2**63)
            self.shuffled = epoch, torch.randperm(len(self.folder), generator=generator)
        return int(self.shuffled[1][place])

    def _read(self, index: int, broken: list[str]) -> tuple[torch.Tensor, int]:
        alone = torch.utils.data.get_worker_info() is None         # of many workers none may fill the memory
        read = self.folder._bytes if alone else self.folder._decoded
        for i in range(index, index + min(GIVE_UP, len(self.folder))):
            i %= len(self.folder)
            try:
                return read(i), i
            except DataError as error:
                broken.append(str(error))
        raise DataError(f"{self.folder.entries[index].path} and the {len(broken) - 1} files after it are all "
                        "broken")
