"""`python -m miniclip.export --model MODEL --out DIR`: a CLIP that runs without PyTorch, and its proof.

Read after image_text.py; graphs.py traces and writes.
Mirrors: nothing upstream; DIR holds a graph for pictures and one for texts, the tokenizer, pipeline.json with
the rules for pictures, golden vectors, runner.py (embed/runner.py) and a page for browsers.
Shapes: N pictures or texts, S side of a picture, T text tokens, E width of the shared space.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.command import run
from miniclip.convert import load
from miniclip.files import write_json
from miniclip.graphs import (
    EMBED,
    FORMATS,
    OF_TORCH,
    OPSET,
    Graph,
    Part,
    Progress,
    check_format,
    int8_report,
    new_folder,
    outputs_of,
    save_golden,
    token_rules,
    with_int8,
    write_beside,
    write_graphs,
)
from miniclip.image import CLIPImageProcessor
from miniclip.image_text import ImageTextModel
from miniclip.model import normalize
from miniclip.tokenizer import CLIPTokenizer

TOLERANCE = 1e-5            # relative, of each stage in float32
GOLDEN_TEXTS = ["a photo of a cat", "人蔘", "It's 12 o'clock!"]
GOLDEN_PICTURE = (97, 150)  # height and width


def image_embedding(model: nn.Module, pixels: Tensor) -> Tensor:
    """[N, 3, S, S], normalised as pipeline.json says -> [N, E] of length 1."""
    if hasattr(model, "encode_image"):
        return model.encode_image(pixels)
    return normalize(model.get_image_features(pixels, return_dict=False)[1])


def text_embedding(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """[N, T] -> [N, E] of length 1."""
    if hasattr(model, "encode_text"):
        return model.encode_text(ids, mask)
    return normalize(model.get_text_features(ids, mask, return_dict=False)[1])


def graphs_of(m: ImageTextModel) -> dict[str, Graph]:
    """Both towers."""
    side, most = read_size(m.processor), m.tokenizer.model_max_length
    ids = torch.randint(m.tokenizer.vocab_size, (2, most))
    rows = {0: "batch", 1: "tokens"}
    return {"image": Graph(Part(m.model, image_embedding), {"pixels": torch.randn(2, 3, *side)},
                           {"pixels": {0: "batch"}}, ["vector"]),
            "text": Graph(Part(m.model, text_embedding), {"ids": ids, "mask": torch.ones_like(ids)},
                          {"ids": rows, "mask": rows}, ["vector"], {"tokens": most}, {"tokens": 2})}


def read_size(processor: CLIPImageProcessor) -> tuple[int, int]:
    """Height and width that the picture tower reads. Raises ValueError where pictures keep their own."""
    size = processor.crop_size if processor.do_center_crop else processor.size if processor.do_resize else {}
    if "height" not in size:
        raise ValueError("preprocessor_config.json: neither crop_size nor size fixes height and width")
    return size["height"], size["width"]


def picture_rules(p: CLIPImageProcessor) -> dict[str, Any]:
    """What happens to a picture before the graph sees it, in this order."""
    if not (p.do_convert_rgb and p.do_rescale and p.do_normalize):
        raise ValueError("preprocessor_config.json: pictures that stay as they are (do_convert_rgb, "
                         "do_rescale, do_normalize = false) are not exported")
    return {"alpha": p.alpha, "resize": p.size if p.do_resize else None,
            "resample": {2: "bilinear", 3: "bicubic"}[p.resample],
            "crop": p.crop_size if p.do_center_crop else None, "crop_rounding": p.crop_rounding,
            "scale": p.rescale_factor, "mean": list(p.image_mean), "deviation": list(p.image_std)}


@torch.no_grad()
def golden_vectors(m: ImageTextModel, graphs: dict[str, Graph]) -> dict[str, Tensor]:
    """A picture of noise and slopes, some texts, and what becomes of them."""
    H, W = GOLDEN_PICTURE
    slope = torch.linspace(0, 200, W).expand(3, H, W) + torch.tensor([0.0, 20, 40])[:, None, None]
    noise = torch.randint(16, (3, H, W), generator=torch.Generator().manual_seed(0))
    picture = (slope + noise).clamp(0, 255).to(torch.uint8)
    vectors = {"picture": picture.permute(1, 2, 0), "image.pixels": m.processor(picture).pixel_values}
    ids, mask = m.tokens(texts_of(m))
    vectors |= {"text.ids": ids, "text.mask": mask}
    for name, graph in graphs.items():
        inputs = [vectors[f"{name}.{key}"] for key in graph.inputs]
        vectors[f"{name}.vector"] = outputs_of(graph, inputs)[0]
    vectors["similarity"] = vectors["image.vector"] @ vectors["text.vector"].T
    return vectors


def texts_of(m: ImageTextModel) -> list[str]:
    """The golden texts: some captions of training, and some of any model."""
    return [*m.captions[:5], *GOLDEN_TEXTS]


def export(m: ImageTextModel, format: str, folder: Path, say: Progress) -> None:
    """Fills a folder."""
    exact, report = m, {}
    if format == "int8":
        m = copy.deepcopy(m)
        m.model, kept = with_int8(m.model)
    graphs = graphs_of(m)
    vectors = golden_vectors(m, graphs)
    if format == "int8":
        report = {"int8": int8_report(graphs_of(exact), graphs, vectors, {"model": kept})}
    say("golden vectors")
    written = write_graphs(graphs, format, folder, vectors, say)
    write_json(folder / "pipeline.json", {
        "kind": "picture and text to similarity", "format": format,
        **({} if format in OF_TORCH else {"opset": OPSET}), "graphs": written, "size": read_size(m.processor),
        "picture": picture_rules(m.processor),
        "tokenizers": [token_rules(m.tokenizer, folder / "tokenizer", fill=False)],
        "logit_scale": m.model.logit_scale.exp().item(), "captions": m.captions,
        "golden": {"texts": texts_of(m), "tolerance": TOLERANCE}, **report})
    save_golden(folder, vectors)
    write_beside(folder, format, EMBED)


# --------------------------------------------------------------------------------------------------- command


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; a mistake in it exits with status 2."""
    parser = argparse.ArgumentParser("python -m miniclip.export", description="A CLIP that runs without "
                                     "PyTorch: graphs, tokenizer, rules for pictures, golden vectors, a "
                                     "runner.")
    parser.add_argument("--model", required=True, metavar="PATH",
                        help="a run of train_clip, a folder of transformers, or one file (OpenAI, OpenCLIP)")
    parser.add_argument("--name", help="of an OpenCLIP file, such as ViT-B-32-quickgelu")
    parser.add_argument("--tokenizer", metavar="PATH",
                        help="of a single file: a tokenizer's folder, or bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FORMATS)} (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that is not there, or empty")
    return parser.parse_args(argv)


