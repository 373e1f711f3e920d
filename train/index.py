"""The index of a run: the embeddings of many images, with their files and captions, to search in.

Read after image_text.py; written by train_clip.py and search.py.
Shapes: N images, E width of the shared space.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miniclip.files import WeightsError, is_texts, read_json, reason, shown, write_json
from miniclip.image_text import ImageTextModel
from miniclip.weights import load_file, load_folder, save_file

from .data.batches import readable
from .data.image import SUFFIXES
from .data.table import list_captioned
from .errors import DataError, UserError
from .run.folder import make_folder
from .run.log import Progress
from .run.state import checksum


@dataclass(frozen=True)
class Index:
    """Embeddings [N, E] of length 1, with file and caption of each picture."""

    files: list[str]
    captions: list[str]
    embeddings: Tensor
    root: str = ""                  # the folder that relative files start from; "": the current one
    weights: int | None = None      # checksum of the model's weights; older indexes have neither

    @classmethod
    def load(cls, folder: Path) -> Index:
        """The vectors are mapped, not read: opening an index of any size takes no time."""
        if not (folder / "index.json").exists():
            raise UserError(f"{folder}: no index here (it would hold index.json); give --pictures FOLDER to "
                            "make one")
        lists, tensors = read_json(folder / "index.json"), load_file(folder / "embeddings.safetensors")
        files, captions, embeddings = lists.get("files"), lists.get("captions"), tensors.get("embeddings")
        for name, value in (("files", files), ("captions", captions)):
            if not is_texts(value):
                raise WeightsError(f"{folder / 'index.json'}: {name} is not a list of texts")
        found = "None" if embeddings is None else f"of shape {list(embeddings.shape)}, {embeddings.dtype}"
        if (embeddings is None or embeddings.ndim != 2 or not embeddings.is_floating_point()
                or not len(embeddings) == len(files) == len(captions)):
            raise WeightsError(f"{folder}: {len(files)} files, {len(captions)} captions, embeddings {found}")
        root, weights = lists.get("root"), lists.get("weights")
        if not isinstance(root, str | None) or not isinstance(weights, int | None):
            found = f"root = {shown(root)}, weights = {shown(weights)}"
            raise WeightsError(f"{folder / 'index.json'}: {found}: not a text and a number")
        try:
            root = "" if root is None else os.path.realpath(folder / root)
        except (OSError, ValueError) as error:              # a NUL in it, or half a character
            raise WeightsError(f"{folder / 'index.json'}: root = {shown(root)}: {reason(error)}") from None
        return cls(files, captions, embeddings, root, weights)

    def path(self, i: int) -> str:
        """Where an image is: from the root, else from the current folder; relative if it lies in that."""
        below = [os.path.normpath(os.path.join(root, self.files[i])) for root in (self.root, "")]
        found = Path(next(filter(os.path.exists, below), below[0]))
        return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)

    def describe(self, i: int) -> str:
        """Its caption and its path."""
        return f"{self.captions[i]}  {self.path(i)}".strip()


def save_index(folder: Path, files: list[str], captions: list[str], embeddings: Tensor,
               weights: int | None = None) -> None:
    """Writes embeddings [N, E] with N files and captions. weights: of `weights_of`."""
    make_folder(folder)
    save_file({"embeddings": embeddings.contiguous()}, folder / "embeddings.safetensors")
    root, files = anchored(folder, files)
    lists = {"files": files, "captions": captions}
    write_json(folder / "index.json", {**lists, "root": root, "weights": weights})


def anchored(folder: Path, files: list[str]) -> tuple[str, list[str]]:
    """The current folder as seen from the index's, and the files from there: so they are found from anywhere,
    also after a move of the whole project. What lies outside of the current folder gets a full path."""
    here, folder = Path.cwd(), Path(os.path.realpath(folder))
    root = Path(os.path.relpath(here, folder)) if folder.is_relative_to(here) else here
    paths = [Path(file) for file in files]
    return root.as_posix(), [(p.relative_to(here) if p.is_relative_to(here) else p).as_posix() for p in paths]


def weights_of(model: Path) -> int:
    """A checksum of the weights in a model's folder: embeddings of other weights cannot be compared."""
    return checksum(load_folder(model, "model").values())


def best(embeddings: Tensor, query: Tensor, top: int) -> list[tuple[int, float]]:
    """(index, cosine) of the `top` rows of [N, E] closest to [E], best first.
    100,000 rows take milliseconds."""
    if embeddings.shape[1] != len(query):
        raise UserError(f"the index has vectors of {embeddings.shape[1]} numbers, the model of {len(query)}: "
                        "index again")
    scores = embeddings.to(query.dtype) @ query
    values, places = scores.topk(min(top, len(scores)))
    return list(zip(places.tolist(), values.tolist(), strict=True))


def one_answer_a_thing(model: ImageTextModel, names: list[str], hits: list[tuple[int, float]],
                       top: int) -> list[tuple[str, float]]:
    """The `top` things of hits among names: spellings of one thing are one answer, as near as the nearest.

    (Their sum would favour things of many spellings.)
    """
    thing = {name: i for i, group in enumerate(model.spellings) for name in group}
    found: dict[int | str, list[tuple[str, float]]] = {}
    for i, score in hits:
        found.setdefault(thing.get(names[i], names[i]), []).append((names[i], score))
    return [(" / ".join(name for name, _ in group), group[0][1]) for group in list(found.values())[:top]]


def index_files(model: ImageTextModel, files: list[str], captions: list[str], folder: Path | None,
                weights: int | None = None) -> list[str]:
    """The index of all pictures that can be read, a batch in memory at a time;
    returns what is wrong with the others.

    folder: None where another process writes it (with sharded weights all have to compute).
    """
    kept, vectors, broken, progress = [], [], [], Progress(len(files), unit="picture")
    for places, pictures in readable(files, model.size, broken):
        kept += places
        vectors.append(model.embed_images(pictures))
        if folder is not None:
            progress.show(places[-1] + 1, "indexed")
    progress.close()
    if not kept:
        raise DataError(f"none of {len(files)} pictures can be read: {broken[0]}")
    if folder is not None:
        save_index(folder, [files[i] for i in kept], [captions[i] for i in kept], torch.cat(vectors), weights)
    return broken


def build_index(model: ImageTextModel, pictures: str, folder: Path, weights: int) -> None:
    """Embeds every picture below a folder, whether it has captions or not.
    Broken files are named and left out."""
    try:
        source = list_captioned(pictures)
        files, captions = [str(picture.path) for picture in source], [picture.caption for picture in source]
    except DataError:
        files = sorted(str(p) for p in Path(pictures).rglob("*") if p.suffix.lower() in SUFFIXES)
        captions = [""] * len(files)
        if not files:
            raise
    broken = index_files(model, files, captions, folder, weights)
    for message in broken[:10]:
        print(f"  left out: {message}")
    print(f"{len(files) - len(broken)} pictures indexed in {folder}"
          + f", {len(broken)} left out" * bool(broken))
