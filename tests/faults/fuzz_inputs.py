"""The readers of the project, each with valid inputs, small, and how these are read.

Read after fuzz_mutate.py. A reader's `build` leaves files and folders, each an input of its own; models in
them are tiny, their weights alike, so that a case that failed makes a small file of the corpus.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from miniclip import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPResNetConfig,
    CLIPResNetModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ConfigError,
    ImageError,
    SimpleCLIPConfig,
    SimpleCLIPModel,
    WeightsError,
)
from miniclip import convert as clip_convert
from miniclip.files import read_pickle, write_json
from miniclip.weights import load_file, load_folder, load_pickle, read_metadata, save_file
from minidiff import convert
from minidiff.__main__ import read_picture
from minidiff.pil import from_pil
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL
from tests.torchscript import archive
from train.data.image import read_image, read_whole
from train.errors import DataError, UserError

OURS = (WeightsError, ConfigError, ImageError, DataError, UserError)    # one line each, wherever raised
MODEL_FILES = ("config.json", "model.safetensors")
TEXTS = ("a herb shop, 春 滿 乾 坤 1921", "<|endoftext|> é\u0301 don't 🌿 [MASK] x")
SIZES = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
BERT = {**SIZES, "vocab_size": 7, "max_position_embeddings": 12}
DISTIL = {"vocab_size": 7, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16,
          "max_position_embeddings": 12}
STAGES = (1, 1, 1, 1)
CROSS, DOWN, UP, CROSS_UP = "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
UNET = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 64,
        "down_block_types": (CROSS, DOWN), "up_block_types": (UP, CROSS_UP), "attention_head_dim": 2,
        "norm_num_groups": 4}
VAE = {"block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",), "sample_size": 16,
       "up_block_types": ("UpDecoderBlock2D",), "latent_channels": 4, "norm_num_groups": 4}


class Reader(NamedTuple):
    """build leaves valid inputs in a folder; read takes one of them; errors are what it may raise."""

    build: Callable[[Path], None]
    read: Callable[[Path], Any]
    errors: tuple[type, ...] = OURS


def alike(model: nn.Module) -> nn.Module:
    """The model with weights that pack well."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.arange(p.numel()) % 7 - 3).view(p.shape) / 50)
    return model.eval()


@functools.cache
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.train([*TEXTS] * 9, vocab_size=540)


def text_tower(kind: type = CLIPTextModel, **sizes: Any) -> nn.Module:
    return alike(kind(CLIPTextConfig.for_tokenizer(tokenizer(), **{**SIZES, **sizes}, projection_dim=8)))


def small_clip() -> nn.Module:
    text = CLIPTextConfig.for_tokenizer(tokenizer(), **SIZES)
    return alike(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)))


def small_resnet() -> nn.Module:
    text = CLIPTextConfig.for_tokenizer(tokenizer(), **SIZES)
    return alike(CLIPResNetModel(CLIPResNetConfig(
        text_config=text, vision_layers=STAGES, vision_width=4, image_size=32, projection_dim=8)))


def small_simple() -> nn.Module:
    return alike(SimpleCLIPModel(SimpleCLIPConfig(
        text_encoder="distilbert", text_config=DISTIL, image_width=2, image_layers=STAGES, projection_dim=6)))


# -------------------------------------------------------------------------------------------------- pictures


def build_pictures(folder: Path) -> None:
    colours = Image.fromarray(np.arange(40 * 32 * 3, dtype=np.uint8).reshape(32, 40, 3))
    pixels = {mode: colours.convert(mode) for mode in ("RGB", "P", "RGBA", "1", "CMYK")}
    pixels["I;16"] = Image.new("I;16", (40, 32), 900)
    for name, mode in (("a.png", "RGB"), ("b.png", "P"), ("c.png", "RGBA"), ("d.png", "I;16"), ("e.png", "1"),
                       ("a.jpg", "RGB"), ("b.jpg", "CMYK"), ("a.gif", "P"), ("a.bmp", "RGB"), ("b.bmp", "P"),
                       ("a.tif", "RGB"), ("b.tif", "I;16"), ("a.webp", "RGB"), ("b.webp", "RGBA")):
        pixels[mode].save(folder / name)
    exif = Image.Exif()
    exif[274] = 6
    colours.save(folder / "turned.jpg", exif=exif)
    colours.save(folder / "c.tif", compression="tiff_lzw")
    pixels["P"].save(folder / "moving.gif", save_all=True, append_images=[pixels["P"].rotate(90)])
    with contextlib.suppress(Exception):        # where Pillow was built without it
        colours.save(folder / "a.avif")


def read_training(path: Path) -> None:
    read_image(path, 32, 3), read_image(path, (16, 24), 1, "crop")
    with contextlib.suppress(DataError):        # of other sides than it takes
        read_whole(path, 3, 64)


def read_for_clip(path: Path) -> None:
    CLIPImageProcessor(size=16, crop_size=16)(path)
    CLIPImageProcessor(size=16, crop_size=16, alpha="white")(str(path))


