"""The two towers of a CLIP in training: which of them learn, remember their activations, compile,
or are sharded.

Read beside train_clip.py, which calls all of it before and in its loop.
Papers: Chen 2016 (recomputed activations), Zhai 2022 (LiT: a locked image tower).
"""

from __future__ import annotations

from torch import nn

from miniclip.bert import BertLayer
from miniclip.image_text import ImageTextModel
from miniclip.model import CLIPEncoderLayer

from .errors import UserError

TOWERS = {"image": ("vision_model", "visual", "image_encoder"), "text": ("text_model", "text_encoder"),
          "none": ()}


def tower_modules(model: ImageTextModel, side: str) -> list[nn.Module]:
    """All modules of the image or the text tower; its projection is not part of it."""
    towers = [getattr(model.model, name) for name in TOWERS[side] if hasattr(model.model, name)]
    return [module for tower in towers for module in tower.modules()]


def enable_checkpointing(model: ImageTextModel, on: bool) -> None:
    """Transformers keep only what enters their blocks;
    a ResNet keeps all, as its batch norms must not see it twice."""
    blocks = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if on and not blocks:
        raise UserError("--gradient-checkpointing: this model has no transformer that can compute twice")
    for module in blocks:
        module.gradient_checkpointing = on


def compile_towers(model: ImageTextModel) -> None:
    """In place, so that the keys of the weights stay; each tower compiles when it is first called."""
    for side in ("image", "text"):
        tower, *inside = tower_modules(model, side)
        # a ModuleDict is never called
        (inside[0] if isinstance(tower, nn.ModuleDict) else tower).compile()


def set_training(model: ImageTextModel, lock: str) -> None:
    """Train mode, but for a locked tower: its batch norms keep their statistics, its dropout stays off.

    So do batch norms whose weights are frozen one by one.
    """
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.requires_grad]
    for module in [*norms, *tower_modules(model, lock)]:
        module.training = False


def modules_to_shard(model: ImageTextModel) -> list[nn.Module]:
    """For FSDP, from the inside out: all but the temperature and SigLIP's bias, two numbers."""
    blocks = [m for m in model.model.modules() if isinstance(m, (CLIPEncoderLayer, BertLayer))]
    return [*blocks, *model.model.children()]
