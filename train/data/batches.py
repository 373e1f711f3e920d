"""Batches for a training loop, which cannot tell whether images lie in memory or are read as they are needed.

Read after folder.py. Both kinds answer `batch(step, generator)`; which images a step sees does not depend on
how many processes there are.
Shapes: N images, B a batch, b this process's rows of it, C channels, S image size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from miniclip.files import atomic_write, read_bytes

from ..errors import DataError
from ..run.distributed import Ranks
from .folder import CaptionedImages, Stream
from .image import fitted, read_image, to_float

PREVIEW = 64            # images of a stream that evaluation looks at
MOST_SKIPPED = 64 * 2**20   # bytes of skipped.txt
READ_AT_ONCE = 256      # images in memory where all of a folder are looked at


class InMemory:
    """All images [N, C, S, S] on one device."""

    def __init__(self, images: Tensor, batch: int, rows: slice):
        """rows: those of this process in each batch."""
        self.images, self.size, self.rows = images, batch, rows

    def batch(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices [b] and images [b, C, S, S] in -1..1; the generator draws for the whole batch."""
        indices = draw_indices(len(self.images), self.size, generator)[self.rows]
        return indices, self.images[indices.to(self.images.device)]


class Streamed:
    """Images that are read as they are needed, in an order of their own;
    broken files are skipped and listed."""

    def __init__(self, stream: Stream, workers: int, skipped: Skipped, device: torch.device):
        self.stream, self.workers, self.skipped, self.device = stream, workers, skipped, device
        self.items: Iterator | None = None

    def batch(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As InMemory.batch, for steps in order from any first one; nothing is drawn from the generator."""
        if self.items is None:
            self.items = self._from(step)
        pixels, indices, broken = next(self.items)
        self.skipped.add(broken)
        return indices, to_float(pixels.to(self.device))

    def _from(self, step: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        # the loader draws a number: not one of the global ones
        own = torch.Generator()
        return iter(DataLoader(self.stream, None, sampler=range(step, len(self.stream)),
                               num_workers=self.workers, generator=own))


def draw_indices(n: int, batch: int, generator: torch.Generator) -> Tensor:
    """[batch]: whole shuffled rounds of n images first, so that each is seen equally often."""
    rounds = [torch.randperm(n, generator=generator) for _ in range(math.ceil(batch / n))]
    return torch.cat(rounds)[:batch]


def load_image(path: str | Path, size: int) -> Tensor:
    """An image file -> [3, S, S] in -1..1. Raises DataError."""
    return to_float(read_image(path, size, channels=3))


def preview(folder: CaptionedImages) -> tuple[Tensor, list[int]]:
    """Up to 64 images of the first shuffle of seed 0, [N, C, S, S] in -1..1,
    and their indices: to evaluate on."""
    pixels, indices, _ = Stream(folder, min(PREVIEW, len(folder)), 0, 1)[0]
    return to_float(pixels), indices.tolist()


def readable(files: Sequence[str], size: int, broken: list[str],
             batch: int = READ_AT_ONCE) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, images [n, 3, S, S] in -1..1), a batch at a time;
    `broken` grows by a line for each file left out."""
    for first in range(0, len(files), batch):
        indices, images = [], []
        for i in range(first, min(first + batch, len(files))):
            try:
                images.append(read_image(files[i], size, channels=3))
                indices.append(i)
            except DataError as error:
                broken.append(str(error))
        if images:
            yield indices, to_float(torch.stack(images))


class Skipped:
    """The broken files of a stream, each once, in skipped.txt of the run folder.
    A resumed run keeps those it had."""

    def __init__(self, out: Path, ranks: Ranks, resume: bool = False):
        self.ranks, self.path = ranks, out / ("skipped.txt" if ranks.main else f"skipped.{ranks.rank}.txt")
        known = read_bytes(self.path, MOST_SKIPPED) if resume and self.path.exists() else b""
        self.files: dict[str, None] = dict.fromkeys(known.decode("utf-8", "replace").splitlines())

    def add(self, messages: list[str]) -> None:
        """Lists the new ones at once, so that a killed run has them."""
        if new := [message for message in messages if message not in self.files]:
            self.files |= dict.fromkeys(new)
            with atomic_write(self.path) as file:
                file.write("".join(line + "\n" for line in self.files).encode("utf-8"))

    def summary(self) -> str:
        """For the closing line, with the files of all processes, which all have to call it;
        empty if there are none."""
        everywhere = self.ranks.union(self.files)
        if self.ranks.main:
            self.add(everywhere)
        return f", {len(self.files)} broken files left out ({self.path})" if self.files else ""


# ----------------------------------------------------------------------------- data of one's own, from Python


def from_dataset(dataset: Dataset | Sequence, size: int, channels: int) -> tuple[Tensor, list]:
    """Images [N, C, S, S] in -1..1 and captions of any dataset of (image, caption).

    An image is a tensor [C, S, S] in -1..1 or a Pillow image, which is fitted into the square as files are.
    Raises DataError for an empty dataset and for the first item that is neither.
    """
    images, captions = [], []
    for i in range(len(dataset)):
        image, caption = dataset[i]
        images.append(as_tensor(image, i, size, channels))
        captions.append(caption)
    if not images:
        raise DataError("the dataset is empty")
    return torch.stack(images), captions


def as_tensor(image: object, index: int, size: int, channels: int) -> Tensor:
    """[C, S, S] in -1..1."""
    if hasattr(image, "convert"):                           # a Pillow image
        return to_float(fitted(image, (size, size), channels))
    if not isinstance(image, Tensor) or image.shape != (channels, size, size):
        found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise DataError(f"item {index} of the dataset: the image is {found}, not a tensor [{channels}, "
                        f"{size}, {size}] or a Pillow image")
    if not -1.001 <= image.min() <= image.max() <= 1.001:
        raise DataError(f"item {index} of the dataset: values from {image.min():.3g} to {image.max():.3g}, "
                        "not -1 to 1")
    return image.float()


def checksums(images: Tensor) -> list[str]:
    """Of each image's bytes: what stands for its name where it has none."""
    return [str(zlib.crc32(image.cpu().contiguous().numpy().tobytes())) for image in images]
