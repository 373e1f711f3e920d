"""`python -m minidiff.trace sd15`: one forward pass, stage by stage, with shapes and parameter counts.

Read beside unet.py. Runs on the meta device: no weights, no memory, any size of model in a second.
Shapes are [batch, channels, height, width] or [batch, tokens, width].
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.command import run
from minidiff.unet import UNet2DConditionModel

SDXL = {
    "sample_size": 128, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sd21": {"sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
             "use_linear_projection": True},
    "sdxl": SDXL,
}  # fmt: skip


def trace(model: UNet2DConditionModel, size: int, depth: int) -> list[tuple[str, str, str, int]]:
    """(name, class, shape of the output, parameters) of every module down to `depth` names,
    in order of execution."""
    rows: list[tuple[str, str, str, int]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            shape = list(first.shape) if isinstance(first, Tensor) else ""
            count = sum(p.numel() for p in module.parameters())
            rows.append((name, type(module).__name__, str(shape), count))

        return hook

    for name, module in model.named_modules():
        if name and name.count(".") < depth and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(note(name))
    c = model.config
    added = None
    if c.addition_embed_type is not None:
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        added = {"text_embeds": torch.empty(1, pooled, device="meta"),
                 "time_ids": torch.empty(1, 6, device="meta")}
    text = torch.empty(1, 77, c.per_level("cross_attention_dim")[0], device="meta")
    model(torch.empty(1, c.in_channels, size, size, device="meta"), 500, text, added_cond_kwargs=added)
    return rows


def main(argv: list[str] | None = None) -> None:
    """The command: prints a line for each row of `trace`, and the sum of the parameters."""
    parser = argparse.ArgumentParser("python -m minidiff.trace",
                                     description="One forward pass with its shapes.")
    parser.add_argument("model", choices=MODELS, nargs="?", default="sd15")
    parser.add_argument("--size", type=int, default=None, help="height and width of the latents")
    parser.add_argument("--depth", type=int, default=4,
                        help="how many dots deep to look (default: %(default)s)")
    a = parser.parse_args(argv)
    if a.depth < 1 or (a.size is not None and a.size < 1):
        parser.error(f"--depth {a.depth} and --size {a.size} must be at least 1")
    with torch.device("meta"):
        model = UNet2DConditionModel(**MODELS[a.model])
    rows = trace(model, a.size or MODELS[a.model]["sample_size"], a.depth)
    width = max(len(name) for name, *_ in rows)
    for name, kind, shape, count in rows:
        print(f"{name:{width}}  {kind:20} {shape:22} {count:>13,}")
    print(f"{'all':{width}}  {'UNet2DConditionModel':20} {'':22} {model.num_parameters():>13,}")


if __name__ == "__main__":
    sys.exit(run("trace", main))
