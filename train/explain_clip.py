"""How a CLIP sees pictures beside their names, on one page: what `train.search --explain` writes.

Read after search.py, which calls `write_explanation`; explain_clip.html is the page that shows the numbers.
Papers: Radford 2021, section 2.3 (similarities and their temperature); Dosovitskiy 2021 (the class token);
Zeiler 2014, section 4.2 (covering parts of a picture and asking again).
Everything is computed here, once; the page divides by the temperature, and computes nothing else.
Shapes: N pictures and M names of the page, E shared width, S picture size, G places across a picture,
L layers, T tokens of the picture tower (the class token and its patches), n tokens of a name.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from miniclip.files import atomic_write, read_bytes, script_json
from miniclip.image_text import ImageTextModel

from .data.batches import load_image
from .errors import DataError, UserError
from .index import Index, best, one_answer_a_thing
from .recall import MATRIX
from .report import data_uri
from .run.cli import read_settings
from .run.folder import make_folder
from .run.log import Progress, read_rows, series

PICTURES, NAMES = 16, 24        # at most, on the page; what is nearest is looked for among all
GRID = 8                        # G: places across a picture at which it is covered
WIDTH = 224                     # pixels of a picture on the page, at most
FRAMES, FRAME_BYTES = 40, 2**21     # similarity matrices of the run, at most, and all of one side together
POINTS = 300                    # of the loss curve
TEMPLATE = Path(__file__).with_name("explain_clip.html")


@dataclass(frozen=True)
class Asked:
    """What the page is about besides the run's own pictures and names; all may be empty."""

    image: str = ""             # a picture file, shown first
    text: str = ""              # a name, shown first; the pictures are then those nearest to it
    names: tuple[str, ...] = () # in place of those of training
    top: int = 5                # how many nearest names and pictures


def write_explanation(model: ImageTextModel, index: Index, run: Path, asked: Asked, path: Path) -> None:
    """Writes the page, whole or not at all. Raises UserError, DataError and WeightsError in one line."""
    make_folder(path.parent, write=False)
    data = explain(model, index, run, asked)
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", script_json(finite(data)), 1)
    with atomic_write(path) as file:
        file.write(page.encode("utf-8"))
    print(f"the page: {path} ({len(page.encode()) / 2**20:.1f} MiB)")


def explain(model: ImageTextModel, index: Index, run: Path, asked: Asked) -> dict[str, Any]:
    """All that the page shows, as plain lists."""
    files, captions, images = pick_pictures(model, index, asked)
    known = list(asked.names) or model.captions or [c for c in dict.fromkeys(index.captions) if c]
    names = pick_names(model, known, images, captions, asked)
    pictures, texts = model.embed_images(images), model.embed_texts(names)              # [N, E], [M, E]
    progress = Progress(len(files) + len(names), unit="part")
    falls = []
    for i, image in enumerate(images):
        falls.append(rounded(occlusion(model, image, texts).flatten(0, 1).T))           # M lists of G G
        progress.show(i + 1, "pictures covered, place by place")
    readings = []
    for i, name in enumerate(names):
        readings.append(read_token_by_token(model, name, pictures))
        progress.show(len(files) + i + 1, "names read, token by token")
    progress.close()
    return {
        **about(model, run, len(index.files), len(known)),
        "pictures": [{"src": image_uri(image), "file": file, "caption": caption, "mean": mean_color(image)}
                     for file, caption, image in zip(files, captions, images, strict=True)],
        "names": names, "asked_text": bool(asked.text), "things": things(model, names),
        "similarity": rounded(pictures @ texts.T),                                      # [N, M]
        "nearest_names": nearest_names(model, known, pictures, asked.top),
        "nearest_pictures": [nearest_pictures(index, text, asked.top) for text in texts],
        "grid": GRID, "falls": falls,
        "attention": None if (seen := class_attention(model, images)) is None else rounded(seen, 5),
        "readings": readings, "training": training(run, model, index),
    }


def about(model: ImageTextModel, run: Path, pictures: int, names: int) -> dict[str, Any]:
    """What is said on top of the page."""
    has_settings = (run / "config.json").exists()
    loss = read_settings(run).get("loss", "infonce") if has_settings else "infonce"
    tower = model.model.vision_model if hasattr(model.model, "vision_model") else None
    return {"run": run.name or str(run), "size": model.size, "loss": loss, "all_pictures": pictures,
            "all_names": names, "scale": model.model.logit_scale.exp().item(),
            "parameters": sum(p.numel() for p in model.model.parameters()),
            "tower": "ViT" if tower is not None else "ResNet",
            "patch": tower.config.patch_size if tower is not None else None}


# ----------------------------------------------------------------------------- which pictures and which names


