"""Readers of folders: models, schedulers, tokenizers, pipelines, LoRA, runs and tables; and READERS, all of them.

Read after fuzz_inputs.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
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
    ImageTextModel,
)
from miniclip import convert as clip_convert
from miniclip.files import read_bytes, read_json
from miniclip.weights import save_file, write_json
from minidiff.lora import merge_lora
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.pipeline_folder import SCHEDULERS
from minidiff.text_to_image import ImageFormat, Preset, TextToImage, build_text_to_image
from minidiff.unet import UNet2DConditionModel
from minidiff.upscaler import Upscaler, folded_channels
from minidiff.vae import AutoencoderKL
from tests.faults import fuzz_inputs as small
from tests.faults.fuzz_inputs import BERT, DOWN, OURS, TEXTS, UNET, UP, VAE, VISION, Reader, alike
from train import compare, strokes
from train.data.strokes import Character, Stroke, read_character, read_kai, write_character
from train.data.table import caption_columns, list_captioned, list_indexed
from train.glyphs import GlyphClassifier, load_judge, save_judge
from train.index import Index, save_index
from train.lora import CLIP_PROJECTIONS, add_lora, merge_adapter, save_adapter, save_lora
from train.optim import build_optimizers
from train.run.checkpoint import Checkpoints, save_checkpoint
from train.run.cli import settings_of
from train.run.log import Metrics, read_rows
from train.run.state import TrainState
from train.search import best
from train.train_diffusion import TrainConfig

UNETS = {
    "plain": UNET,
    "xl": {**UNET, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
           "projection_class_embeddings_input_dim": 8 + 48, "transformer_layers_per_block": (1, 2)},
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
        kind(beta_schedule="scaled_linear", prediction_type="v_prediction").save_pretrained(folder / f"{name} v")


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
    for i, text in enumerate((*TEXTS, "x" * 300, "永和九年，歲在癸丑，暮春之初", "e\u0301" * 50, "&amp;&lt;b&gt; ﬃ İ Σ")):
        (folder / f"{i}.txt").write_bytes(text.encode("utf-8"))


@functools.cache
def encoders() -> list[Callable]:
    clip, words = small.tokenizer(), {w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] a ##b".split())}
    found = [clip, CLIPTokenizer(clip.vocab, clip.merges, rules="openai"),
             CLIPTokenizer(clip.vocab, clip.merges), BertTokenizer(words)]
    for other in found[1:]:
        other.add_tokens(["<herb>", "aaaaab", "春 滿"])
    return found


def read_text(path: Path) -> None:
    """Encoded by each tokenizer, and decoded."""
    text = read_bytes(path, 2**30).decode("utf-8", "replace")
    for tokenizer in encoders():
        tokenizer.decode(tokenizer(text, truncation=True, max_length=16).input_ids)


# ------------------------------------------------------------------------------------------ pipelines and LoRA


def build_pipelines(folder: Path) -> None:
    for name, fields in UNETS.items():
        parts = {"text_encoder_2": small.text_tower(CLIPTextModelWithProjection), "tokenizer_2": small.tokenizer()}
        fields = {**fields, "cross_attention_dim": 128} if name == "xl" else fields
        StableDiffusionPipeline(
            unet=alike(UNet2DConditionModel(**fields)), vae=alike(AutoencoderKL(**VAE)), tokenizer=small.tokenizer(),
            text_encoder=small.text_tower(), scheduler=SCHEDULERS["DDIMScheduler"](),
            **(parts if name == "xl" else {})).save_pretrained(folder / name)


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
    return StableDiffusionPipeline(
        unet=fresh_unet(), vae=alike(AutoencoderKL(**VAE)), text_encoder=small.text_tower(),
        tokenizer=small.tokenizer(), scheduler=SCHEDULERS["DDIMScheduler"]())


def read_lora(path: Path) -> None:
    if path.name == "adapter":
        merge_adapter(small.small_clip(), path / "adapter_model.safetensors")
        return
    pipe = pipeline()
    pipe.adapter = None
    pipe.load_lora_weights(path)
    pipe.unload_lora_weights()
    merge_lora(fresh_unet(), path)


# ------------------------------------------------------------------------------------------------ run folders


def fresh_run() -> TextToImage:
    torch.manual_seed(0)
    model = build_text_to_image(Preset((8, 16), (False, True), 1, 32, 1), ImageFormat(16, 1, 2), ["春 楷書", "滿 行書"])
    alike(model)
    return model


def settings() -> TrainConfig:
    return TrainConfig(data="data/calligraphy", out="out/x", size=16, steps=6, batch=4, preset="tiny")


def build_run(folder: Path) -> None:
    model, channels = fresh_run(), folded_channels(1)
    unet = UNet2DConditionModel(in_channels=channels[0], out_channels=channels[1], block_out_channels=(8, 16),
                                layers_per_block=1, down_block_types=[DOWN] * 2, up_block_types=[UP] * 2,
                                mid_block_type="UNetMidBlock2D", norm_num_groups=4)
    model.upscaler = Upscaler(alike(unet))
    model.save(folder / "run" / "model")
    write_json(folder / "run" / "config.json", dataclasses.asdict(settings()))


def read_run(path: Path) -> None:
    settings_of(path, TrainConfig)
    TextToImage.load(path)


def build_rows(folder: Path) -> None:
    """Two runs of settings and rows."""
    for name in ("a", "b"):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        write_json(run / "config.json", {**dataclasses.asdict(settings()), "seed": ord(name)})
        metrics, speed = Metrics(run / "metrics.jsonl"), Metrics(run / "speed.jsonl")
        metrics.add(step=0, val_loss=1.5)
        for step in range(6):
            metrics.add(step=step, loss=1 / (1 + step), grad_norm=0.5, lr=1e-3)
            speed.add(step=step, seconds=0.1 * step, pictures_per_second=9.5, memory_mib=300)
        metrics.file.close(), speed.file.close()


def read_compared(path: Path) -> None:
    read_rows(path / "a" / "speed.jsonl", ("step", "seconds"))
    compare.main([str(path / "a"), str(path / "b")], str(path / "compare.html"))


def fresh_state() -> TrainState:
    cfg, model = settings(), fresh_run()
    optimizers = build_optimizers(model, "muon", 1e-3, 0.02)
    return TrainState.begin(cfg, {"pictures": 20, "checksum": 7}, model, optimizers, torch.device("cpu"))


def build_checkpoint(folder: Path) -> None:
    state = fresh_state()
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    state.update(1.0)
    state.zero_grad()
    state.step = 3
    (folder / "run").mkdir()
    save_checkpoint(folder / "run" / "checkpoint.pt", state.capture())


resumed = functools.cache(fresh_state)


def read_checkpoint(path: Path) -> None:
    """As --resume does."""
    state, cfg = resumed(), settings()
    saved = Checkpoints(path, 2).load(lambda line: None, lambda found: state.check(found, cfg.may_change()))
    state.restore(saved, cfg.may_change())


def build_index(folder: Path) -> None:
    save_index(folder / "index", ["a.png", "b/b.png"], ["薑", "蒜"], torch.eye(2, 8), 1234)


def read_index(path: Path) -> None:
    index = Index.load(path)
    for i, _ in best(index.embeddings, torch.ones(8), 2):
        index.describe(i)


def build_judge(folder: Path) -> None:
    (folder / "judge").mkdir()
    save_judge(alike(GlyphClassifier(["春", "滿"], 2)), folder / "judge", {"right": 0.9})


def build_writer(folder: Path) -> None:
    with small_transformer():
        scaling = strokes.Scaling(torch.zeros(strokes.FEATURES), torch.ones(strokes.FEATURES), 9)
        model = strokes.build_stroke_writer(scaling, ["春 楷書", "滿 行書"])
        alike(model).save(folder / "model")


def read_writer(path: Path) -> None:
    with small_transformer():
        strokes.load_writer(path)


@contextlib.contextmanager
def small_transformer() -> Iterator[None]:
    """Within, a writer of strokes is tiny."""
    before = strokes.WIDTH, strokes.LAYERS, strokes.HEADS
    strokes.WIDTH, strokes.LAYERS, strokes.HEADS = 8, 1, 1
    try:
        yield
    finally:
        strokes.WIDTH, strokes.LAYERS, strokes.HEADS = before


def build_clip_run(folder: Path) -> None:
    half = (0.5, 0.5, 0.5)
    processor = CLIPImageProcessor(size=16, crop_size=16, image_mean=half, image_std=half)
    ImageTextModel(small.small_clip(), small.tokenizer(), processor, ["薑", "蒜"], spellings=[["薑", "ginger"]]
                   ).save(folder / "clip")
    words = {w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] 薑 蒜".split())}
    ImageTextModel(small.small_simple(), BertTokenizer(words, model_max_length=12), processor, ["薑"]
                   ).save(folder / "simple")


def read_clip_run(path: Path) -> None:
    ImageTextModel.load(path)


# -------------------------------------------------------------------------------------- tables and characters


def build_tables(folder: Path) -> None:
    picture = io.BytesIO()
    Image.new("L", (2, 2)).save(picture, "png")
    for name, delimiter in (("comma", ","), ("semicolon", ";")):
        (folder / name / "b").mkdir(parents=True)
        rows = (("file", "caption", "artist"), ("a.png", "薑", "x"), ("b/b.png", '"ginger, ""raw"""', ""))
        text = "".join(delimiter.join(row) + "\n" for row in rows)
        (folder / name / "captions.csv").write_bytes(("\ufeff" * (name == "semicolon") + text).encode("utf-8"))
        rows = [["a.png", "薑"], ["b/b.png", 'ginger, "raw"']]
        index = {"made_of": "HERE", "pictures": rows}
        (folder / name / "index.json").write_bytes(json.dumps(index, ensure_ascii=False).encode("utf-8"))
        for file in ("a.png", "b/b.png"):
            (folder / name / file).write_bytes(picture.getvalue())
    (folder / "classes" / "薑 ginger").mkdir(parents=True)
    (folder / "classes" / "薑 ginger" / "a.png").write_bytes(picture.getvalue())


