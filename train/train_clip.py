"""Train a CLIP from scratch on a folder of images with captions, and see whether each finds the other.

    python -m train.train_clip --data data/herbs --hold-out artist=twitter --out out/herbs

Read after miniclip/image_text.py, whose forward is the loss; search.py asks the result.
Papers: Radford 2021, section 2 (loss, temperature, schedule); Zhai 2023 (SigLIP);
Gao 2021 (large batches in chunks).
Leaves a run folder: report.html, metrics.jsonl, speed.jsonl, matrix/, config.json,
checkpoint.pt and those before it (everything needed to go on), best.pt, model/ (all that train.search needs)
and index/ (the images' embeddings).
More processes and precision: docs/training.md.
Shapes: N images, M captions, B a batch, b this process's rows of it, S image size, T text tokens,
E shared width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from miniclip.image_text import PRESETS, ImageTextModel, build_image_text, find_spellings
from miniclip.loss import clamp_temperature
from miniclip.weights import WeightsError, read_json

if not __package__:                                         # python train/train_clip.py
    __package__ = "train"

from .data.augment import augment, draw_view
from .data.batches import InMemory, Skipped, Streamed, checksums
from .data.folder import Stream
from .data.pairs import Pairs, caption_columns_of, list_pairs, share_of
from .data.summary import summary
from .data.table import NO_CAPTIONS
from .errors import UserError
from .index import index_files, save_index, weights_of
from .lora import CLIP_PROJECTIONS, add_lora, merged, save_adapter
from .optim import build_optimizers, parameter_count, set_learning_rate
from .pages import write_clip_report
from .recall import evaluate, mean_recall, verdict
from .run import distributed
from .run.cli import changed, command, describe_machine, flag, parse_flags, pick_device, start
from .run.distributed import FullCopy, Ranks, average_gradients, is_sharded, see_whole_batch
from .run.folder import claim
from .run.loop import Run, check_same_on_all_ranks
from .run.settings import (
    DATA,
    EVALUATION,
    MACHINE,
    MODEL,
    OTHERS,
    TrainSettings,
    autocast,
    check_processes,
    check_together,
    freeze_named,
)
from .run.state import TrainState, fingerprint
from .towers import compile_towers, enable_checkpointing, modules_to_shard, set_training, tower_modules

NORM_MOMENTUM = 0.3     # torch's 0.1 lags behind weights that move so fast (docs/clip.md)


@dataclass(frozen=True)
class TrainConfig(TrainSettings):
    """The flags of train.train_clip."""

    data: str = changed(TrainSettings, "data", default="data/herbs")
    out: str = changed(TrainSettings, "out", default="out/herbs")
    caption_column: str = changed(TrainSettings, "caption_column", default="",
                                  help="columns of captions.csv, the first of which is tested; default: "
                                  f"caption, if it is there, else all but {', '.join(NO_CAPTIONS)} "
                                  "and that of --hold-out")
    hold_out: str = flag("", "never trained on, tested apart: column=value, such as artist=twitter, or a "
                         "share of the images, sampled at random by --seed, such as 0.2", section=DATA)
    size: int = changed(TrainSettings, "size", at_least=32, at_most=1024)
    preset: str = changed(TrainSettings, "preset", default="tiny", choices=tuple(PRESETS))
    loss: str = flag("infonce", "infonce, or siglip: every pair for itself", section=MODEL,
                     choices=("infonce", "siglip"))
    steps: int = changed(TrainSettings, "steps", default=150)
    batch: int = changed(TrainSettings, "batch", default=16, at_least=2,
                         help="pairs a step; a small set is repeated, each time jittered anew")
    chunk: int = flag(0, "hold only so many pairs in memory, same gradients; 0 holds all", section=MODEL,
                      at_least=0, may_change=True)
    jitter: bool = changed(TrainSettings, "jitter",
                           help="random rotations, shifts, scalings, and changes of colour")
    hues: float = flag(0.0, "how far colours turn into others, such as 0.3: for names that do not depend "
                       "on them", section=MODEL, at_least=0, at_most=1)
    shuffle_captions: bool = flag(False, "a control: captions of other rows, at random; held out is then "
                                  "chance", section=MODEL)
    checks: int = flag(6, "how many times on the way to measure R@1 and draw the matrix", section=EVALUATION,
                       at_least=0, at_most=1000, may_change=True)
    threads: int = flag(0, "CPU threads; 0: one for a tiny preset, whose operations are too small to share, "
                        "else all", section=MACHINE, at_least=0, at_most=1024, may_change=True)
    lock: str = flag("none", "tower of --init that stays as it is", section=OTHERS,
                     choices=("none", "image", "text"))


def main(cfg: TrainConfig, dataset: Dataset | None = None) -> None:
    """Trains. dataset: in place of the folder cfg.data, from Python; see `Pairs.of`."""
    check(cfg)
    cfg = cfg if dataset is not None else with_columns(cfg)
    ranks = distributed.init(pick_device(cfg.device))
    set_threads(cfg, ranks.device)
    out = claim(cfg, ranks)
    data = open_data(cfg, ranks, dataset)
    check_same_on_all_ranks(cfg, data.fingerprint, ranks)
    model = build_model(cfg, data, ranks)
    full = FullCopy(model, ranks, cfg.shard)                                # what is saved
    see_whole_batch(model.model, ranks)
    loss_fn = ranks.wrap(model, modules_to_shard(model) if cfg.shard else [], unused=bool(cfg.init))
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, cfg.muon_lr)
    state = TrainState.begin(cfg, data.fingerprint, model, optimizers, ranks.device)
    run = Run("train_clip", cfg, state, ranks, cfg.checks)
    batches, texts = open_batches(cfg, data, ranks), Texts.of(model, data.train)
    collapse_loss = math.log(cfg.batch)                 # where all embeddings are alike

    for step in run.steps():                            # one turn more, for the last evaluation and save
        if run.is_evaluation(step):
            with state.ema:
                scores = evaluate_and_save(model, full, data, cfg, ranks, step)
            run.evaluated(step, scores, 1 - mean_recall(scores))
            ranks.print0(verdict(step, scores, run.loss, collapse_loss, cfg))
        if run.is_save(step):
            run.save()
        if run.is_report(step):
            write_clip_report(run, *data.shown, parameter_count(model.model))
        if run.is_over(step):
            break

        lr = set_learning_rate(optimizers, step, cfg.steps, cfg.warmup)
        indices, images = batches.batch(step, state.generator)
        batch = draw(texts, indices, images, cfg, ranks, state.generator)
        set_training(model, cfg.lock)
        loss = forward_backward(loss_fn, model, batch, cfg, state, ranks)
        norm = state.clip_gradients(cfg.clip)
        floor = model.criterion.floor(batch.labels)                         # with duplicate captions, above 0
        loss, collapse_loss = run.agreed(loss - floor), math.log(cfg.batch) - floor
        run.check_finite(loss, norm, lr)
        state.update(norm)
        clamp_temperature(model.model.logit_scale)
        state.ema.update(step)
        run.log(step, loss, blind=collapse_loss, grad_norm=norm, lr=lr, **temperature(model))

    if run.close():
        with state.ema, merged(model.model):
            write_index(model, data, cfg, ranks)
        seconds, skipped = run.speed.seconds(), data.skipped.summary()
        ask = command("search", run=out, text=data.train.captions[0][0])
        ranks.print0(f"done in {seconds:.0f} s{skipped}: open {out / 'report.html'}; ask with {ask}")


def check(cfg: TrainConfig) -> None:
    """Refuses what cannot work, in one line, before any work starts."""
    check_together(cfg)
    preset = PRESETS[cfg.preset]
    if not cfg.init and preset.tower == "vit" and cfg.size % preset.patch:
        raise UserError(f"--size {cfg.size}: for {cfg.preset} a multiple of {preset.patch}")
    if cfg.hold_out and "=" not in cfg.hold_out and not share_of(cfg.hold_out):
        raise UserError(f"--hold-out {cfg.hold_out}: must be column=value, such as artist=twitter, or a "
                        "share of the pictures above 0 and below 1, such as 0.2")
    if cfg.lock != "none" and not cfg.init:
        raise UserError(f"--lock {cfg.lock}: only a tower trained before is worth locking; give --init")
    if cfg.chunk and not cfg.init and preset.tower == "resnet":
        raise UserError(f"--chunk {cfg.chunk}: preset {cfg.preset} has batch norm: it needs the whole batch")


def set_threads(cfg: TrainConfig, device: torch.device) -> None:
    """On a CPU only; for the whole process."""
    if device.type == "cpu" and (cfg.threads or "tiny" in cfg.preset):
        torch.set_num_threads(cfg.threads or 1)


# --------------------------------------------------------------------------------------------- data and model


class Data(NamedTuple):
    """What `open_data` found."""

    pairs: Pairs                    # all
    train: Pairs
    shown: tuple[Pairs, Pairs]      # to evaluate on: trained and held out
    fingerprint: dict[str, int]
    skipped: Skipped                # broken files


def with_columns(cfg: TrainConfig) -> TrainConfig:
    """An empty --caption-column is that of the run to go on with; a new run takes what the table has."""
    if cfg.caption_column:
        return cfg
    known = ""
    with contextlib.suppress(OSError, WeightsError):            # no such run: --resume will say so
        known = read_json(Path(cfg.out) / "config.json").get("caption_column") if cfg.resume else ""
    columns = known or ",".join(caption_columns_of(cfg.data, "", cfg.hold_out))
    return dataclasses.replace(cfg, caption_column=columns)


def open_data(cfg: TrainConfig, ranks: Ranks, dataset: Dataset | None = None) -> Data:
    """The pairs of a folder, or of a dataset given from Python."""
    if dataset is None:
        pairs, seen = read_folder(cfg, ranks)
    else:
        pairs = Pairs.of(dataset, cfg.size, share_of(cfg.hold_out), cfg.seed)
        seen = fingerprint(checksums(pairs.images), sum(pairs.captions, []))
    train, test = pairs.split()
    if cfg.shuffle_captions:
        train = train.shuffled(cfg.seed)
    shown = (train.preview(cfg.size), test.preview(cfg.size)) if cfg.stream else (train, test)
    return Data(pairs, train, shown, seen, Skipped(Path(cfg.out), ranks, cfg.resume))


def read_folder(cfg: TrainConfig, ranks: Ranks) -> tuple[Pairs, dict[str, int]]:
    """The pairs of cfg.data, in memory unless streamed, and their fingerprint; prints what is there."""
    columns = caption_columns_of(cfg.data, cfg.caption_column, cfg.hold_out)
    pairs = list_pairs(cfg.data, cfg.size, columns, cfg.hold_out, cfg.seed,
                       Path(cfg.out) if cfg.stream else None)
    names = [Path(name).relative_to(cfg.data).as_posix() for name in pairs.files]
    if ranks.main:
        captions = dict(zip(columns, pairs.captions, strict=True))
        print(*summary(cfg.data, pairs.files, captions, cfg.size, channels=3), sep="\n", flush=True)
    return pairs if cfg.stream else pairs.loaded(cfg.size), fingerprint(names, sum(pairs.captions, []))


def open_batches(cfg: TrainConfig, data: Data, ranks: Ranks) -> InMemory | Streamed:
    """This process's rows of the training pairs' images, on the CPU, from memory or a stream."""
    rows = ranks.local_rows(cfg.batch)
    if not cfg.stream:
        return InMemory(data.train.images, cfg.batch, rows)
    stream = Stream(data.train.folder(cfg.size), cfg.batch, cfg.seed, cfg.steps, rows)
    return Streamed(stream, cfg.workers, data.skipped, torch.device("cpu"))


def build_model(cfg: TrainConfig, data: Data, ranks: Ranks) -> ImageTextModel:
    """A fresh model or the one of --init, on its device, with what shall not learn frozen."""
    torch.manual_seed(cfg.seed)
    captions = [caption for column in data.train.captions for caption in column]
    model = (loaded_model(cfg, captions) if cfg.init
             else build_image_text(PRESETS[cfg.preset], cfg.size, captions, cfg.loss))
    model.spellings = find_spellings(data.train.captions)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = NORM_MOMENTUM
    freeze_named(model.model, cfg.freeze)
    check_processes(cfg, ranks.size)
    if cfg.shard and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise UserError("--shard: shards transformers, this model has a ResNet; take a vit preset")
    to_device(model, ranks.device, cfg.shard)
    model.gather = ranks.gather
    enable_checkpointing(model, cfg.gradient_checkpointing)
    if cfg.compile:
        compile_towers(model)
    if ranks.main:
        model.warn_long(model.captions)
    ranks.print0(f"{len(data.train.files)} pictures, {len(set(data.train.captions[0]))} captions, "
                 f"{sum(data.pairs.held_out)} pictures held out; {parameter_count(model.model):,} "
                 f"parameters; {describe_machine(ranks.device, ranks.size)}")
    return model


def to_device(model: ImageTextModel, device: torch.device, shard: bool) -> None:
    """All of it or, where FSDP takes the towers block by block as they may not fit in one piece, the rest."""
    if shard:
        model.model.logit_scale.data = model.model.logit_scale.data.to(device)
        model.criterion.to(device)
    else:
        model.to(device, memory_format=torch.channels_last)     # convolutions run faster so, on CPUs and GPUs


def loaded_model(cfg: TrainConfig, captions: list[str]) -> ImageTextModel:
    """The one of --init, with one tower locked if asked."""
    model = ImageTextModel.load(cfg.init, cfg.loss)
    if model.size != cfg.size:
        raise UserError(f"--init {cfg.init}: reads pictures of size {model.size}; give --size {model.size}")
    norms = any(isinstance(m, nn.BatchNorm2d) for m in tower_modules(model, "image"))
    if cfg.chunk and norms and cfg.lock != "image":
        raise UserError(f"--chunk {cfg.chunk}: this model has batch norm, which needs the whole batch")
    model.captions = list(dict.fromkeys(captions))
    if cfg.lora:
        add_lora(model.model, cfg.lora, cfg.lora_alpha or cfg.lora, CLIP_PROJECTIONS)
    for module in tower_modules(model, cfg.lock):
        for p in module.parameters(recurse=False):
            p.requires_grad_(False)
    return model


def temperature(model: ImageTextModel) -> dict[str, float]:
    """Logged if it learns: else it is no wonder that it stands."""
    scale = model.model.logit_scale
    return {"logit_scale": scale.item()} if scale.requires_grad else {}


# -------------------------------------------------------------------------------------------- a training step


class Texts(NamedTuple):
    """The captions of all training pairs as tokens, column by column."""

    ids: list[Tensor]       # of each column [N, T]
    masks: list[Tensor]     # [N, T]
    labels: list[Tensor]    # [N]: equal captions, one label

    @classmethod
    def of(cls, model: ImageTextModel, pairs: Pairs) -> Texts:
        """Tokenizes all captions, once for the run; everything lies on the model's device."""
        tokens = [model.tokens(column) for column in pairs.captions]
        return cls([ids for ids, _ in tokens], [mask for _, mask in tokens],
                   [same_labels(column).to(model.device) for column in pairs.captions])


