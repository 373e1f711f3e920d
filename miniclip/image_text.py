"""ImageTextModel: a CLIP, its tokenizer and how images enter it, in one module.
Its forward is the training loss.

Read after model.py, loss.py, tokenizer.py and image.py.
Papers: Radford 2021 (CLIP), Zhai 2023 (SigLIP), Gao 2021 (large batches in chunks). Mirrors: transformers'
CLIPModel with CLIPProcessor, which open a saved vision transformer.

    model = ImageTextModel.load("out/herbs/model")          # a run of train.train_clip, or any CLIP folder
    similarity = model.embed_images(images) @ model.embed_texts(["薑", "大蒜"]).T       # [N, 2]

Shapes: B pairs, N images or texts, S image size, T text tokens, E width of the shared space.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from miniclip.config import CLIPConfig, CLIPTextConfig
from miniclip.files import WeightsError, is_texts, read_json, write_json
from miniclip.image import CLIPImageProcessor
from miniclip.loss import cached_backward, contrastive_loss, floor, siglip_loss
from miniclip.model import CLIPModel, normalize
from miniclip.simple import SimpleCLIPConfig, SimpleCLIPModel
from miniclip.tokenizer import CLIPTokenizer
from miniclip.wordpiece import BertTokenizer

FILE = "matcher.json"       # beside the weights: the captions of training
VOCABULARY = 4096           # the most tokens that a fresh tokenizer learns
SPARE_TOKENS = 16           # room for questions longer than any caption
HEAD_WIDTH = 64             # of fresh transformers


class PairLoss(nn.Module):
    """InfoNCE or SigLIP over the pairs of a whole batch.

    kind: "infonce" (Radford 2021) or "siglip" (Zhai 2023, which alone learns `logit_bias`).
    """

    def __init__(self, kind: str = "infonce"):
        super().__init__()
        if kind not in ("infonce", "siglip"):
            raise ValueError(f"loss {kind!r} is not infonce or siglip")
        self.kind = kind
        self.logit_bias = nn.Parameter(torch.tensor(-10.0), requires_grad=kind == "siglip")

    def forward(self, images: Tensor, texts: Tensor, labels: Tensor, logit_scale: Tensor) -> Tensor:
        """images, texts [B, E] of length 1; labels [B], equal for equal captions,
        which count as positives."""
        if self.kind == "siglip":
            return siglip_loss(texts @ images.T, logit_scale, self.logit_bias, labels)
        return contrastive_loss(texts @ images.T * logit_scale.exp(), labels)

    def floor(self, labels: Tensor) -> float:
        """The least value that the loss can have for these labels [B]."""
        return floor(labels, len(labels)) if self.kind == "infonce" else 0.0


class ImageTextModel(nn.Module):
    """Images are float32 [N, 3, S, S] in [-1, 1]; embeddings have length 1.

    model: a CLIP of any family; captions: the distinct ones of training, in order,
    which an image can be named with.
    """

    def __init__(self, model: nn.Module, tokenizer: CLIPTokenizer | BertTokenizer,
                 processor: CLIPImageProcessor,
                 captions: list[str], loss: str = "infonce", spellings: list[list[str]] | None = None):
        super().__init__()
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.captions, self.spellings = captions, spellings or []
        self.criterion = PairLoss(loss)
        # rows of other processes; see train/run
        self.gather: Callable[[Tensor], Tensor] = lambda rows: rows

    @property
    def size(self) -> int:
        """S, in pixels."""
        return self.processor.size.get("shortest_edge") or self.processor.size["height"]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device

    # ---- training

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar. images [B, 3, S, S], input_ids and attention_mask [B, T], labels [B].

        With several processes the first three are this process's rows, `gather` brings the embeddings of all
        together, and labels are those of the whole batch.
        """
        images, texts = self.encode_images(images), self.encode_tokens(input_ids, attention_mask)
        return self.loss_of(images, texts, labels)

    def loss_of(self, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings [B, E]."""
        return self.criterion(self.gather(images), self.gather(texts), labels, self.model.logit_scale)

    def backward_in_chunks(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor,
                           chunk: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
        """Gradients of scale(loss), with `chunk` pairs in memory at a time; returns scale(loss), detached."""
        encoders, inputs = (self.encode_images, self.encode_tokens), ((images,), (input_ids, attention_mask))
        return cached_backward(encoders, inputs, lambda *embeddings: scale(self.loss_of(*embeddings, labels)),
                               chunk)

    # ---- the towers

    def encode_images(self, images: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, E]."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None]
                     for v in (self.processor.image_mean, self.processor.image_std))
        pixels = ((images + 1) / 2 - mean) / std
        if hasattr(self.model, "encode_image"):
            return self.model.encode_image(pixels)
        return normalize(self.model.get_image_features(pixels).pooler_output)

    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[N, T] -> [N, E]."""
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
                print(f"warning: {text[:60]!r} takes {n} tokens, the model reads {most}; the rest is cut",
                      file=sys.stderr)

    @torch.no_grad()
    def embed_images(self, images: Tensor, batch: int = 256) -> Tensor:
        """encode_images for any number, in eval mode, on the CPU: [N, E]."""
        self.eval()
        return torch.cat([self.encode_images(part.to(self.device)).cpu() for part in images.split(batch)])

    @torch.no_grad()
    def embed_texts(self, texts: list[str], batch: int = 256) -> Tensor:
        """Any number of texts, in eval mode, on the CPU: [N, E]."""
        self.eval()
        parts = [texts[i:i + batch] for i in range(0, len(texts), batch)]
        return torch.cat([self.encode_tokens(*self.tokens(part)).cpu() for part in parts])

    # ---- files

    def save(self, folder: str | Path) -> None:
        """A model folder with its tokenizer and image settings, and matcher.json, which is ours."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_json(Path(folder) / FILE, {"captions": self.captions, "spellings": self.spellings})

    @classmethod
    def load(cls, folder: str | Path, loss: str = "infonce") -> ImageTextModel:
        """Any CLIP folder; without matcher.json it has no captions. Raises WeightsError, ConfigError."""
        from miniclip.convert import load  # a command as well, which must not be imported with the package

        folder = Path(folder)
        model = load(folder)
        if not hasattr(model, "logit_scale"):
            raise WeightsError(f"{folder}: {type(model).__name__} is one tower; a model of both is needed")
        kind = BertTokenizer if (folder / "vocab.txt").exists() else CLIPTokenizer
        captions, spellings = read_captions(folder / FILE)
        processor = CLIPImageProcessor.from_pretrained(folder)
        return cls(model, kind.from_pretrained(folder), processor, captions, loss, spellings).eval()


def read_captions(path: Path) -> tuple[list[str], list[list[str]]]:
    """Captions and spellings of a model folder; none without the file, and older files have no spellings."""
    own = read_json(path) if path.exists() else {"captions": []}
    captions, spellings = own.get("captions"), own.get("spellings", [])
    if not is_texts(captions):
        raise WeightsError(f"{path}: captions is not a list of texts")
    if not isinstance(spellings, list) or not all(map(is_texts, spellings)):
        raise WeightsError(f"{path}: spellings is not a list of lists of texts")
    return captions, spellings


def find_spellings(columns: list[list[str]]) -> list[list[str]]:
    """Of captions, a list of N for each column, those that stand beside each other at the very same images.

    A caption of more images (of a kind of herb, say, beside the herb's name) is no spelling of another.
    """
    places: dict[str, set[int]] = {}
    for column in columns:
        for i, caption in enumerate(column):
            places.setdefault(caption, set()).add(i)
    groups: dict[tuple[int, ...], list[str]] = {}
    for caption, rows in places.items():
        groups.setdefault(tuple(sorted(rows)), []).append(caption)
    return [group for group in groups.values() if len(group) > 1]


# ----------------------------------------------------------------------------------------------- fresh models


class Preset(NamedTuple):
    """A size of model. tower: "resnet" learns a few images quickest, "vit" is CLIP's own."""

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


def build_image_text(preset: Preset, size: int, captions: list[str], loss: str = "infonce") -> ImageTextModel:
    """A fresh model for images of `size`: a tokenizer trained on the captions,
    both towers with random weights."""
    distinct = list(dict.fromkeys(captions))
    tokenizer = CLIPTokenizer.of_captions(distinct, VOCABULARY, SPARE_TOKENS)
    text = CLIPTextConfig.for_tokenizer(
        tokenizer, hidden_size=preset.text_width, intermediate_size=4 * preset.text_width, hidden_act="gelu",
        num_hidden_layers=preset.text_layers, num_attention_heads=max(1, preset.text_width // HEAD_WIDTH))
    half = (0.5, 0.5, 0.5)
    processor = CLIPImageProcessor(size=size, crop_size=size, image_mean=half, image_std=half)
    if preset.tower == "resnet":
        model: nn.Module = SimpleCLIPModel(SimpleCLIPConfig(
            text_config=text, image_layers=preset.layers, image_width=preset.width,
            projection_dim=preset.projection))
        return ImageTextModel(model, tokenizer, processor, distinct, loss)
    vision = dict(hidden_size=preset.width, intermediate_size=4 * preset.width,
                  num_hidden_layers=preset.layers[0],
                  num_attention_heads=max(1, preset.width // HEAD_WIDTH), image_size=size,
                  patch_size=preset.patch, hidden_act="gelu")
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=preset.projection))
    return ImageTextModel(model, tokenizer, processor, distinct, loss)
