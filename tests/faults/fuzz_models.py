"""Readers of models: their folders, schedulers, image settings, tokenizers, pipelines and LoRA.

Read after fuzz_inputs.py.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from miniclip import (
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from miniclip.files import read_bytes, write_json
from miniclip.weights import save_file
from minidiff.lora import merge_lora
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.pipeline_folder import SCHEDULERS
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL
from tests.faults import fuzz_inputs as small
from tests.faults.fuzz_inputs import BERT, TEXTS, UNET, VAE, VISION, alike
from train.lora import CLIP_PROJECTIONS, add_lora, merge_adapter, save_adapter, save_lora

UNETS = {
    "plain": UNET,
    "xl": {**UNET, "use_linear_projection": True, "addition_embed_type": "text_time",
           "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 + 48,
           "transformer_layers_per_block": (1, 2)},
}


# ---------------------------------------------------------------------------------------------------- models


def build_unets(folder: Path) -> None:
    for name, fields in UNETS.items():
        alike(UNet2DConditionModel(**fields)).save_pretrained(folder / name)


def build_vae(folder: Path) -> None:
    alike(AutoencoderKL(**VAE)).save_pretrained(folder / "vae")


def build_towers(folder: Path) -> None:
    small.text_tower().save_pretrained(folder / "text")
    small.text_tower(CLIPTextModelWithProjection).save_pretrained(folder / "text-projection")
    for name, kind in (("vision", CLIPVisionModel), ("vision-projection", CLIPVisionModelWithProjection)):
        alike(kind(CLIPVisionConfig(**VISION, projection_dim=8))).save_pretrained(folder / name)


def build_clips(folder: Path) -> None:
    small.small_clip().save_pretrained(folder / "clip")
    small.small_resnet().save_pretrained(folder / "resnet")
    small.small_simple().save_pretrained(folder / "simple")
    config = ChineseCLIPConfig(text_config=BERT, vision_config=VISION, projection_dim=6)
    alike(ChineseCLIPModel(config)).save_pretrained(folder / "chinese")


def read_unet(path: Path) -> None:
    UNet2DConditionModel.from_pretrained(path)


def read_vae(path: Path) -> None:
    AutoencoderKL.from_pretrained(path)


def build_schedulers(folder: Path) -> None:
    for name, kind in SCHEDULERS.items():
        kind().save_pretrained(folder / name)
        other = kind(beta_schedule="scaled_linear", prediction_type="v_prediction")
        other.save_pretrained(folder / f"{name} v")


def read_scheduler(path: Path) -> None:
    """And one of four steps on a small image."""
    scheduler = SCHEDULERS[path.name.split()[0]].from_pretrained(path)
    scheduler.set_timesteps(4)
    x = torch.ones(1, 1, 2, 2)
    scheduler.add_noise(x, x, scheduler.timesteps[:1])
    x = scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(x, scheduler.timesteps[0], x)


def build_processors(folder: Path) -> None:
    CLIPImageProcessor().save_pretrained(folder / "plain")
    CLIPImageProcessor(size=16, crop_size=16, do_normalize=False).save_pretrained(folder / "square")


def read_processor(path: Path) -> None:
    CLIPImageProcessor.from_pretrained(path)(Image.new("RGB", (20, 10)))


# ------------------------------------------------------------------------------------------------ tokenizers


def build_tokenizers(folder: Path) -> None:
    tokenizer = CLIPTokenizer(small.tokenizer().vocab, small.tokenizer().merges)
    tokenizer.add_tokens(["<herb>", "春 滿"])
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] herb shop ##s a , 春".split()
    for name, kind in (("clip", tokenizer), ("bert", BertTokenizer({w: i for i, w in enumerate(words)}))):
        kind.save_pretrained(folder / name)
    (folder / "fast").mkdir()
    for file in (folder / "clip").iterdir():        # without the first two, tokenizer.json is read
        if file.name not in ("vocab.json", "merges.txt"):
            (folder / "fast" / file.name).write_bytes(file.read_bytes())
    (folder / "bert fast").mkdir()
    fast = {"model": {"type": "WordPiece", "vocab": {w: i for i, w in enumerate(words)}}, "added_tokens": []}
    write_json(folder / "bert fast" / "tokenizer.json", fast)
    merges = "\n".join(['"version"', *(" ".join(pair) for pair in small.tokenizer().merges)]) + "\n"
    (folder / "bpe.txt.gz").write_bytes(gzip.compress(merges.encode("utf-8"), mtime=0))


def read_tokenizer(path: Path) -> None:
    if path.name == "bpe.txt.gz":
        tokenizer = CLIPTokenizer.from_bpe_file(path)
    else:
        kind = BertTokenizer if path.name.startswith("bert") else CLIPTokenizer
        tokenizer = kind.from_pretrained(path)
    ids = tokenizer([*TEXTS], padding=True, truncation=True).input_ids
    tokenizer.decode(ids[0])


def build_texts(folder: Path) -> None:
    others = ("x" * 300, "永和九年，歲在癸丑，暮春之初", "e\u0301" * 50, "&amp;&lt;b&gt; ﬃ İ Σ")
    for i, text in enumerate((*TEXTS, *others)):
        (folder / f"{i}.txt").write_bytes(text.encode("utf-8"))


@functools.cache
def encoders() -> list[Callable]:
    clip, words = small.tokenizer(), "[PAD] [UNK] [CLS] [SEP] [MASK] a ##b".split()
    found = [clip, CLIPTokenizer(clip.vocab, clip.merges, rules="openai"),
             CLIPTokenizer(clip.vocab, clip.merges), BertTokenizer({w: i for i, w in enumerate(words)})]
    for other in found[1:]:
        other.add_tokens(["<herb>", "aaaaab", "春 滿"])
    return found


def read_text(path: Path) -> None:
    """Encoded by each tokenizer, and decoded."""
    text = read_bytes(path, 2**30).decode("utf-8", "replace")
    for tokenizer in encoders():
        tokenizer.decode(tokenizer(text, truncation=True, max_length=16).input_ids)


# ---------------------------------------------------------------------------------------- pipelines and LoRA


def build_pipelines(folder: Path) -> None:
    for name, fields in UNETS.items():
        parts = {}
        if name == "xl":
            fields = {**fields, "cross_attention_dim": 128}
            parts["text_encoder_2"] = small.text_tower(CLIPTextModelWithProjection)
            parts["tokenizer_2"] = small.tokenizer()
        pipeline_of(alike(UNet2DConditionModel(**fields)), **parts).save_pretrained(folder / name)


def pipeline_of(unet: nn.Module, **parts: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=unet, vae=alike(AutoencoderKL(**VAE)), tokenizer=small.tokenizer(),
        text_encoder=small.text_tower(), scheduler=SCHEDULERS["DDIMScheduler"](), **parts)


def read_pipeline(path: Path) -> None:
    StableDiffusionPipeline.from_pretrained(path)


def fresh_unet() -> nn.Module:
    return alike(UNet2DConditionModel(**UNET))


def build_lora(folder: Path) -> None:
    unet, clip = fresh_unet(), small.small_clip()
    add_lora(unet, 2, 2)
    save_lora(unet, folder / "ours.safetensors")
    write = {"unet.r": 2, "unet.lora_alpha": 4.0}
    tensors = small.load_file(folder / "ours.safetensors", mmap=False)
    save_file(tensors, folder / "noted.safetensors", {"lora_adapter_metadata": json.dumps(write)})
    add_lora(clip, 2, 2, CLIP_PROJECTIONS)
    save_adapter(clip, folder / "adapter", 2)


@functools.cache
def pipeline() -> StableDiffusionPipeline:
    return pipeline_of(fresh_unet())


def read_lora(path: Path) -> None:
    if path.name == "adapter":
        merge_adapter(small.small_clip(), path / "adapter_model.safetensors")
        return
    pipe = pipeline()
    pipe.adapter = None
    pipe.load_lora_weights(path)
    pipe.unload_lora_weights()
    merge_lora(fresh_unet(), path)