def read_for_pipeline(path: Path) -> None:
    from_pil([read_picture(str(path))], 16, 16, "RGB")


# ------------------------------------------------------------------------------------------- files of weights


def build_json(folder: Path) -> None:
    values = {"a": 1, "b": [1, 2.5, None, True], "c": {"d": "春", "e": {}}, "long": "x" * 99}
    write_json(folder / "a.json", values)
    (folder / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"x": [[[]]], "y": 1e30}).encode("ascii"))


def state() -> dict[str, torch.Tensor]:
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(0), "step": torch.tensor(3)}
    return {**tensors, "half": torch.ones(4).half(), "flags": torch.ones(2, dtype=torch.bool)}


def build_safetensors(folder: Path) -> None:
    save_file(state(), folder / "a.safetensors", {"format": "pt"})
    save_file({"x": torch.ones(2, 2).bfloat16()}, folder / "b.safetensors")


def read_safetensors(path: Path) -> None:
    read_metadata(path), load_file(path), load_file(path, mmap=False, dtype=torch.float32)


def build_pickles(folder: Path) -> None:
    torch.save(state(), folder / "a.bin")
    torch.save({"state_dict": state(), "epoch": 3}, folder / "b.ckpt")
    file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    # such a file names its tensor by an address in memory, which is another in each process
    old = re.sub(rb"X.\0\0\0\d{7,}", b"X\7\0\0\0001234567", file.getvalue(), flags=re.DOTALL)
    (folder / "old.pt").write_bytes(old)


def read_pickles(path: Path) -> None:
    load_pickle(path), read_pickle(path)


def build_shards(folder: Path) -> None:
    for name, safe in (("safe", True), ("pickled", False)):
        small_clip().save_pretrained(folder / name, max_shard_size=20_000, safe_serialization=safe)


def read_shards(path: Path) -> None:
    load_folder(path, "model")
    CLIPModel.from_pretrained(path)


def build_archives(folder: Path) -> None:
    resnet = small_resnet().state_dict()
    visual = {k: v for k, v in resnet.items() if k.startswith("visual.")}
    text = clip_convert.to_openai({k: v for k, v in resnet.items() if k not in visual})
    vit = clip_convert.to_openai(small_clip().state_dict())
    for name, tensors in (("vit.pt", vit), ("resnet.pt", text | visual)):
        archive(tensors, folder / name)


def build_clip_files(folder: Path) -> None:
    clip, simple = small_clip().state_dict(), small_simple().state_dict()
    openai = clip_convert.to_openai(clip)
    save_file(openai, folder / "open.safetensors")
    save_file(clip, folder / "ours.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in openai.items()}}, folder / "open.pt")
    save_file(simple, folder / "simple.safetensors")
    torch.save(simple, folder / "best.pt")


def read_clip_file(path: Path) -> None:
    with named_sizes():
        clip_convert.load(path, "tiny-quickgelu" if path.name.startswith(("open", "ours")) else None)


@contextlib.contextmanager
def named_sizes() -> Iterator[None]:
    """Within, OpenCLIP has a model of our size."""
    clip_convert.VIT["tiny"] = None
    try:
        yield
    finally:
        del clip_convert.VIT["tiny"]


def original(xl: bool) -> dict[str, torch.Tensor]:
    """A checkpoint in the original layout of Stable Diffusion 1, or of SDXL."""
    unet = {**UNET, "block_out_channels": (32, 64), "norm_num_groups": 32, "attention_head_dim": 8}
    if xl:
        unet |= {"use_linear_projection": True, "attention_head_dim": (1, 1), "block_out_channels": (64, 64),
                 "cross_attention_dim": 128, "addition_embed_type": "text_time",
                 "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 64 + 6 * 256}
    vae = {**VAE, "block_out_channels": (32,), "norm_num_groups": 32}
    models = ((convert.UNET, UNet2DConditionModel(**unet), convert.unet_table),
              ("first_stage_model.", AutoencoderKL(**vae), convert.vae_table))
    tensors: dict[str, torch.Tensor] = {}
    for prefix, model, table in models:
        back = {new: old for old, new in table(model.config).items()}
        tensors |= {prefix + n: t for n, t in convert.rename(alike(model).state_dict(), back).items()}
    prefix = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    tensors |= {prefix + n: t for n, t in text_tower(num_hidden_layers=2).state_dict().items()}
    if xl:
        other = text_tower(CLIPTextModelWithProjection, num_hidden_layers=2)
        tensors |= {f"conditioner.embedders.1.model.{n}": t
                    for n, t in clip_convert.to_openai(other.state_dict()).items()}
    return {n: t.half().contiguous() for n, t in tensors.items()}


def build_single_files(folder: Path) -> None:
    save_file(original(False), folder / "sd.safetensors")
    save_file(original(True), folder / "xl.safetensors")
    torch.save({"state_dict": original(False)}, folder / "sd.ckpt")


def read_single_file(path: Path) -> None:
    convert.load_single_file(path)
