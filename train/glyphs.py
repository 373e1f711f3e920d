"""GlyphClassifier: names the character that a grey image shows, or says that it shows none.

Read before judge.py, which trains it, and evaluate.py, which asks it.
Shapes: N images, 1 channel, 64 x 64, -1 ink .. 1 paper.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.files import atomic_write, is_texts, read_json, shown
from miniclip.weights import load_pickle, load_strict, skip_init

from .errors import UserError
from .run.cli import command

SIZE = 64           # images are resized to this
NONE = "none"       # the name of an image that shows no character
MOST_NAMES, MOST_WIDTH = 100_000, 512       # of a judge's file


class GlyphClassifier(nn.Module):
    """Six convolutions and one linear layer: [N, 1, 64, 64] -> logits [N, names + 1], the last for "none"."""

    def __init__(self, names: list[str], width: int = 24):
        super().__init__()
        self.names, self.width = [*names, NONE], width
        self.body = nn.Sequential(
            *conv(1, width, 2, kernel=5),                       # [N,   w, 32, 32]
            *conv(width, 2 * width, 2),                         # [N,  2w, 16, 16]
            *conv(2 * width, 2 * width, 1),
            *conv(2 * width, 4 * width, 2),                     # [N,  4w,  8,  8]
            *conv(4 * width, 4 * width, 1),
            *conv(4 * width, 6 * width, 2),                     # [N,  6w,  4,  4]
        )
        # flattened, not averaged: where a part stands tells 由 from 甲
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(6 * width * 16, len(self.names)))

    def forward(self, pictures: Tensor) -> Tensor:
        """[N, 1, 64, 64] -> logits [N, names + 1]."""
        return self.head(self.body(pictures))


def conv(c_in: int, c_out: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    """A convolution, batch norm (hence no bias) and ReLU; stride 2 halves height and width."""
    return [nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


@torch.no_grad()
def classify_images(model: GlyphClassifier, pictures: Tensor) -> tuple[list[str], Tensor]:
    """Pictures [N, 1, H, W] in -1..1, ink black -> N names ("none": no character), probabilities [N]."""
    model.eval()
    pictures = pictures.to(model.head[-1].weight).clamp(-1, 1)      # its device and type
    if pictures.shape[-2:] != (SIZE, SIZE):
        pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    probabilities = torch.cat([model(part).softmax(1) for part in pictures.split(256)])
    best, index = probabilities.max(1)
    return [model.names[i] for i in index.tolist()], best.cpu()


def save_judge(model: GlyphClassifier, out: Path, report: dict) -> None:
    """Leaves judge.pt, the weights, and judge.json: names, width and `report`, what `measure` found."""
    with atomic_write(out / "judge.pt") as file:
        torch.save(model.state_dict(), file)
    config = {"names": model.names[:-1], "width": model.width, "report": report}
    with atomic_write(out / "judge.json") as file:
        file.write(json.dumps(config, ensure_ascii=False, indent=1).encode("utf-8"))


def load_judge(folder) -> GlyphClassifier:
    """A judge that `python -m train.judge --out folder` trained. Raises UserError when there is none, and
    WeightsError for files that are damaged."""
    config, weights = Path(folder) / "judge.json", Path(folder) / "judge.pt"
    try:
        fields, tensors = read_json(config), load_pickle(weights)
    except FileNotFoundError as error:
        raise UserError(f"{error}; train a judge with {command('judge')}") from None
    names, width = fields.get("names"), fields.get("width")
    good = is_texts(names) and len(names) <= MOST_NAMES and type(width) is int and 0 < width <= MOST_WIDTH
    if not good:
        raise UserError(f"{config}: names = {shown(names)}, width = {shown(width)}: at most {MOST_NAMES} "
                        f"texts and a number from 1 to {MOST_WIDTH}")
    with skip_init():
        model = GlyphClassifier(names, width)
    load_strict(model, tensors, str(weights))
    return model.eval()
