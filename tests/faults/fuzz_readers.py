"""Readers of runs, tables and characters; and READERS, all there are.

Read after fuzz_models.py.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.packages import MakerError, json_of, members, read_bz2
from miniclip import (
    BertTokenizer,
    CLIPImageProcessor,
    ImageTextModel,
)
from miniclip import convert as clip_convert
from miniclip.files import read_json, write_json
from miniclip.weights import save_file
from minidiff.text_to_image import ImageFormat, Preset, TextToImage, build_text_to_image
from minidiff.unet import UNet2DConditionModel
from minidiff.upscaler import Upscaler, folded_channels
from tests.faults import fuzz_inputs as small
from tests.faults import fuzz_models as models
from tests.faults.fuzz_inputs import DOWN, OURS, UP, Reader, alike
from train import compare, strokes
from train.data.batches import Skipped
from train.data.strokes import Character, Stroke, read_character, read_kai, write_character
from train.data.table import caption_columns, list_captioned, list_indexed
from train.glyphs import GlyphClassifier, load_judge, save_judge
from train.index import Index, save_index
from train.latent import read_cache
from train.optim import build_optimizers
from train.run.checkpoint import Checkpoints, save_checkpoint
from train.run.cli import settings_of
from train.run.distributed import Ranks
from train.run.log import Metrics
from train.run.state import TrainState
from train.search import best
from train.train_diffusion import TrainConfig

# ------------------------------------------------------------------------------------------------ run folders


def fresh_run() -> TextToImage:
    torch.manual_seed(0)
    tiny = Preset((8,), (True,), 1, 8, 1)
    return alike(build_text_to_image(tiny, ImageFormat(16, 1, 2), ["春 楷書", "滿 行書"]))


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
    Metrics(path / "a" / "speed.jsonl", 3, ("step", "seconds")).file.close()       # as --resume does
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
    model = ImageTextModel(small.small_clip(), small.tokenizer(), processor, ["薑"])
    model.spellings = [["薑", "ginger"]]
    model.save(folder / "clip")
    words = {w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] 薑 蒜".split())}
    tokenizer = BertTokenizer(words, model_max_length=12)
    ImageTextModel(small.small_simple(), tokenizer, processor, ["薑"]).save(folder / "simple")


def read_clip_run(path: Path) -> None:
    ImageTextModel.load(path)


def build_skipped(folder: Path) -> None:
    """What a stream left out, and the latents that are kept beside a run."""
    (folder / "run").mkdir()
    (folder / "run" / "skipped.txt").write_bytes("a/薑.png: broken picture\nb.png: empty\n".encode())
    save_file({"mean": torch.ones(3, 2), "text": torch.ones(2, 2)}, folder / "run" / "latents.safetensors")


def read_skipped(path: Path) -> None:
    Skipped(path, Ranks(0, 1, torch.device("cpu")), resume=True)
    read_cache(path / "latents.safetensors", {"mean": 3, "text": 2})


# -------------------------------------------------------------------------------------- tables and characters


def build_tables(folder: Path) -> None:
    picture = io.BytesIO()
    Image.new("L", (2, 2)).save(picture, "png")
    for name, delimiter in (("comma", ","), ("semicolon", ";")):
        (folder / name / "b").mkdir(parents=True)
        rows = (("file", "caption", "artist"), ("a.png", "薑", "x"), ("b/b.png", '"ginger, ""raw"""', ""))
        text = "".join(delimiter.join(row) + "\n" for row in rows)
        mark = "\ufeff" * (name == "semicolon")
        (folder / name / "captions.csv").write_bytes((mark + text).encode("utf-8"))
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
    stroke = Stroke(line, np.full(5, 0.05, np.float32))
    write_character(Character("一", "楷書", [stroke]), folder / "ours.json")
    square = "M 90 760 L 910 760 Q 920 800 910 840 L 90 840 C 80 830 80 800 90 760 Z"
    write_json(folder / "一.json", {"strokes": [square], "medians": [[[100, 800], [500, 810], [900, 800]]]})


def read_strokes(path: Path) -> None:
    (read_character if path.name == "ours.json" else read_kai)(path)


def build_packages(folder: Path) -> None:
    """As npm has them, and a table as Unihan's."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as package:
        for name, content in (("package/a.json", b'{"a": 1}'), ("package/b/b.txt", b"text\n" * 9)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    (folder / "package.tgz").write_bytes(gzip.compress(file.getvalue(), mtime=0))
    (folder / "table.bz2").write_bytes(bz2.compress(b"U+6625\tkFrequency\t1\n" * 20))


def read_package(path: Path) -> None:
    if path.suffix == ".bz2":
        read_bz2(path)
    else:
        json_of(members(path, lambda name: True), "a.json", path)


READERS: dict[str, Reader] = {
    "pictures": Reader(small.build_pictures, small.read_training),
    "pictures-clip": Reader(small.build_pictures, small.read_for_clip),
    "pictures-minidiff": Reader(small.build_pictures, small.read_for_pipeline),
    "json": Reader(small.build_json, read_json),
    "safetensors": Reader(small.build_safetensors, small.read_safetensors),
    "pickles": Reader(small.build_pickles, small.read_pickles),
    "torchscript": Reader(small.build_archives, clip_convert.load),
    "shards": Reader(small.build_shards, small.read_shards),
    "unet": Reader(models.build_unets, models.read_unet),
    "vae": Reader(models.build_vae, models.read_vae),
    "clip-towers": Reader(models.build_towers, clip_convert.load),
    "clip-models": Reader(models.build_clips, clip_convert.load),
    "clip-files": Reader(small.build_clip_files, small.read_clip_file),
    "single-files": Reader(small.build_single_files, small.read_single_file),
    "schedulers": Reader(models.build_schedulers, models.read_scheduler, (*OURS, ValueError)),
    "processors": Reader(models.build_processors, models.read_processor),
    "tokenizers": Reader(models.build_tokenizers, models.read_tokenizer, (*OURS, ValueError)),
    "texts": Reader(models.build_texts, models.read_text),
    "pipelines": Reader(models.build_pipelines, models.read_pipeline),
    "lora": Reader(models.build_lora, models.read_lora, (*OURS, ValueError)),
    "run": Reader(build_run, read_run),
    "run-rows": Reader(build_rows, read_compared),
    "run-checkpoint": Reader(build_checkpoint, read_checkpoint),
    "run-strokes": Reader(build_writer, read_writer),
    "run-clip": Reader(build_clip_run, read_clip_run),
    "run-rest": Reader(build_skipped, read_skipped),
    "index": Reader(build_index, read_index),
    "judge": Reader(build_judge, load_judge),
    "tables": Reader(build_tables, read_table),
    "strokes": Reader(build_characters, read_strokes),
    "packages": Reader(build_packages, read_package, (MakerError,)),
}