def pick_pictures(model: ImageTextModel, index: Index, asked: Asked) -> tuple[list[str], list[str], Tensor]:
    """Files, captions and images [N, 3, S, S]: the one asked about, then the nearest of the index to what is
    asked, or its first ones. Those that cannot be read are left out, by name."""
    files, captions, images = [], [], []
    order = list(range(len(index.files)))
    if asked.image:
        images.append(load_image(asked.image, model.size))
        files, captions = [asked.image], [""]
        query = model.embed_images(images[0][None])[0]
        order = [i for i, _ in best(index.embeddings, query, len(order))]
    elif asked.text:
        order = [i for i, _ in best(index.embeddings, model.embed_texts([asked.text])[0], len(order))]
    for i in order:
        if len(files) == PICTURES:
            break
        if asked.image and Path(index.path(i)).resolve() == Path(asked.image).resolve():
            captions[0] = index.captions[i]
            continue
        try:
            images.append(load_image(index.path(i), model.size))
        except DataError as error:
            print(f"  left out: {error}")
            continue
        files.append(index.path(i))
        captions.append(index.captions[i])
    if not images:
        raise DataError(f"none of the {len(order)} pictures of the index can be read: index again with "
                        "--pictures FOLDER")
    return files, captions, torch.stack(images)


def pick_names(model: ImageTextModel, known: list[str], images: Tensor, captions: list[str],
               asked: Asked) -> list[str]:
    """M names: the one asked about, then those given; without any given those nearest to the picture asked
    about, those of the pictures with their other spellings, and the rest of the known ones."""
    first = [asked.text] if asked.text else []
    if asked.image and known and not asked.names:
        scores = model.embed_texts(known) @ model.embed_images(images[:1])[0]
        first += [known[i] for i in scores.argsort(descending=True)[:asked.top].tolist()]
    groups = {name: group for group in model.spellings for name in group}
    own = [name for caption in captions if caption for name in groups.get(caption, [caption])]
    names = list(dict.fromkeys([*first, *([] if asked.names else own), *known]))[:NAMES]
    if not names:
        raise UserError("neither the model nor the index knows a name: give --names")
    return names


def things(model: ImageTextModel, names: list[str]) -> list[int]:
    """[M] numbers, equal for spellings of one thing."""
    thing = {name: i for i, group in enumerate(model.spellings) for name in group}
    keys = [thing.get(name, name) for name in names]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return [number[key] for key in keys]


def nearest_names(model: ImageTextModel, known: list[str], pictures: Tensor,
                  top: int) -> list[list[tuple[str, float]]]:
    """For each picture [N, E] the `top` things of all that are known, with their cosines."""
    if not known:
        return [[] for _ in pictures]
    texts = model.embed_texts(known)
    return [[(name, round(score, 4)) for name, score in
             one_answer_a_thing(model, known, best(texts, picture, len(known)), top)] for picture in pictures]


def nearest_pictures(index: Index, text: Tensor, top: int) -> list[tuple[str, float]]:
    """For a name [E] the `top` pictures of the whole index, with their cosines."""
    return [(f"{index.captions[i]} ({Path(index.files[i]).name})", round(score, 4))
            for i, score in best(index.embeddings, text, top)]


# ------------------------------------------------------------------------------------ where the tower looks


def window(place: int, size: int) -> slice:
    """The pixels that are covered at a place of the grid: two places wide, less at the picture's edge."""
    return slice(max(0, round((place - 0.5) * size / GRID)), min(size, round((place + 1.5) * size / GRID)))


def occlusion(model: ImageTextModel, image: Tensor, texts: Tensor) -> Tensor:
    """How far the similarity falls where a square of the picture is covered by the picture's mean colour.

    image [3, S, S], texts [M, E] -> [G, G, M]; above 0: the picture was nearer to the name with the square.
    """
    size = image.shape[-1]
    covered = image.repeat(GRID * GRID, 1, 1, 1)                                    # [G G, 3, S, S]
    for place, picture in enumerate(covered):
        row, column = divmod(place, GRID)
        picture[:, window(row, size), window(column, size)] = image.mean(dim=(1, 2))[:, None, None]
    whole = model.embed_images(image[None]) @ texts.T                               # [1, M]
    falls = whole - model.embed_images(covered, batch=64) @ texts.T                 # [G G, M]
    return falls.unflatten(0, (GRID, GRID))


def class_attention(model: ImageTextModel, images: Tensor) -> Tensor | None:
    """Which patches the class token reads in each layer, a mean over the heads: [N, L, T], rows sum to 1, the
    class token itself first. None for a ResNet, which has no attention to show.

    The hooks ask the tower for its weights, softmax(q k^T / sqrt(hd)), on the way that pictures take anyway.
    """
    tower, found = getattr(model.model, "vision_model", None), []
    if tower is None:
        return None
    asks = tower.register_forward_pre_hook(
        lambda _, args, options: (args, {**options, "output_attentions": True}), with_kwargs=True)
    keeps = tower.register_forward_hook(lambda _, args, out: found.append(
        torch.stack([weights[:, :, 0].mean(dim=1) for weights in out.attentions], dim=1).cpu()))
    try:
        model.embed_images(images)
    finally:
        asks.remove(), keeps.remove()
    return torch.cat(found)


# --------------------------------------------------------------------------------------- what each token adds