def open_model(path: str, name: str | None, tokenizer: str | None) -> ImageTextModel:
    """Any CLIP with both towers, its tokenizer and how it takes pictures."""
    if Path(path).is_dir():
        inside = Path(path) / "model"                       # of a run
        return ImageTextModel.load(inside if (inside / "config.json").is_file() else path)
    model = load(path, name)
    if tokenizer is None:
        raise ValueError(f"{path}: a single file holds no tokenizer, so --tokenizer is needed")
    if not hasattr(model, "logit_scale"):
        raise ValueError(f"{path}: {type(model).__name__} is one tower; a model of both is needed")
    read = CLIPTokenizer.from_pretrained if Path(tokenizer).is_dir() else CLIPTokenizer.from_bpe_file
    vision = model.config.vision_config if hasattr(model.config, "vision_config") else model.config
    processor = CLIPImageProcessor.openai(getattr(vision, "image_size", 224))
    return ImageTextModel(model, read(tokenizer), processor, []).eval()


def write(a: argparse.Namespace) -> None:
    """Checks, loads, exports."""
    check_format(a.format)
    say = Progress()
    with new_folder(a.out) as folder:
        model = open_model(a.model, a.name, a.tokenizer)
        say(f"{a.model} is loaded")
        export(model, a.format, folder, say)
    say(f"done: {a.out}/README.md says what is there")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 after a mistake of the user."""
    a = arguments(argv)
    return run("export", lambda: write(a), (ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