def read_table(path: Path) -> None:
    """And the list that is kept of a large one, as if it were of this table."""
    caption_columns(path), list_captioned(path)
    table, index = path / "captions.csv", path / "index.json"
    if table.is_file() and index.is_file():
        info = table.stat()
        made_of = json.dumps([str(path.resolve()), "caption", info.st_size, info.st_mtime_ns]).encode()
        index.write_bytes(index.read_bytes().replace(b'"HERE"', made_of))
        list_indexed(path, "caption", index)


def build_characters(folder: Path) -> None:
    line = np.linspace((0.1, 0.2), (0.9, 0.8), 5, dtype=np.float32)
    write_character(Character("一", "楷書", [Stroke(line, np.full(5, 0.05, np.float32))]), folder / "ours.json")
    square = "M 90 760 L 910 760 Q 920 800 910 840 L 90 840 C 80 830 80 800 90 760 Z"
    write_json(folder / "一.json", {"strokes": [square], "medians": [[[100, 800], [500, 810], [900, 800]]]})


def read_strokes(path: Path) -> None:
    (read_character if path.name == "ours.json" else read_kai)(path)


READERS: dict[str, Reader] = {
    "pictures": Reader(small.build_pictures, small.read_training),
    "pictures-clip": Reader(small.build_pictures, small.read_for_clip),
    "pictures-minidiff": Reader(small.build_pictures, small.read_for_pipeline),
    "json": Reader(small.build_json, read_json),
    "safetensors": Reader(small.build_safetensors, small.read_safetensors),
    "pickles": Reader(small.build_pickles, small.read_pickles),
    "torchscript": Reader(small.build_archives, clip_convert.load),
    "shards": Reader(small.build_shards, small.read_shards),
    "unet": Reader(build_unets, read_unet),
    "vae": Reader(build_vae, read_vae),
    "clip-towers": Reader(build_towers, clip_convert.load),
    "clip-models": Reader(build_clips, clip_convert.load),
    "clip-files": Reader(small.build_clip_files, small.read_clip_file),
    "single-files": Reader(small.build_single_files, small.read_single_file),
    "schedulers": Reader(build_schedulers, read_scheduler, (*OURS, ValueError)),
    "processors": Reader(build_processors, read_processor),
    "tokenizers": Reader(build_tokenizers, read_tokenizer, (*OURS, ValueError)),
    "texts": Reader(build_texts, read_text),
    "pipelines": Reader(build_pipelines, read_pipeline),
    "lora": Reader(build_lora, read_lora, (*OURS, ValueError)),
    "run": Reader(build_run, read_run),
    "run-rows": Reader(build_rows, read_compared),
    "run-checkpoint": Reader(build_checkpoint, read_checkpoint),
    "run-strokes": Reader(build_writer, read_writer),
    "run-clip": Reader(build_clip_run, read_clip_run),
    "index": Reader(build_index, read_index),
    "judge": Reader(build_judge, load_judge),
    "tables": Reader(build_tables, read_table),
    "strokes": Reader(build_characters, read_strokes),
}
