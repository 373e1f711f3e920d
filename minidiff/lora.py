"""LoRA in a pipeline: a small file changes what a large model draws, and goes again.

Read after pipeline.py, if you use such files; train/lora.py makes them. Paper: Hu 2021, section 4.1: the
weight W stays, and scale * B A is added to it, A [r, in] and B [out, r].
Mirrors: diffusers' loaders/lora_base.py and lora_pipeline.py, for its own file layout.
Shapes: r rank, in and out the widths of a projection.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.files import WeightsError, parse_json, shown
from miniclip.habits import LOADING_IDLE, LOADING_REFUSED, settle
from miniclip.weights import load_file, read_metadata

FILE = "pytorch_lora_weights.safetensors"               # the name that load_lora_weights looks for
LORA_METADATA = "lora_adapter_metadata"                 # where diffusers notes each part's rank and alpha
PARTS = ("unet", "text_encoder", "text_encoder_2")      # the first word of a key
LORA_REFUSED = {"hotswap": "unload_lora_weights, then load the other"}


class LoRALinear(nn.Linear):
    """W x + b + scale * strength * B A x, around the very weights of `base`, under the same keys.

    scale belongs to what was learned (alpha / r); strength is the user's, 1 by default.
    """

    strength = 1.0

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
        return super().forward(x) + self.scale * self.strength * self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary layer that computes the same: weight W + scale * strength * B A, frozen, and the bias
        itself."""
        linear = self.base()
        change = self.scale * self.strength * self.lora_B.weight @ self.lora_A.weight
        linear.weight = nn.Parameter(self.weight + change, False)
        return linear

    def base(self) -> nn.Linear:
        """The layer without LoRA, around the same weights."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """model.set_submodule, which torch 2.4 does not have yet."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# ------------------------------------------------------------------------------------------------------ files


def read_pairs(tensors: dict[str, Tensor], model: nn.Module, prefix: str, source: str,
               rank: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, in] and B [out, r] of each projection that a file's tensors name under `prefix`, in its dtype;
    all are of this rank, if one is given. They leave `tensors`.

    Raises WeightsError for what does not fit the model.
    """
    linears = {f"{prefix}.{name}": module
               for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = sorted({key.rsplit(".lora_", 1)[0] for key in tensors if key.startswith(f"{prefix}.")})
    return {name.removeprefix(f"{prefix}."): take_pair(tensors, name, linears.get(name), rank, source)
            for name in names}


def take_pair(tensors: dict[str, Tensor], name: str, linear: nn.Linear | None, rank: int | None,
              source: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of one projection, in its dtype; they leave `tensors`. Raises WeightsError."""
    pair = [tensors.pop(f"{name}.lora_{side}.weight", None) for side in "AB"]
    if linear is None or any(part is None or part.ndim != 2 for part in pair):
        raise WeightsError(f"{source}: {shown(name)} is not LoRA's A and B of a linear layer of this model")
    if not isinstance(linear.weight, nn.Parameter):
        raise WeightsError(f"{source}: {shown(name)} has weights of int8; load and fuse LoRA before that")
    weight, (A, B) = linear.weight, (part.to(linear.weight) for part in pair)
    if (B.shape[0], A.shape[1]) != tuple(weight.shape) or A.shape[0] != B.shape[1]:
        raise WeightsError(f"{source}: {shown(name)} is {list(B.shape)} times {list(A.shape)}, the layer "
                           f"{list(weight.shape)}")
    if rank not in (None, A.shape[0]):
        raise WeightsError(f"{source}: {shown(name)} is of rank {A.shape[0]}, but its config says r = {rank}")
    return A, B


