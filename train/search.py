"""Search with a trained run: which images have this name, which names has this image.

    python -m train.search --run out/herbs --text 薑
    python -m train.search --run out/herbs --image some.png
    python -m train.search --run out/herbs --explain herbs.html     # how it sees them, on one page

Read after train_clip.py, which leaves the run folder. Papers: Radford 2021, section 3.1 (zero-shot by names).
Shapes: N pictures of the index, M names, E width of the shared space.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miniclip.image_text import ImageTextModel
from minidiff.optimize import optimize

from .data.batches import load_image
from .data.grid import save_grid
from .errors import DataError, UserError
from .explain_clip import Asked, write_explanation
from .index import Index, best, build_index, one_answer_a_thing, weights_of
from .run.cli import check_flags, flag, model_folder, parse_flags, pick_device, start
from .run.folder import make_folder


@dataclass(frozen=True)
class SearchConfig:
    """The flags of train.search."""

    run: str = flag("out/herbs", "run folder of train.train_clip")
    text: str = flag("", "a name: which pictures are it?")
    image: str = flag("", "a picture file: what is its name, and what is like it?")
    names: str = flag("", "names to choose from, separated by commas; else those of training")
    top: int = flag(5, "how many answers", at_least=1, at_most=1000)
    pictures: str = flag("", "index this folder of pictures first, and search in it")
    index: str = flag("", "index folder; else RUN/index, or with --pictures RUN/index-NAME")
    explain: str = flag("", "HTML file to write: a page of how the run sees its pictures beside the names; "
                        "--image or --text, if given, comes first on it")
    out: str = flag("", "PNG of the hits, best first; else RUN/hits.png")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: SearchConfig) -> None:
    """Prints what is nearest to --text or --image, saves the nearest pictures as one PNG, writes the page.

    Raises UserError, DataError for pictures, WeightsError and ConfigError for the model or the index.
    """
    check_flags(cfg)
    check_question(cfg)
    source = model_folder(cfg.run)
    model = optimize(ImageTextModel.load(source)).to(pick_device(cfg.device))
    name = f"index-{Path(cfg.pictures).name}" if cfg.pictures else "index"
    folder = Path(cfg.index or Path(cfg.run) / name)
    if cfg.pictures:
        build_index(model, cfg.pictures, folder, weights_of(source))
    index = Index.load(folder)
    if not cfg.pictures:                            # else it was made just now
        warn_of_other_weights(index, folder, source)
    names = [n.strip() for n in cfg.names.split(",") if n.strip()]
    if cfg.text.strip() or cfg.image:
        answer(cfg, model, index, names or model.captions)
    if cfg.explain:
        asked = Asked(cfg.image, cfg.text.strip(), tuple(names), cfg.top)
        write_explanation(model, index, Path(cfg.run), asked, Path(cfg.explain))


def check_question(cfg: SearchConfig) -> None:
    """One question, or none where a page is asked for. Raises UserError."""
    text = bool(cfg.text.strip())
    if text and cfg.image or not (text or cfg.image or cfg.explain):
        raise UserError("give either --text or --image" + ", or neither, with --explain" * bool(cfg.explain))
    if cfg.explain and Path(cfg.explain).is_dir():
        raise UserError(f"--explain {cfg.explain}: a folder; give the name of an HTML file")


def answer(cfg: SearchConfig, model: ImageTextModel, index: Index, names: list[str]) -> None:
    """Prints and saves what is nearest to --text or --image."""
    if cfg.text.strip():
        model.warn_long([cfg.text])
        query = model.embed_texts([cfg.text])[0]                                    # [E]
    else:
        query = model.embed_images(load_image(cfg.image, model.size)[None])[0]
        if names:
            print("its name:")
            print_hits(best_things(model, names, query, cfg.top), model.model.logit_scale.exp().item())
        print("pictures like it:")
    hits = best(index.embeddings, query, cfg.top)
    print_hits([(index.describe(i), score) for i, score in hits])
    save_hits([index.path(i) for i, _ in hits], Path(cfg.out or Path(cfg.run) / "hits.png"), model.size)


def warn_of_other_weights(index: Index, folder: Path, model: Path) -> None:
    """On stderr, if the model's weights are not those of the index; an older index tells none."""
    if index.weights is not None and index.weights != weights_of(model):
        print(f"warning: {folder} was made with other weights than {model} has now: its answers mean "
              f"little; index again with --pictures FOLDER --index {folder}", file=sys.stderr)


def best_things(model: ImageTextModel, names: list[str], query: Tensor, top: int) -> list[tuple[str, float]]:
    """The `top` things with their cosines to a vector [E]; see `one_answer_a_thing`."""
    return one_answer_a_thing(model, names, best(model.embed_texts(names), query, len(names)), top)


def print_hits(hits: list[tuple[str, float]], scale: float | None = None) -> None:
    """Prints the hits; with a scale also how sure the model is among all that are shown."""
    scores = torch.tensor([score for _, score in hits])
    shares = torch.softmax(scores * scale, dim=0).tolist() if scale else None
    for rank, (name, score) in enumerate(hits):
        share = f"  {shares[rank]:6.1%}" if shares else ""
        print(f"  {rank + 1}. {score:+.3f}{share}  {name}")


def save_hits(files: list[str], path: Path, size: int) -> None:
    """A row of the images that were hit. A file that is gone is left out."""
    images = []
    for file in files:
        try:
            images.append(load_image(file, size))
        except DataError as error:
            print(f"  ({error})")
    if images:
        make_folder(path.parent)
        save_grid(torch.stack(images), path, columns=min(len(images), 10))
        print(f"the hits as a picture: {path}")


if __name__ == "__main__":
    start(lambda: main(parse_flags(SearchConfig, __doc__.split("\n\n")[0])))
