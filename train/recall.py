"""Is a CLIP learning? R@k of trained and held-out images, the similarity matrix, and what the loss is worth.

Read after train_clip.py. Shapes: N images, M captions, E shared width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.image_text import ImageTextModel
from miniclip.loss import COLLAPSED
from miniclip.retrieval import scores_both_ways

from .data.grid import save_image
from .data.pairs import Pairs

MATRIX = 16             # captions and images that the similarity matrix shows
PATIENCE = 50           # steps after the warm-up before that is said


def evaluate(model: ImageTextModel, train: Pairs, test: Pairs, out: Path | None,
             step: int) -> dict[str, float]:
    """R@1 and R@5 both ways, of the trained and of the held-out images,
    and the similarity matrix as a picture.

    Every image against every distinct caption of the first column, trained or not; equal captions all count.
    """
    names = list(dict.fromkeys(train.captions[0] + test.captions[0]))
    texts = model.embed_texts(names)                                                # [M, E]
    scores = {}
    for prefix, pairs in (("", train), ("held_out_", test)):
        if not pairs.files:
            continue
        similarity = model.embed_images(pairs.images) @ texts.T                     # [N, M]
        answer = torch.tensor([names.index(c) for c in pairs.captions[0]])
        relevant = answer[:, None] == torch.arange(len(names))
        scores |= {prefix + name: value for name, value in scores_both_ways(similarity, relevant).items()}
        if out is not None:
            draw_matrix(similarity, pairs, names, out / "matrix" / f"{prefix}{step:06d}.png")
    return scores


def mean_recall(scores: dict[str, float]) -> float:
    """What the best checkpoint is the best in: R@1 of both ways, of the images held out if there are any."""
    prefix = "held_out_" if "held_out_image_to_text_R@1" in scores else ""
    return (scores[f"{prefix}image_to_text_R@1"] + scores[f"{prefix}text_to_image_R@1"]) / 2


def verdict(step: int, scores: dict[str, float], loss: float, collapse_loss: float, cfg: Any) -> str:
    """One line: the loss beside what it is worth, and a warning where it sits at the value of equal
    embeddings."""
    parts = [f"step {step}:" + ("" if math.isnan(loss) else f" loss {loss:.3f},")]
    for prefix, name in (("", "R@1"), ("held_out_", "held out R@1")):
        if prefix + "image_to_text_R@1" in scores:
            one, other = scores[prefix + "image_to_text_R@1"], scores[prefix + "text_to_image_R@1"]
            ways = ("image_to_text", "text_to_image")
            by_chance = dict.fromkeys(f"{scores[f'{prefix}{way}_chance']:.3f}" for way in ways)
            parts.append(f"{name} picture to name {one:.3f}, name to picture {other:.3f} "
                         f"(chance {' and '.join(by_chance)})")
    if stuck(step, loss, collapse_loss, cfg):
        distinct = "" if collapse_loss > math.log(cfg.batch) - 1e-6 \
            else f", {math.exp(collapse_loss):.0f} different captions a batch"
        parts.append(f"NOT LEARNING: the loss sits at {collapse_loss:.3f}, which is ln(batch){distinct}: "
                     "all vectors are alike")
    return "  ".join(parts)


def stuck(step: int, loss: float, collapse_loss: float, cfg: Any) -> bool:
    """Whether an InfoNCE loss still is what equal embeddings give, well after the warm-up."""
    return cfg.loss == "infonce" and step >= cfg.warmup + PATIENCE and loss > COLLAPSED * collapse_loss


def draw_matrix(similarity: Tensor, pairs: Pairs, names: list[str], path: Path, most: int = MATRIX) -> None:
    """The similarity matrix as a PNG: images along the top, a row for each caption, dark where they match.

    At most `most` captions and images are drawn, those of the first captions.
    """
    shown = [i for i, c in enumerate(pairs.captions[0]) if c in names[:most]][:most]
    cell = max(24, min(64, 640 // len(shown)))                                      # pixels
    values = similarity[shown][:, :most].T.clamp(-1, 1)                             # [M, N]
    # white is 1: dark where alike
    heat = (values[:, :, None, None] * -1).expand(-1, -1, cell, cell)
    heat = heat.permute(0, 2, 1, 3).reshape(1, values.shape[0] * cell, len(shown) * cell).expand(3, -1, -1)
    small = F.interpolate(pairs.images[shown], size=(cell, cell), mode="bilinear", antialias=True)
    top = small.permute(1, 2, 0, 3).reshape(3, cell, len(shown) * cell)
    save_image(torch.cat([top, heat], dim=1), path)