def modern(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of older files, lora.down and lora.up, as lora_A and lora_B; and a text encoder's as transformers
    4 names its layers: since 5.6 it drops `text_model.`."""
    sides = {"down": "lora_A", "up": "lora_B"}
    prefix = re.compile(r"^(text_encoder(?:_2)?)\.encoder\.")
    keys = [prefix.sub(r"\1.text_model.encoder.", key) for key in tensors]
    keys = [re.sub(r"lora\.(down|up)", lambda m: sides[m[1]], key) for key in keys]
    return dict(zip(keys, tensors.values(), strict=True))


def refuse_the_rest(tensors: dict[str, Tensor], source: str) -> None:
    """Raises WeightsError if a file holds more than was taken from it."""
    if tensors:
        name = next(iter(tensors))
        kohya = "; convert kohya's layout with diffusers first" if "lora_unet_" in name else ""
        raise WeightsError(f"{source}: {shown(name)} and {len(tensors) - 1} more are nothing that LoRA knows "
                           f"here{kohya}")


@torch.no_grad()
def merge_lora(model: nn.Module, path: Path, scale: float = 1.0, prefix: str = "unet",
               rank: int | None = None) -> None:
    """Adds scale * B A of a file to the projections that it names; all are of this rank, if one is given.

    Raises WeightsError for what does not fit.
    """
    tensors = modern(load_file(path))
    pairs = read_pairs(tensors, model, prefix, str(path), rank)
    if not pairs and not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    refuse_the_rest(tensors, str(path))
    for name, (A, B) in pairs.items():
        model.get_submodule(name).weight.add_(scale * B @ A)


def scales(metadata: dict[str, str], source: str) -> dict[str, float]:
    """alpha / r of each part, from what diffusers notes beside the weights; 1 where nothing is noted."""
    where = f"{source}: its {LORA_METADATA}"
    noted = parse_json(metadata.get(LORA_METADATA, "{}").encode("utf-8", "surrogatepass"), where)
    found = dict.fromkeys(PARTS, 1.0)
    for part in PARTS:
        rank, alpha = noted.get(f"{part}.r", 1), noted.get(f"{part}.lora_alpha", 1)
        if not all(isinstance(n, (int, float)) and abs(n) < 1e6 for n in (rank, alpha)) or rank < 1:
            raise WeightsError(f"{where} names no rank and alpha of {part}: r = {shown(rank, 80)}, "
                               f"lora_alpha = {shown(alpha, 80)}")
        found[part] = alpha / rank if f"{part}.r" in noted else 1.0
    return found


def find_file(source: str | os.PathLike, weight_name: str | None) -> Path:
    """The file itself, or of a folder: `weight_name`, else the usual name, else its only safetensors file."""
    path = Path(source)
    if not path.is_dir():
        return path
    if weight_name is not None or (path / FILE).exists():
        return path / (weight_name or FILE)
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise WeightsError(f"{path}: {len(found)} safetensors files and no {FILE}; give weight_name")
    return found[0]


# --------------------------------------------------------------------------------------------- in a pipeline


@dataclass(eq=False, repr=False)
class Adapter:
    """What one file put into a pipeline: (model, name in it, layer) of each projection."""

    name: str
    layers: list[tuple[nn.Module, str, LoRALinear]]
    fused: bool = False


class PipelineLoRA:
    """Mixin of the pipeline: one LoRA file at a time, taken in, turned up and down, merged, and put out.

    More than one: `fuse_lora`, then load the next.
    """

    adapter: Adapter | None = None

    def load_lora_weights(self, source: str | os.PathLike | dict[str, Tensor], weight_name: str | None = None,
                          adapter_name: str | None = None, **habits: Any) -> None:
        """Reads a file, a folder or a dict of tensors as diffusers' save_lora_weights writes it.

        Raises WeightsError for what does not fit, and ValueError while another adapter is loaded.
        """
        settle("load_lora_weights", habits, LOADING_IDLE, {**LOADING_REFUSED, **LORA_REFUSED})
        if self.adapter is not None and not self.adapter.fused:
            raise ValueError(f"the adapter {self.adapter.name!r} is loaded: fuse_lora() or "
                             "unload_lora_weights() first")
        if isinstance(source, dict):
            tensors, scale, where = dict(source), scales({}, "the tensors"), "the tensors"
        else:
            where = str(find_file(source, weight_name))
            tensors, scale = load_file(where), scales(read_metadata(where), where)
        self.adapter = Adapter(adapter_name or "default_0", self._attach(modern(tensors), scale, where))

    def _attach(self, tensors: dict[str, Tensor], scale: dict[str, float],
                source: str) -> list[tuple[nn.Module, str, LoRALinear]]:
        """Puts LoRALinear layers in the places that the tensors name: all of them, or none."""
        models = {part: getattr(self, part) for part in PARTS if getattr(self, part) is not None}
        pairs = {part: read_pairs(tensors, model, part, source) for part, model in models.items()}
        refuse_the_rest(tensors, source)
        layers = []
        for part, model in models.items():
            for name, (A, B) in pairs[part].items():
                layer = LoRALinear(model.get_submodule(name), len(A), scale[part])
                layer.lora_A.weight, layer.lora_B.weight = nn.Parameter(A, False), nn.Parameter(B, False)
                set_submodule(model, name, layer)
                layers.append((model, name, layer))
        if not layers:
            raise WeightsError(f"{source}: holds no LoRA tensors")
        return layers

    def fuse_lora(self, components: Sequence[str] = PARTS, lora_scale: float = 1.0,
                  safe_fusing: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Merges the adapter into the weights, lora_scale of it; the models are then as fast as without.

        The weights of before are kept for `unfuse_lora` until `unload_lora_weights`.
        """
        adapter = self._loaded(adapter_names)
        for model, name, layer in adapter.layers:
            if model in [getattr(self, part) for part in components]:
                layer.strength *= lora_scale
                merged = layer.merged()
                layer.strength /= lora_scale or 1.0
                if safe_fusing and not merged.weight.isfinite().all():
                    raise ValueError(f"fuse_lora: the weights of {name} are no finite numbers")
                set_submodule(model, name, merged)
        adapter.fused = True

    def unfuse_lora(self, components: Sequence[str] = PARTS) -> None:
        """Takes the adapter out of the weights again; it stays loaded."""
        for model, name, layer in self._loaded().layers:
            if model in [getattr(self, part) for part in components]:
                set_submodule(model, name, layer)
        self.adapter.fused = False

    def unload_lora_weights(self) -> None:
        """Forgets the adapter. What was fused stays in the weights, as upstream has it."""
        for model, name, layer in [] if self.adapter is None or self.adapter.fused else self.adapter.layers:
            set_submodule(model, name, layer.base())
        self.adapter = None

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0
                     ) -> None:
        """How much of the adapter counts from now on."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, (list, tuple)) else [adapter_weights]
        for _, _, layer in self._loaded(names).layers:
            layer.strength = float(weights[0])

    def disable_lora(self) -> None:
        """As if no adapter were loaded."""
        self.set_adapters(self._loaded().name, 0.0)

    def enable_lora(self) -> None:
        """The adapter counts in full."""
        self.set_adapters(self._loaded().name, 1.0)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """As unload_lora_weights, by name."""
        self._loaded([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        self.unload_lora_weights()

    def get_active_adapters(self) -> list[str]:
        """The names of what is loaded and not switched off."""
        layers = [] if self.adapter is None else self.adapter.layers
        return [self.adapter.name] if any(layer.strength for _, _, layer in layers) else []

    def get_list_adapters(self) -> dict[str, list[str]]:
        """For each part of the pipeline that an adapter changes, its name."""
        models = [] if self.adapter is None else [model for model, _, _ in self.adapter.layers]
        return {part: [self.adapter.name] for part in PARTS if getattr(self, part) in models}

    def _loaded(self, names: Sequence[str] | None = None) -> Adapter:
        if self.adapter is None or (names is not None and list(names) != [self.adapter.name]):
            found = "none is loaded" if self.adapter is None else f"only {self.adapter.name!r} is loaded"
            raise ValueError(f"no adapter {'' if names is None else list(names)}: {found}")
        return self.adapter

    @contextlib.contextmanager
    def lora_strength(self, factor: float) -> Iterator[None]:
        """Within, the adapter counts `factor` times as much: a call's cross_attention_kwargs."""
        layers = [] if self.adapter is None else [layer for _, _, layer in self.adapter.layers]
        before = [layer.strength for layer in layers]
        for layer in layers:
            layer.strength *= factor
        try:
            yield
        finally:
            for layer, strength in zip(layers, before, strict=True):
                layer.strength = strength