def same_labels(texts: list[str]) -> Tensor:
    """[N] numbers, equal for equal texts."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([number[text] for text in texts])


class Batch(NamedTuple):
    """The arguments of ImageTextModel.forward: this process's rows, and the labels of all."""

    images: Tensor          # [b, 3, S, S]
    input_ids: Tensor       # [b, T]
    attention_mask: Tensor  # [b, T]
    labels: Tensor          # [B]


def draw(texts: Texts, indices: Tensor, images: Tensor, cfg: TrainConfig, ranks: Ranks,
         generator: torch.Generator) -> Batch:
    """Which column of captions, and another view of each image: drawn for the whole batch, in a fixed order.

    indices [b], images [b, 3, S, S] as the data has them.
    """
    own, device = ranks.local_rows(cfg.batch), ranks.device
    column = int(torch.randint(len(texts.ids), (), generator=generator))
    if cfg.jitter:
        images = augment(images, draw_view(cfg.batch, cfg.hues > 0, generator).rows(own), cfg.hues, cfg.flip)
    everyone = ranks.gather(indices.to(device))                                     # [B]
    ids, mask = texts.ids[column][everyone], texts.masks[column][everyone]
    longest = int(mask.sum(dim=1).max())                                            # of the whole batch
    return Batch(images.to(device), ids[own, :longest], mask[own, :longest], texts.labels[column][everyone])


