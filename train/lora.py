"""LoRA: a large model learns something new in a small file, which diffusers or peft reads.

Read before train_diffusion.py and train_clip.py; the layer itself is minidiff/lora.py's, and merge_lora.py
is the command. Paper: Hu 2021, section 4.1: W stays, W + B A learns, A [r, in] random and B [out, r] zero at
first. Mirrors: the file layouts of diffusers' save_lora_weights (for Stable Diffusion) and of peft's
save_pretrained (for CLIP).
Shapes: r rank, in and out the widths of a projection.
"""

from __future__ import annotations

import contextlib
import math
import re
import reprlib
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from miniclip.weights import WeightsError, read_json, save_file, write_json
from minidiff.lora import LoRALinear, merge_lora, set_submodule

from .errors import UserError

# of the UNet's attention, as diffusers' trainer takes
PROJECTIONS = re.compile(r"attn[12]\.to_(q|k|v|out\.0)$")
CLIP_PROJECTIONS = re.compile(
    # CLIP's transformers; the end of OpenAI's ResNets
    r"(self_attn\.(q|k|v|out)_proj|attnpool\.(q|k|v|c)_proj"
    # BERT, not its mlp; DistilBERT
    r"|attention\.(self\.(query|key|value)|output\.dense|(q|k|v|out)_lin))$")
# what peft calls it, and puts before each key
PEFT_FILE, PEFT = "adapter_model.safetensors", "base_model.model"
PEFT_CONFIG = "adapter_config.json"

# Fields of adapter_config.json, each with the values under which the adapter is alpha / r B A and nothing
# else.
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # pissa and others also change W
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys("use_rslora use_dora use_qalora use_bdlora lora_bias fan_in_fan_out rank_pattern "
                    "alpha_pattern "
                    "layer_replication target_parameters alora_invocation_tokens arrow_config kasa_config "
                    "monteclora_config".split(), (None, False, {}, [])),
}


def add_lora(model: nn.Module, rank: int, alpha: float, projections: re.Pattern = PROJECTIONS) -> None:
    """Every attention projection learns by LoRA, and nothing else does.
    alpha / rank is the scale of what it adds."""
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and projections.search(name)]
    if not found:
        raise UserError(f"--lora {rank}: this model has no attention projections ({projections.pattern})")
    for name, module in found:
        set_submodule(model, name, LoRALinear(module, rank, alpha / rank))


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within, the model is an ordinary one with what LoRA learned in its weights;
    without LoRA nothing happens."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for name, layer in layers.items():
        set_submodule(model, name, layer.merged())
    try:
        yield
    finally:
        for name, layer in layers.items():
            set_submodule(model, name, layer)


def save_lora(model: nn.Module, path: Path, prefix: str = "unet") -> None:
    """Keys `unet.<projection>.lora_A.weight` and `lora_B`, the scale inside B,
    so that every reader's default fits."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{prefix}.{name}.lora_A.weight"] = module.lora_A.weight.detach()
            tensors[f"{prefix}.{name}.lora_B.weight"] = module.lora_B.weight.detach() * module.scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})


def save_adapter(model: nn.Module, folder: Path, rank: int) -> None:
    """A folder that peft's PeftModel.from_pretrained reads,
    for transformers' CLIPModel and ChineseCLIPModel."""
    save_lora(model, folder / PEFT_FILE, PEFT)
    write_json(folder / PEFT_CONFIG, {"peft_type": "LORA", "r": rank, "lora_alpha": rank,
                                      "target_modules": ".*" + CLIP_PROJECTIONS.pattern})


def merge_adapter(model: nn.Module, path: Path, scale: float = 1.0) -> None:
    """Adds scale times what peft adds for this adapter_model.safetensors,
    whose adapter_config.json lies beside it.

    Raises WeightsError for what does not fit.
    """
    rank, alpha = read_adapter(path.parent / PEFT_CONFIG)
    merge_lora(model, path, scale * alpha / rank, PEFT, rank)


def read_adapter(path: Path) -> tuple[int, float]:
    """r and lora_alpha of an adapter_config.json. Raises WeightsError for kinds of LoRA that are more than B
    A."""
    if not path.exists():
        raise WeightsError(f"{path}: is missing; r and lora_alpha stand there, by which B A is scaled")
    config: dict[str, Any] = {"peft_type": None, **read_json(path)}
    for name, plain in PLAIN.items():
        if (value := config.get(name, plain[0])) not in plain:
            raise WeightsError(f"{path}: {name} = {reprlib.repr(value)} is not supported; only plain LoRA "
                               f"is, where it is {plain[0]!r}")
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            raise WeightsError(f"{path}: {name} = {reprlib.repr(value)} is not a positive "
                               f"{'whole number' if kind is int else 'number'}")
    return config["r"], config["lora_alpha"]


if __name__ == "__main__":      # the command was here before it had a file of its own
    runpy.run_module(f"{__package__}.merge_lora", run_name="__main__")
