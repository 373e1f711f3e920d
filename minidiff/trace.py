"""`python -m minidiff.trace sd15`: one forward pass of a UNet, module by module, with its skips.

Read beside unet.py; miniclip/trace.py watches, prints and draws. `--part vae` or another traces the rest of a
pipeline or of a run. Shapes are [batch, channels, height, width] or [batch, tokens, width].
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.command import run
from miniclip.files import WeightsError
from miniclip.trace import OPENED as CLIP_OPENED
from miniclip.trace import (
    Row,
    Trace,
    answer,
    beside,
    drawn,
    from_config,
    hollow,
    hollow_model,
    inputs_of,
    parser,
    shapes_in,
    tower_of,
    trace,
)
from miniclip.weights import load_file, load_pickle
from minidiff.attention import Transformer2DModel
from minidiff.config import UNet2DConditionConfig
from minidiff.convert import build_models
from minidiff.resnet import ResnetBlock2D
from minidiff.text_to_image import PRESETS, ImageFormat, build_text_to_image
from minidiff.unet import Block, UNet2DConditionModel
from minidiff.vae import AutoencoderKL, Decoder, Encoder

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
KNOWN = (*MODELS, "demo")
KINDS = {"UNet2DConditionModel": UNet2DConditionModel, "AutoencoderKL": AutoencoderKL}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "upscaler")   # folders of a pipeline or a run
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
TOKENS = 77         # of a text, where no text encoder lies beside the UNet
OPENED = (AutoencoderKL, Encoder, Decoder, *CLIP_OPENED)
DEMO = ImageFormat(64, 1, 2)    # with the preset small, what train.train_diffusion learns calligraphy with


# -------------------------------------------------------------------------------------------------- the model

Models = dict[str, Callable[[], nn.Module]]     # those of a path, by name, each made when it is asked for


def open_model(path: str, part: str | None) -> tuple[nn.Module, str, int]:
    """The model of a preset or a path, what to call it, and how many tokens its texts have.
    Raises WeightsError, ConfigError."""
    if path in KNOWN:
        if part not in (None, "unet"):
            raise WeightsError(f"--part {part}: {path} is a UNet alone")
        config, tokens = demo() if path == "demo" else (
            UNet2DConditionConfig.from_dict(MODELS[path], path), TOKENS)
        return hollow_model(UNet2DConditionModel, config), path, tokens
    models = models_at(Path(path))
    name = part or ("unet" if "unet" in models else next(iter(models)))
    if name not in models:
        there = ", ".join(filter(None, models)) or "one model"
        raise WeightsError(f"{path}: no {name} in it; there is {there}")
    text = models.get("text_encoder")
    tokens = text().config.max_position_embeddings if text else TOKENS
    return models[name](), f"{path}, {name}" if name else path, tokens


def demo() -> tuple[UNet2DConditionConfig, int]:
    """The UNet's config of the calligraphy run, and its texts' tokens."""
    model = build_text_to_image(PRESETS["small"], DEMO, ["春 楷書"])
    return model.unet.config, model.tokenizer.model_max_length


def models_at(path: Path) -> Models:
    """Those of a pipeline's, a run's or a model's folder, of a config.json, or of a checkpoint."""
    if path.is_dir():
        for root in (path / "model", path):
            configs = {name: root / name / "config.json" for name in PARTS}
            if found := {name: partial(from_config, file, KINDS) for name, file in configs.items()
                         if file.is_file()}:
                return found
        return {"": partial(from_config, path / "config.json", KINDS)}
    if not path.exists():
        raise WeightsError(f"{path}: neither one of {', '.join(KNOWN)} nor a file or folder")
    if path.suffix == ".json":
        return {"": partial(from_config, path, KINDS)}
    return models_in(path)


def models_in(path: Path) -> Models:
    """Those of a checkpoint: by the config.json beside it, or in Stable Diffusion's original layout."""
    tensors = shapes_in(load_pickle(path) if path.suffix in PICKLES else load_file(path))
    if (model := beside(path, tensors, KINDS)) is not None:
        return {"": lambda: model}
    models = build_models(tensors, str(path))
    return {name: partial(models.get, name) for name in models}


# ---------------------------------------------------------------------------------------------- what it takes


