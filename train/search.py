"""Ask a trained run: which pictures has this name, which name has this picture.

    python -m train.search --run out/herbs --text 薑
    python -m train.search --run out/herbs --image some.png

Read after train_clip.py, which leaves the run folder. Papers: Radford 2021, section 3.1 (zero-shot by names).
Shapes: N pictures of the index, M names, E width of the shared space.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.folder import SUFFIXES, DataError, list_pictures, read_picture
from miniclip.weights import WeightsError, load_file, load_folder, read_json, save_file, write_json
from train.common import (
    Progress,
    UserError,
    check_flags,
    flag,
    make_folder,
    parse_flags,
    pick_device,
    run,
    save_grid,
)
from train.latent import checksum
from train.matcher import Matcher
from train.stream import readable


@dataclass(frozen=True)
class SearchConfig:
    run: str = flag("out/herbs", "run folder of train.train_clip")
    text: str = flag("", "a name: which pictures are it?")
    image: str = flag("", "a picture file: what is its name, and what is like it?")
    names: str = flag("", "names to choose from, separated by commas; else those of training")
    top: int = flag(5, "how many answers", at_least=1, at_most=1000)
    pictures: str = flag("", "index this folder of pictures first, and search in it")
    index: str = flag("", "index folder; else RUN/index, or with --pictures RUN/index-NAME")
    out: str = flag("", "PNG of the hits, best first; else RUN/hits.png")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: SearchConfig) -> None:
    check_flags(cfg)
    if bool(cfg.text.strip()) == bool(cfg.image):
        raise UserError("give either --text or --image")
    model = Path(cfg.run) / "model"
    if not model.is_dir():
        raise UserError(f"--run {cfg.run}: no run folder here (it would hold a folder `model`)")
    matcher = Matcher.load(model).to(pick_device(cfg.device))
    folder = Path(cfg.index or Path(cfg.run) / (f"index-{Path(cfg.pictures).name}" if cfg.pictures else "index"))
    if cfg.pictures:
        build_index(matcher, cfg.pictures, folder, weights_of(model))
    index = Index.load(folder)
    if index.weights is not None and index.weights != weights_of(model):
        print(f"warning: {folder} was made with other weights than {model} has now: its answers mean little; "
              f"index again with --pictures FOLDER --index {folder}", file=sys.stderr)

    if cfg.text:
        matcher.warn_long([cfg.text])
        query = matcher.embed_texts([cfg.text])[0]                                  # [E]
    else:
        query = matcher.embed_pictures(as_floats(cfg.image, matcher.size)[None])[0]
        names = [n.strip() for n in cfg.names.split(",") if n.strip()] or matcher.captions
        if names:
            print("its name:")
            tell(best_things(matcher, names, query, cfg.top), matcher.model.logit_scale.exp().item())
        print("pictures like it:")
    hits = best(index.embeddings, query, cfg.top)
    tell([(index.describe(place), score) for place, score in hits])
    show([index.path(place) for place, _ in hits], Path(cfg.out or Path(cfg.run) / "hits.png"), matcher.size)


def best(embeddings: Tensor, query: Tensor, top: int) -> list[tuple[int, float]]:
    """(place, cosine) of the `top` rows of [N, E] closest to [E], best first. 100,000 rows take milliseconds."""
    if embeddings.shape[1] != len(query):
        raise UserError(f"the index has vectors of {embeddings.shape[1]} numbers, the model of {len(query)}: index again")
    scores = embeddings.to(query.dtype) @ query
    values, places = scores.topk(min(top, len(scores)))
    return list(zip(places.tolist(), values.tolist(), strict=True))


def best_things(matcher: Matcher, names: list[str], query: Tensor, top: int) -> list[tuple[str, float]]:
    """The `top` things with their cosines: spellings of one thing are one answer, as near as the nearest.

    (Their sum would favour things of many spellings.)
    """
    thing = {name: i for i, group in enumerate(matcher.spellings) for name in group}
    found: dict[int | str, list[tuple[str, float]]] = {}
    for place, score in best(matcher.embed_texts(names), query, len(names)):
        found.setdefault(thing.get(names[place], names[place]), []).append((names[place], score))
    return [(" / ".join(name for name, _ in group), group[0][1]) for group in list(found.values())[:top]]


def tell(hits: list[tuple[str, float]], scale: float | None = None) -> None:
    """Prints the hits; with a scale also how sure the model is among all that are shown."""
    shares = torch.softmax(torch.tensor([score for _, score in hits]) * scale, dim=0).tolist() if scale else None
    for rank, (name, score) in enumerate(hits):
        share = f"  {shares[rank]:6.1%}" if shares else ""
        print(f"  {rank + 1}. {score:+.3f}{share}  {name}")


def show(files: list[str], path: Path, size: int) -> None:
    """A row of the pictures that were hit. A file that is gone is left out."""
    pictures = []
    for file in files:
        try:
            pictures.append(as_floats(file, size))
        except DataError as error:
            print(f"  ({error})")
    if pictures:
        make_folder(path.parent)
        save_grid(torch.stack(pictures), path, columns=min(len(pictures), 10))
        print(f"the hits as a picture: {path}")


def as_floats(path: str, size: int) -> Tensor:
    """A picture file -> [3, S, S] in -1..1."""
    return read_picture(path, size, channels=3).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------- the index


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
            raise UserError(f"{folder}: no index here (it would hold index.json); give --pictures FOLDER to make one")
        lists, tensors = read_json(folder / "index.json"), load_file(folder / "embeddings.safetensors")
        files, captions, embeddings = lists.get("files"), lists.get("captions"), tensors.get("embeddings")
        for name, value in (("files", files), ("captions", captions)):
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise WeightsError(f"{folder / 'index.json'}: {name} is not a list of texts")
        if embeddings is None or embeddings.ndim != 2 or not len(embeddings) == len(files) == len(captions):
            shape = None if embeddings is None else list(embeddings.shape)
            raise WeightsError(f"{folder}: {len(files)} files, {len(captions)} captions, embeddings of shape {shape}")
        root, weights = lists.get("root"), lists.get("weights")
        if not isinstance(root, str | None) or not isinstance(weights, int | None):
            said = f"root = {root!r}, weights = {weights!r}"
            raise WeightsError(f"{folder / 'index.json'}: {said}: not a text and a number")
        root = "" if root is None else os.path.realpath(folder / root)
        return cls(files, captions, embeddings, root, weights)

    def path(self, place: int) -> str:
        """Where a picture is: from the root, else from the current folder; relative if it lies in that."""
        below = [os.path.normpath(os.path.join(root, self.files[place])) for root in (self.root, "")]
        found = Path(next(filter(os.path.exists, below), below[0]))
        return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)

    def describe(self, place: int) -> str:
        return f"{self.captions[place]}  {self.path(place)}".strip()


def save_index(folder: Path, files: list[str], captions: list[str], embeddings: Tensor,
               weights: int | None = None) -> None:
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
    """A checksum of the weights in a model's folder: vectors of other weights cannot be compared."""
    return checksum(load_folder(model, "model").values(), "")


