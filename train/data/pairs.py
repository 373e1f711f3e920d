"""Pairs: images with their captions in several columns, such as several languages,
and which of them are held out.

Read after folder.py, before train_clip.py. Shapes: N images, S image size.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from miniclip.files import shown

from ..errors import DataError, UserError
from .batches import from_dataset, preview
from .folder import CaptionedImages
from .table import Captioned, caption_columns, columns_of, find_column


@dataclass(frozen=True)
class Pairs:
    """Images [N, 3, S, S] in -1..1, one list of N captions for each column, and who is held out."""

    files: list[str]
    images: Tensor
    captions: list[list[str]]
    held_out: list[bool]

    def split(self) -> tuple[Pairs, Pairs]:
        """Those to train on, and those held out."""
        return tuple(self.take([i for i, held in enumerate(self.held_out) if held == which])
                     for which in (False, True))

    def shuffled(self, seed: int) -> Pairs:
        """The same images with captions of other rows: there is nothing to learn but by heart."""
        order = torch.randperm(len(self.files), generator=torch.Generator().manual_seed(seed)).tolist()
        return dataclasses.replace(self, captions=[[column[i] for i in order] for column in self.captions])

    def take(self, rows: list[int]) -> Pairs:
        """The pairs of these rows, in the order given."""
        captions = [[column[i] for i in rows] for column in self.captions]
        return Pairs([self.files[i] for i in rows], self.images[rows], captions,
                     [self.held_out[i] for i in rows])

    def folder(self, size: int) -> CaptionedImages:
        """A reader of just these images, in this order."""
        entries = [Captioned(Path(file), caption)
                   for file, caption in zip(self.files, self.captions[0], strict=True)]
        return CaptionedImages("", size=size, channels=3, entries=entries)

    def loaded(self, size: int) -> Pairs:
        """With all images in memory."""
        return dataclasses.replace(self, images=self.folder(size).images())

    @classmethod
    def of(cls, dataset: Dataset | Sequence, size: int, share: float = 0.0, seed: int = 0) -> Pairs:
        """Of any dataset of (image, caption), or (image, (caption, another spelling, ...));
        see `from_dataset`.

        share: of the images to hold out.
        """
        images, captions = from_dataset(dataset, size, channels=3)
        rows = [(caption,) if isinstance(caption, str) else tuple(caption) for caption in captions]
        if len({len(row) for row in rows}) > 1:
            raise DataError("the items of the dataset have different numbers of captions")
        names = [f"item {i}" for i in range(len(rows))]
        columns = [list(column) for column in zip(*rows)]
        return cls(names, images, columns, random_share(names, columns, share, seed))

    def preview(self, size: int) -> Pairs:
        """Up to 64 of them, with their images in memory."""
        if not self.files:
            return self
        images, rows = preview(self.folder(size))
        return dataclasses.replace(self.take(rows), images=images)


def list_pairs(root: str, size: int, columns: list[str], hold_out: str = "", seed: int = 0,
               index: Path | None = None) -> Pairs:
    """The pairs of a folder, their images not read yet ([N, 0]).

    columns: of captions, the first of which is tested.
    hold_out: column=value, or a share of the images, drawn by `seed`. index: a folder to keep the lists of a
    large table in. Raises UserError and DataError.
    """
    name, equals, value = hold_out.partition("=")
    there = columns_of(root)
    if equals and there and not find_column(there, name):
        raise UserError(f"--hold-out {hold_out}: no column {name!r} in captions.csv; it has "
                        f"{', '.join(there):.200}")
    wanted = [*columns, name] if equals else columns
    folders = [CaptionedImages(root, size=size, channels=3, caption_column=column,
                               index=index / f"index.{i}.json" if index else None)
               for i, column in enumerate(wanted)]
    captions = [folder.captions for folder in folders[:len(columns)]]
    files = [str(entry.path) for entry in folders[0].entries]
    if equals:
        held_out = matching(folders[-1].captions, name, value)
    else:
        held_out = random_share(files, captions, share_of(hold_out), seed)
    check_captions(root, captions[0], held_out, hold_out)
    return Pairs(files, torch.empty(len(files), 0), captions, held_out)


def caption_columns_of(root: str, named: str, hold_out: str) -> list[str]:
    """The columns of captions: those named, with commas, or else those that the table has.
    Class folders have one."""
    if not named or not (Path(root) / "captions.csv").exists():
        return caption_columns(root, besides=hold_out.partition("=")[0])
    columns = [name.strip() for name in named.split(",") if name.strip()]
    if not columns:
        raise UserError("--caption-column: name at least one column")
    return columns


def matching(values: list[str], name: str, value: str) -> list[bool]:
    """Which rows have the value; neither none nor all of them may."""
    held_out = [v == value for v in values]
    if not any(held_out) or all(held_out):
        known = shown(list(dict.fromkeys(values))[:10])
        raise UserError(f"--hold-out {name}={value}: leaves nothing to "
                        f"{'test' if not any(held_out) else 'train'}; {name} holds {known}")
    return held_out


def share_of(hold_out: str) -> float:
    """The share that is held out; 0 if it is none."""
    try:
        share = float(hold_out)
    except ValueError:
        return 0.0
    return share if 0 < share < 1 else 0.0


def random_share(files: list[str], captions: list[list[str]], share: float, seed: int) -> list[bool]:
    """Which rows are held out: those of a share of the files, sampled at random.

    Of the images with one caption, in any column, one stays to train on,
    so there may be fewer than asked for; where a caption has but one image, that may be held out.
    """
    captions_of: dict[str, set[tuple[int, str]]] = {file: set() for file in files}
    for k, column in enumerate(captions):
        for file, caption in zip(files, column, strict=True):
            captions_of[file].add((k, caption))
    left = Counter(caption for own in captions_of.values() for caption in own)
    single = {caption for caption, count in left.items() if count == 1}
    distinct, held = list(captions_of), set()
    for i in torch.randperm(len(distinct),
                            generator=torch.Generator().manual_seed(seed)).tolist() if share else ():
        if len(held) >= max(1, round(share * len(distinct))):
            break
        own = captions_of[distinct[i]]
        if all(left[caption] > 1 or caption in single for caption in own):
            held.add(distinct[i])
            left.subtract(own)
    return [file in held for file in files]


def check_captions(root: str, captions: list[str], held_out: list[bool], hold_out: str) -> None:
    """Refuses captions that leave nothing to tell apart."""
    trained = {c for c, held in zip(captions, held_out, strict=True) if not held}
    if len(trained) < 2 <= len(set(captions)):
        raise UserError(f"--hold-out {hold_out}: leaves fewer than two captions to train on; hold out less")
    if len(trained) < 2:
        raise DataError(f"{root}: one caption for all pictures; matching needs at least two")
    if len(trained) > 2 and all(Path(c).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
                                for c in trained):
        raise DataError(f"{root}: the captions are file names; are two columns of captions.csv swapped?")
