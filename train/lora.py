"""LoRA: a large model learns something new in a small file, which diffusers' load_lora_weights reads.

    python -m train.lora --model FOLDER --lora FILE --out FOLDER        puts such a file into a model's weights

Read after parallel.py. Paper: Hu 2021, section 4.1: W stays, W + B A learns, A [r, in] random and B [out, r] zero at
first. Mirrors: peft's lora/layer.py, and the file layout of diffusers' save_lora_weights.
Shapes: r rank, in and out the widths of a projection.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from miniclip.weights import WeightsError, load_file, save_file, write_json
from minidiff.pipeline import StableDiffusionPipeline
from train.common import UserError, flag, make_folder, parse_flags, run

PROJECTIONS = re.compile(r"attn[12]\.to_(q|k|v|out\.0)$")       # of the UNet's attention, as diffusers' trainer takes
CLIP_PROJECTIONS = re.compile(r"self_attn\.(q|k|v|out)_proj$")   # of CLIP's transformers
FILE = "pytorch_lora_weights.safetensors"                       # the name that load_lora_weights looks for
PEFT_FILE, PEFT = "adapter_model.safetensors", "base_model.model"      # what peft calls it, and puts before each key


class LoRALinear(nn.Linear):
    """W x + b + scale * B A x, around the very weights of `base`, under the same keys."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight + self.scale * self.lora_B.weight @ self.lora_A.weight, False)
        linear.bias = self.bias
        return linear


def check_lora(rank: int, alpha: float, init: str) -> None:
    if rank < 0 or (rank and not init):
        raise UserError(f"--lora {rank}: a rank above 0, beside an --init that it builds on")
    if alpha and not rank:
        raise UserError(f"--lora-alpha {alpha}: means nothing without --lora")


def add_lora(model: nn.Module, rank: int, alpha: float, projections: re.Pattern = PROJECTIONS) -> None:
    """Every attention projection learns by LoRA, and nothing else does. alpha / rank is the scale of what it adds."""
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and projections.search(name)]
    if not found:
        raise UserError(f"--lora {rank}: this model has no attention projections ({projections.pattern})")
    for name, module in found:
        put(model, name, LoRALinear(module, rank, alpha / rank))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """model.set_submodule, which torch 2.4 does not have yet."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@contextlib.contextmanager
def merged(unet: nn.Module) -> Iterator[None]:
    """Within, the model is an ordinary one with what LoRA learned in its weights; without LoRA nothing happens."""
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, LoRALinear)}
    for name, layer in layers.items():
        put(unet, name, layer.merged())
    try:
        yield
    finally:
        for name, layer in layers.items():
            put(unet, name, layer)


def save_lora(model: nn.Module, path: Path, prefix: str = "unet") -> None:
    """Keys `unet.<projection>.lora_A.weight` and `lora_B`, the scale inside B, so that every reader's default fits."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{prefix}.{name}.lora_A.weight"] = module.lora_A.weight.detach()
            tensors[f"{prefix}.{name}.lora_B.weight"] = module.lora_B.weight.detach() * module.scale
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})


def save_adapter(model: nn.Module, folder: Path, rank: int) -> None:
    """A folder that peft's PeftModel.from_pretrained reads, for transformers' CLIPModel."""
    save_lora(model, folder / PEFT_FILE, PEFT)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": rank, "lora_alpha": rank,
                                                "target_modules": ".*" + CLIP_PROJECTIONS.pattern})


@torch.no_grad()
def merge_lora(model: nn.Module, path: Path, scale: float = 1.0, prefix: str = "unet") -> None:
    """Adds scale * B A of a file to the projections that it names. Raises WeightsError for what does not fit."""
    tensors = {re.sub(r"lora\.(down|up)", older_name, key): value for key, value in load_file(path).items()}
    names = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    linears = {f"{prefix}.{name}": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        pair = [tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB"]
        if name not in linears or any(part is None or part.ndim != 2 for part in pair):
            raise WeightsError(f"{path}: {name!r} is not LoRA's A and B of a linear layer of this model")
        weight, (A, B) = linears[name].weight, (part.to(linears[name].weight) for part in pair)
        if (B.shape[0], A.shape[1]) != tuple(weight.shape) or A.shape[0] != B.shape[1]:
            raise WeightsError(f"{path}: {name!r} is {list(B.shape)} times {list(A.shape)}, the layer {list(weight.shape)}")
        weight += scale * B @ A
    if tensors:
        raise WeightsError(f"{path}: {next(iter(tensors))!r} and {len(tensors) - 1} more are nothing that LoRA knows here")


def older_name(match: re.Match) -> str:
    return {"down": "lora_A", "up": "lora_B"}[match[1]]


@dataclass(frozen=True)
class MergeConfig:
    model: str = flag("", "model folder with model_index.json")
    lora: str = flag("", f"LoRA file, such as {FILE}")
    scale: float = flag(1.0, "how much of it; 0 is nothing")
    out: str = flag("", "model folder to write")


def main(cfg: MergeConfig) -> None:
    for name in ("model", "lora", "out"):
        if not getattr(cfg, name):
            raise UserError(f"--{name}: is needed")
    pipe = StableDiffusionPipeline.from_pretrained(cfg.model)
    merge_lora(pipe.unet, Path(cfg.lora), cfg.scale)
    pipe.save_pretrained(make_folder(cfg.out))
    print(f"{cfg.out}: {cfg.model} with {cfg.lora} in its weights")


if __name__ == "__main__":
    run(lambda: main(parse_flags(MergeConfig, __doc__.split("\n\n")[0])))