def index_files(matcher: Matcher, files: list[str], captions: list[str], folder: Path | None,
                weights: int | None = None) -> list[str]:
    """The index of all pictures that can be read, a batch in memory at a time; returns what is wrong with the others.

    folder: None where another process writes it (with weights that are shared out, all have to compute).
    """
    kept, vectors, broken, progress = [], [], [], Progress(len(files), unit="picture")
    for places, pictures in readable(files, matcher.size, broken):
        kept += places
        vectors.append(matcher.embed_pictures(pictures))
        if folder is not None:
            progress.show(places[-1] + 1, "indexed")
    progress.close()
    if not kept:
        raise DataError(f"none of {len(files)} pictures can be read: {broken[0]}")
    if folder is not None:
        save_index(folder, [files[i] for i in kept], [captions[i] for i in kept], torch.cat(vectors), weights)
    return broken


def build_index(matcher: Matcher, pictures: str, folder: Path, weights: int) -> None:
    """Embeds every picture below a folder, whether it has captions or not. Broken files are named and left out."""
    try:
        source = list_pictures(pictures)
        files, captions = [str(picture.path) for picture in source], [picture.caption for picture in source]
    except DataError:
        files = sorted(str(p) for p in Path(pictures).rglob("*") if p.suffix.lower() in SUFFIXES)
        captions = [""] * len(files)
        if not files:
            raise
    broken = index_files(matcher, files, captions, folder, weights)
    for message in broken[:10]:
        print(f"  left out: {message}")
    print(f"{len(files) - len(broken)} pictures indexed in {folder}" + f", {len(broken)} left out" * bool(broken))


if __name__ == "__main__":
    run(lambda: main(parse_flags(SearchConfig, __doc__.split("\n\n")[0])))