def read_token_by_token(model: ImageTextModel, name: str, pictures: Tensor) -> dict[str, Any]:
    """The pieces of a name, and the similarity to pictures [N, E] of its beginnings, from nothing to all of
    it ("typed", [n + 1, N]), and of the name without each of its tokens ("without", [n, N])."""
    tokenizer = model.tokenizer
    room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
    ids = tokenizer.text_ids(name)[:room]
    typed = [ids[:k] for k in range(len(ids) + 1)]
    without = [ids[:i] + ids[i + 1:] for i in range(len(ids))]
    similarity = embed_ids(model, typed + without) @ pictures.T                     # [2 n + 1, N]
    pieces = [{"text": tokenizer.decode([i]), "symbol": tokenizer.convert_ids_to_tokens(i)} for i in ids]
    return {"pieces": pieces, "typed": rounded(similarity[:len(typed)]),
            "without": rounded(similarity[len(typed):])}


@torch.no_grad()
def embed_ids(model: ImageTextModel, texts: list[list[int]]) -> Tensor:
    """Texts that are ids already, without start and end, which are put around them here: [n, E]."""
    rows = [model.tokenizer.row(ids) for ids in texts]
    filled = model.tokenizer.fill(rows, max(len(row["input_ids"]) for row in rows))
    ids, mask = (torch.tensor(filled[key], device=model.device) for key in ("input_ids", "attention_mask"))
    return model.eval().encode_tokens(ids, mask).cpu()


# ---------------------------------------------------------------------------------------------- over training


def training(run: Path, model: ImageTextModel, index: Index) -> dict[str, Any] | None:
    """The curves of metrics.jsonl and the similarity matrices of a run; None where it left none."""
    if not (run / "metrics.jsonl").exists():
        return None
    rows = read_rows(run / "metrics.jsonl")
    steps = [step for step, _ in series(rows, "image_to_text_R@1")]
    recalls = {f"{side}, {way}": series(rows, f"{prefix}{key}_R@1")
               for prefix, side in (("", "trained"), ("held_out_", "held out"))
               for way, key in (("picture to name", "image_to_text"), ("name to picture", "text_to_image"))}
    sides = [{"title": title, "frames": frames, "rows": row_labels(run, frames, model, index)}
             for title, prefix in (("Trained pictures", ""), ("Held-out pictures", "held_out_"))
             if (frames := matrices(run / "matrix", prefix, steps))]
    return {"loss": thinned(series(rows, "loss"), POINTS), "blind": thinned(series(rows, "blind"), POINTS),
            "recall": {name: points for name, points in recalls.items() if points}, "sides": sides}


def thinned(points: list, most: int) -> list:
    """At most so many, evenly chosen, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def matrices(folder: Path, prefix: str, steps: list[int]) -> list[dict[str, Any]]:
    """The PNGs of these steps, fewer where they would make the page large."""
    files = {step: folder / f"{prefix}{step:06d}.png" for step in steps}
    there = [(step, file) for step, file in files.items() if file.exists()]
    count = min(len(there), FRAMES)
    while count > 2 and sum(file.stat().st_size for _, file in thinned(there, count)) > FRAME_BYTES:
        count -= 1
    frames = [(step, read_bytes(file, FRAME_BYTES)) for step, file in thinned(there, count)]
    return [{"step": step, "src": data_uri(png, "png")}
            for step, png in frames]


def row_labels(run: Path, frames: list[dict[str, Any]], model: ImageTextModel, index: Index) -> list[str]:
    """The names of a matrix's rows, as `recall.evaluate` orders them; none where that cannot be told."""
    names = [name for name in model.captions if name in set(index.captions)]
    names = [*names, *(name for name in dict.fromkeys(index.captions) if name not in names)][:MATRIX]
    png = base64.b64decode(frames[0]["src"].partition(",")[2])[16:24]
    width, height = int.from_bytes(png[:4], "big"), int.from_bytes(png[4:], "big")
    cell = height // (len(names) + 1)               # the row of pictures on top is a cell high, too
    told = cell and height == cell * (len(names) + 1) and width % cell == 0
    streamed = read_settings(run).get("stream") if (run / "config.json").exists() else True
    return names if told and not streamed else []


# --------------------------------------------------------------------------------------- numbers and pictures


def rounded(values: Tensor, digits: int = 4) -> list:
    """Nested lists of numbers of so many digits: what a page can show."""
    return [rounded(row, digits) if row.ndim else round(row.item(), digits) for row in values.float()]


def finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON has no word for: null in their place."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def image_uri(image: Tensor) -> str:
    """[3, S, S] in -1..1 as the tower sees it; large ones as JPEG, to keep the page small."""
    picture, file = to_pil_image(((image.clamp(-1, 1) + 1) * 127.5).round().byte()), io.BytesIO()
    kind = "png" if image.shape[-1] <= 96 else "jpeg"
    picture.thumbnail((WIDTH, WIDTH))
    picture.save(file, format=kind)
    return data_uri(file.getvalue(), kind)


def mean_color(image: Tensor) -> str:
    """What squares are covered with, for CSS."""
    return "rgb({}, {}, {})".format(*((image.mean(dim=(1, 2)) + 1) * 127.5).round().int().tolist())
