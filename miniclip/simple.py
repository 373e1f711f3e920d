"""The tutorial's CLIP: a ResNet-50, a text transformer, two projection heads; `loss = model(batch)`.

Read after resnet.py, bert.py and loss.py.
Papers: Radford et al. 2021; He et al. 2016. The layout is that of github.com/moein-shariatnia/OpenAI-CLIP.
Mirrors: its CLIP.py and modules.py, with their checkpoint keys; not its loss, which lets all vectors become
alike.
Shapes: B pairs, S tokens, E shared width (256).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.bert import DistilBertConfig, DistilBertTower
from miniclip.config import (
    CLIPTextConfig,
    Config,
    ConfigError,
    Fraction,
    Real,
    Stages,
    Width,
    read_tower,
)
from miniclip.files import shown
from miniclip.loss import contrastive_loss, same_captions
from miniclip.model import CLIPTextTransformer, normalize
from miniclip.resnet import ResNet
from miniclip.weights import ModelFolder

# of the pictures ResNets are trained on
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False, repr=False)
class SimpleCLIPConfig(Config):
    """text_encoder "clip": CLIP's text transformer on your own tokenizer;
    "distilbert": as the tutorial has it."""

    text_encoder: str = "clip"
    # of CLIPTextConfig or DistilBertConfig; a dict or the config
    text_config: Any = field(default_factory=dict)
    # ResNet-50; (1, 1, 1, 1) learns a handful of pictures much faster
    image_layers: Stages = (3, 4, 6, 3)
    image_width: Width = 64
    projection_dim: Width = 256  # E
    dropout: Fraction = 0.1
    logit_scale_init_value: Real = math.log(1 / 0.07)

    inert: ClassVar[dict[str, tuple]] = {"model_type": ("simple_clip",)}
    metadata: ClassVar[frozenset[str]] = frozenset({"architectures", "torch_dtype"})

    def check(self) -> None:
        """The text encoder exists; its config is of its kind."""
        kinds = {"clip": CLIPTextConfig, "distilbert": DistilBertConfig}
        if self.text_encoder not in kinds:
            raise ConfigError(f"text_encoder = {shown(self.text_encoder)} is not one of {', '.join(kinds)}")
        kind = kinds[self.text_encoder]
        if not isinstance(self.text_config, kind):
            object.__setattr__(self, "text_config", read_tower(kind, self.text_config, None, "text_config"))


class ProjectionHead(nn.Module):
    """[B, D] -> [B, E]: a linear map, then a residual GELU layer, normed."""

    def __init__(self, D: int, E: int, dropout: float):
        super().__init__()
        self.projection = nn.Linear(D, E)
        self.fc = nn.Linear(E, E)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(E)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, E], not normalised to length 1."""
        x = self.projection(x)
        return self.layer_norm(self.dropout(self.fc(F.gelu(x))) + x)


class SimpleCLIPModel(ModelFolder, nn.Module):
    """`loss = model(batch)` trains; `encode_image` and `encode_text` answer.
    In eval mode for answers: batch norm.

    batch: "image" [B, 3, H, W], "input_ids" [B, S], perhaps "attention_mask" [B,
    S] and "id" [B]: equal ids mark pairs of one picture or caption, which count as positives.
    Without "id" equal captions are found.
    """

    config_class = SimpleCLIPConfig
    weights_stem = "model"
    ignored_keys = ("position_ids",)

    def __init__(self, config: SimpleCLIPConfig | None = None):
        super().__init__()
        self.config = config = config or SimpleCLIPConfig()
        text = config.text_config
        tower = CLIPTextTransformer(text) if config.text_encoder == "clip" else DistilBertTower(text)
        resnet = ResNet(config.image_layers, config.image_width)
        self.image_encoder = nn.ModuleDict({"model": resnet})                 # ".model" is in the keys
        self.text_encoder = nn.ModuleDict({"model": tower})
        self.image_projection = ProjectionHead(resnet.features, config.projection_dim, config.dropout)
        self.text_projection = ProjectionHead(text.hidden_size, config.projection_dim, config.dropout)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, E] of length 1."""
        return normalize(self.image_projection(self.image_encoder["model"](image)))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, S] -> [B, E] of length 1."""
        pooled = self.text_encoder["model"](input_ids, attention_mask).pooler_output
        return normalize(self.text_projection(pooled))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The contrastive loss of a batch, a scalar. Its floor is 0; ln B means that nothing is learned."""
        images = self.encode_image(batch["image"])                            # [B, E]
        texts = self.encode_text(batch["input_ids"], batch.get("attention_mask"))  # [B, E]
        labels = batch["id"] if "id" in batch else same_captions(batch["input_ids"])
        return contrastive_loss(texts @ images.T * self.logit_scale.exp(), labels)

    def convert_keys(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tutorial's files have no logit_scale: its temperature is the constant 1."""
        return {"logit_scale": torch.zeros(()), **state_dict}

    def export_config(self) -> dict[str, Any]:
        """config.json. The model_type is ours: transformers does not know it."""
        return {"architectures": ["SimpleCLIPModel"], "model_type": "simple_clip", **self.config.to_dict()}