def forward_backward(loss_fn: nn.Module, model: ImageTextModel, batch: Batch, cfg: TrainConfig,
                     state: TrainState, ranks: Ranks) -> float:
    """Leaves the gradients of the loss, which it returns."""
    state.zero_grad()
    with autocast(cfg.precision, ranks.device):
        if cfg.chunk:                                       # past DDP, whose hooks would fire for every chunk
            loss = model.backward_in_chunks(*batch, cfg.chunk, state.scaler.scale) / state.scaler.get_scale()
        else:
            loss = loss_fn(*batch)
    if not cfg.chunk:
        state.backward(loss)
    if cfg.chunk or cfg.shard:                              # what neither DDP nor FSDP averages
        average_gradients((p for p in model.parameters() if not is_sharded(p)), ranks)
    return loss.item()


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate_and_save(model: ImageTextModel, full: FullCopy, data: Data, cfg: TrainConfig, ranks: Ranks,
                      step: int) -> dict[str, float]:
    """R@1 and R@5; leaves the similarity matrix, the model and, with --lora,
    its small file in the run folder."""
    out = Path(cfg.out)
    if cfg.lora and ranks.main:
        save_adapter(model.model, out / "lora", cfg.lora)
    with merged(model.model):                               # LoRA, if any
        scores = evaluate(model, *data.shown, out if ranks.main else None, step)
        saved = full.gather()
        if ranks.main:
            saved.save(out / "model")
    return scores


# -------------------------------------------------------------------------------------------- the image index


def write_index(model: ImageTextModel, data: Data, cfg: TrainConfig, ranks: Ranks) -> None:
    """The index of all images; of a stream those that can be read.
    The first process writes, with --shard all compute."""
    if not (ranks.main or cfg.shard):
        return
    out, folder, weights = Path(cfg.out), None, None
    if ranks.main:
        folder, weights = out / "index", weights_of(out / "model")      # the last evaluation saved them
    if cfg.stream:
        data.skipped.add(index_files(model, data.pairs.files, data.pairs.captions[0], folder, weights))
        return
    vectors = model.embed_images(data.pairs.images)
    if folder is not None:
        save_index(folder, data.pairs.files, data.pairs.captions[0], vectors, weights)


if __name__ == "__main__":
    start(lambda: main(parse_flags(TrainConfig, __doc__.split("\n\n")[0])))
