"""The parts that match pictures and texts, held together: a CLIP model, its tokenizer, how pictures enter it.

Read after miniclip, before train_clip.py and search.py, which share it.
Papers: Radford et al. 2021 (CLIP). Mirrors transformers' CLIPModel with CLIPProcessor: a saved vision transformer
with its tokenizer opens there.
Shapes: N pictures or texts, S picture size, E width of the shared space, T text tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miniclip import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    SimpleCLIPConfig,
    SimpleCLIPModel,
)
from miniclip.convert import load
from miniclip.model import normalize
from miniclip.weights import WeightsError, read_json, write_json


class Matcher(nn.Module):
    """Pictures are float32 [N, 3, S, S] in -1..1, as data.folder reads them."""

    def __init__(self, model: nn.Module, tokenizer: CLIPTokenizer | BertTokenizer, processor: CLIPImageProcessor,
                 captions: list[str], spellings: list[list[str]] | None = None):
        super().__init__()
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.captions = captions    # the distinct ones of training, in order: what a picture can be named
        self.spellings = spellings or []    # those that name one thing, such as 薑, 姜 and ginger root

    @property
    def size(self) -> int:
        return self.processor.size.get("shortest_edge") or self.processor.size["height"]

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, E] of length 1."""
        mean, std = (torch.tensor(v, device=pictures.device)[:, None, None]
                     for v in (self.processor.image_mean, self.processor.image_std))
        pixels = ((pictures + 1) / 2 - mean) / std
        if hasattr(self.model, "encode_image"):
            return self.model.encode_image(pixels)
        return normalize(self.model.get_image_features(pixels).pooler_output)

    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[N, T] -> [N, E] of length 1."""
        if hasattr(self.model, "encode_text"):
            return self.model.encode_text(input_ids, attention_mask)
        return normalize(self.model.get_text_features(input_ids, attention_mask).pooler_output)

    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [N, T]; too long a text is cut."""
        out = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return out.input_ids.to(self.device), out.attention_mask.to(self.device)

    def warn_long(self, texts: list[str]) -> None:
        """Says on stderr which texts lose their end because the model reads no more tokens."""
        most = self.tokenizer.model_max_length
        for text in texts:
            if (n := len(self.tokenizer.encode(text))) > most:
                print(f"warning: {text[:60]!r} takes {n} tokens, the model reads {most}; the rest is cut", file=sys.stderr)

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor, batch: int = 256) -> Tensor:
        """encode_pictures for any number, in eval mode, on the CPU: [N, E]."""
        self.eval()
        return torch.cat([self.encode_pictures(p.to(self.device)).cpu() for p in pictures.split(batch)])

    @torch.no_grad()
    def embed_texts(self, texts: list[str], batch: int = 256) -> Tensor:
        self.eval()
        parts = [texts[i:i + batch] for i in range(0, len(texts), batch)]
        return torch.cat([self.encode_tokens(*self.tokens(part)).cpu() for part in parts])

    def save(self, folder: str | Path) -> None:
        """A model folder with its tokenizer and picture settings, and matcher.json, which is ours."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_json(Path(folder) / "matcher.json", {"captions": self.captions, "spellings": self.spellings})

    @classmethod
    def load(cls, folder: str | Path) -> Matcher:
        """Any CLIP folder; without matcher.json it has no captions, and older ones tell of no spellings.

        Raises WeightsError, ConfigError.
        """
        folder = Path(folder)
        model = load(folder)
        if not hasattr(model, "logit_scale"):
            raise WeightsError(f"{folder}: {type(model).__name__} is one tower; a model of both is needed")
        kind = BertTokenizer if (folder / "vocab.txt").exists() else CLIPTokenizer
        own = read_json(folder / "matcher.json") if (folder / "matcher.json").exists() else {"captions": []}
        captions = own.get("captions")
        spellings = own.get("spellings", [])
        if not _texts(captions):
            raise WeightsError(f"{folder / 'matcher.json'}: captions is not a list of texts")
        if not isinstance(spellings, list) or not all(map(_texts, spellings)):
            raise WeightsError(f"{folder / 'matcher.json'}: spellings is not a list of lists of texts")
        processor = CLIPImageProcessor.from_pretrained(folder)
        return cls(model, kind.from_pretrained(folder), processor, captions, spellings).eval()


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def find_spellings(columns: list[list[str]]) -> list[list[str]]:
    """Of captions, a list of N for each column, those that stand beside each other at the very same pictures.

    A caption of more pictures (of a kind of herb, say, beside the herb's name) is no spelling of another.
    """
    places: dict[str, set[int]] = {}
    for column in columns:
        for i, caption in enumerate(column):
            places.setdefault(caption, set()).add(i)
    groups: dict[tuple[int, ...], list[str]] = {}
    for caption, rows in places.items():
        groups.setdefault(tuple(sorted(rows)), []).append(caption)
    return [group for group in groups.values() if len(group) > 1]


class Preset(NamedTuple):
    """A size of model. tower: "resnet" learns a few pictures quickest, "vit" is CLIP's own."""

    tower: str
    width: int              # of the stem, or of the vision transformer
    layers: tuple[int, ...]  # blocks a stage, or one number
    patch: int              # of the vision transformer
    text_width: int
    text_layers: int
    projection: int


PRESETS = {
    "tiny": Preset("resnet", 16, (1, 1, 1, 1), 0, 128, 2, 128),
    "small": Preset("resnet", 32, (1, 1, 1, 1), 0, 256, 2, 256),
    "vit-tiny": Preset("vit", 128, (4,), 8, 128, 2, 128),
    "vit-small": Preset("vit", 256, (6,), 8, 256, 4, 256),
    "resnet50": Preset("resnet", 64, (3, 4, 6, 3), 0, 512, 6, 256),
    "vit-b-32": Preset("vit", 768, (12,), 32, 512, 12, 512),
}


def build_matcher(preset: Preset, size: int, captions: list[str]) -> Matcher:
    """A fresh matcher: a tokenizer learnt from the captions, both towers with random weights."""
    distinct = list(dict.fromkeys(captions))
    words = [word for caption in distinct for word in caption.split()]
    tokenizer = CLIPTokenizer.train(distinct + words, vocab_size=4096)
    longest = max(len(tokenizer.encode(caption)) for caption in distinct)
    tokenizer.model_max_length = min(77, longest + 16)      # room for longer questions than any caption
    text = CLIPTextConfig.for_tokenizer(
        tokenizer, hidden_size=preset.text_width, intermediate_size=4 * preset.text_width, hidden_act="gelu",
        num_hidden_layers=preset.text_layers, num_attention_heads=max(1, preset.text_width // 64))
    half = (0.5, 0.5, 0.5)
    processor = CLIPImageProcessor(size=size, crop_size=size, image_mean=half, image_std=half)
    if preset.tower == "resnet":
        model: nn.Module = SimpleCLIPModel(SimpleCLIPConfig(
            text_config=text, image_layers=preset.layers, image_width=preset.width, projection_dim=preset.projection))
        return Matcher(model, tokenizer, processor, distinct)
    vision = dict(hidden_size=preset.width, intermediate_size=4 * preset.width, num_hidden_layers=preset.layers[0],
                  num_attention_heads=max(1, preset.width // 64), image_size=size, patch_size=preset.patch,
                  hidden_act="gelu")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=preset.projection))
    return Matcher(model, tokenizer, processor, distinct)
