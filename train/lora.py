"""LoRA: a large model learns something new in a small file, which diffusers or peft reads.

Read before train_diffusion.py and train_clip.py; merge_lora.py is its command. Paper: Hu 2021, section 4.1: W
stays, W + B A learns, A [r, in] random and B [out, r] zero at first. Mirrors: peft's lora/layer.py, and the
file layouts of diffusers' save_lora_weights (for Stable Diffusion) and of peft's save_pretrained (for CLIP).
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

import torch
from torch import Tensor, nn

from miniclip.weights import WeightsError, load_file, read_json, save_file, write_json

from .errors import UserError

# of the UNet's attention, as diffusers' trainer takes
PROJECTIONS = re.compile(r"attn[12]\.to_(q|k|v|out\.0)$")
CLIP_PROJECTIONS = re.compile(
    # CLIP's transformers; the end of OpenAI's ResNets
    r"(self_attn\.(q|k|v|out)_proj|attnpool\.(q|k|v|c)_proj"
    # BERT, not its mlp; DistilBERT
    r"|attention\.(self\.(query|key|value)|output\.dense|(q|k|v|out)_lin))$")
FILE = "pytorch_lora_weights.safetensors"                       # the name that load_lora_weights looks for
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
        """[..., in] -> [..., out]."""
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary layer that computes the same: weight W + scale * B A, frozen, and the bias itself."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight + self.scale * self.lora_B.weight @ self.lora_A.weight,
                                     False)
        linear.bias = self.bias
        return linear


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


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """model.set_submodule, which torch 2.4 does not have yet."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


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


@torch.no_grad()
def merge_lora(model: nn.Module, path: Path, scale: float = 1.0, prefix: str = "unet",
               rank: int | None = None) -> None:
    """Adds scale * B A of a file to the projections that it names; all are of this rank, if one is given.

    Raises WeightsError for what does not fit.
    """
    tensors = {re.sub(r"lora\.(down|up)", older_name, key): value for key, value in load_file(path).items()}
    names = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    linears = {f"{prefix}.{name}": module
               for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not names:
        raise WeightsError(f"{path}: holds no tensors")
    for name in names:
        A, B = take_pair(tensors, name, linears.get(name), rank, path)
        linears[name].weight.add_(scale * B @ A)
    if tensors:
        raise WeightsError(f"{path}: {next(iter(tensors))!r} and {len(tensors) - 1} more are nothing that "
                           "LoRA knows here")


def take_pair(tensors: dict[str, Tensor], name: str, linear: nn.Linear | None, rank: int | None,
              path: Path) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of one projection, in its dtype; they leave `tensors`. Raises WeightsError."""
    pair = [tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB"]
    if linear is None or any(part is None or part.ndim != 2 for part in pair):
        raise WeightsError(f"{path}: {name!r} is not LoRA's A and B of a linear layer of this model")
    weight, (A, B) = linear.weight, (part.to(linear.weight) for part in pair)
    if (B.shape[0], A.shape[1]) != tuple(weight.shape) or A.shape[0] != B.shape[1]:
        raise WeightsError(f"{path}: {name!r} is {list(B.shape)} times {list(A.shape)}, the layer "
                           f"{list(weight.shape)}")
    if rank not in (None, A.shape[0]):
        raise WeightsError(f"{path}: {name!r} is of rank {A.shape[0]}, but {PEFT_CONFIG} says r = {rank}")
    return A, B


def older_name(match: re.Match) -> str:
    """For lora.down and lora.up of older files: lora_A and lora_B."""
    return {"down": "lora_A", "up": "lora_B"}[match[1]]


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