def unet_inputs(c: UNet2DConditionConfig, batch: int, size: int | None, tokens: int) -> dict[str, Any]:
    """What a UNet's forward takes, and no more than its config asks for."""
    height, width = sides(size or c.sample_size or 64)
    given: dict[str, Any] = {"sample": hollow(batch, c.in_channels, height, width),
                             "timestep": hollow(batch, dtype=torch.long)}
    if any(map(c.attends, range(len(c.block_out_channels)))):
        D = c.encoder_hid_dim or c.per_level("cross_attention_dim")[0]
        given["encoder_hidden_states"] = hollow(batch, tokens, D)
    if c.time_cond_proj_dim is not None:
        given["timestep_cond"] = hollow(batch, c.time_cond_proj_dim)
    if (labels := class_labels(c, batch)) is not None:
        given["class_labels"] = labels
    if c.addition_embed_type is not None:
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": hollow(batch, pooled), "time_ids": hollow(batch, 6)}
    return given


def class_labels(c: UNet2DConditionConfig, batch: int) -> Tensor | None:
    """Of a UNet with a class embedding."""
    if c.class_embed_type is None:
        return None if c.num_class_embeds is None else hollow(batch, dtype=torch.long)
    if c.class_embed_type == "timestep":
        return hollow(batch)
    identity = c.class_embed_type == "identity"
    return hollow(batch, 4 * c.block_out_channels[0] if identity else c.projection_class_embeddings_input_dim)


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    return size if isinstance(size, tuple) else (size, size)


# ------------------------------------------------------------------------------------------------ the drawing


def skips_of(rows: list[Row]) -> list[tuple[int, int]]:
    """Which rows make the skips and which take them: last in, first out, as in the UNet's forward."""
    made: list[int] = []
    taken: list[int] = []
    for i, row in enumerate(rows):
        block = row.name.split(".")[0]
        if row.name == "conv_in" or (block == "down_blocks" and row.depth == 2):
            if row.kind is Transformer2DModel:      # its resnet's map goes no further
                made.pop()
            made.append(i)
        if block == "up_blocks" and row.depth == 2 and row.kind is ResnetBlock2D:
            taken.append(i)
    return list(zip(made, reversed(taken), strict=True))


def boxes_of(rows: list[Row]) -> list[tuple[str, int, list[int]]]:
    """The blocks that hand maps on, each with the maps that it makes."""
    blocks = [i for i, row in enumerate(rows) if row.depth == 1 and len(row.output or ()) == 4]
    ends = [*blocks[1:], len(rows)]
    inner = [[j for j in range(i, end) if rows[j].depth == 2] for i, end in zip(blocks, ends)]
    return [("", i, maps if issubclass(rows[i].kind, Block) else [i]) for i, maps in zip(blocks, inner)]


def coder_of(name: str) -> str:
    """Which half of a VAE a module belongs to."""
    return "decoder" if name.split(".")[0] in ("decoder", "post_quant_conv") else "encoder"


def trace_part(path: str, part: str | None = None, batch: int = 1, size: int | None = None,
               tokens: int | None = None) -> Trace:
    """The trace of a preset or a path, with what a page draws of it. size: of latents for a UNet, else of
    pictures."""
    model, title, usual = open_model(path, part)
    if isinstance(model, UNet2DConditionModel):
        t = trace(model, unet_inputs(model.config, batch, size, tokens or usual), title)
        t.drawn, t.skips = boxes_of(t.rows), skips_of(t.rows)
        return t
    if isinstance(model, AutoencoderKL):
        height, width = sides(size or model.config.sample_size)
        given = {"sample": hollow(batch, model.config.in_channels, height, width)}
    else:
        given = inputs_of(model, batch, size, tokens)
    half = coder_of if isinstance(model, AutoencoderKL) else tower_of
    t = trace(model, given, title)
    t.drawn = [(half(t.rows[i].name), i, [i]) for i in drawn(t.rows, OPENED)]
    return t


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 after a mistake of the user."""
    def work() -> None:
        p = parser("minidiff.trace", ", ".join(KNOWN))
        p.set_defaults(model="sd15")
        p.add_argument("--part", choices=PARTS, help="of a pipeline or a run (default: unet)")
        a = p.parse_args(argv)
        answer(trace_part(a.model, a.part, a.batch, a.size, a.tokens), a)

    return run("trace", work, (ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
