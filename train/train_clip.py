"""Train a CLIP from scratch on a folder of pictures with captions, and see whether each finds the other.

    python -m train.train_clip --data data/herbs --hold-out artist=twitter --out out/herbs

Read after matcher.py; search.py asks the result. Papers: Radford 2021, section 2 (loss, temperature, schedule);
Zhai 2023 (SigLIP); Gao 2021 (large batches in chunks).
Leaves a run folder: report.html, metrics.jsonl, speed.jsonl, matrix/, config.json, checkpoint.pt and those before it
(everything needed to go on), best.pt, model/ (all that train.search needs) and index/ (the pictures' embeddings).
More processes and precision: docs/training.md.
Shapes: B batch, N pictures, M captions, S picture size, E width of the shared space.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import html
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.folder import (
    NO_CAPTIONS,
    DataError,
    Picture,
    PictureFolder,
    Stream,
    affine,
    caption_columns,
    columns_of,
    find_column,
)
from data.summary import summary
from miniclip.bert import BertLayer
from miniclip.loss import cached_backward, chance, clamp_temperature, contrastive_loss, floor, ranks, siglip_loss
from miniclip.model import CLIPEncoderLayer
from miniclip.weights import WeightsError, read_json
from train import report
from train.common import (
    EMA,
    PRECISIONS,
    SEEDS,
    Checkpoints,
    Metrics,
    Progress,
    RunState,
    Speed,
    StopFlag,
    UserError,
    autocast,
    check_flags,
    check_init,
    check_pattern,
    claim,
    command,
    describe_machine,
    draw_batch,
    evaluation_steps,
    fingerprint,
    flag,
    freeze_named,
    go_on,
    how_to_go_on,
    keep,
    must_be_alike,
    open_books,
    parse_flags,
    pick_device,
    run,
    save_picture,
    stop_unless_finite,
)
from train.lora import CLIP_PROJECTIONS, add_lora, check_lora, merged, save_adapter
from train.matcher import PRESETS, Matcher, build_matcher, find_spellings
from train.optim import build_optimizers, set_learning_rate
from train.parallel import (
    Group,
    Loss,
    average_gradients,
    check_shard,
    clip_gradients,
    gather_into,
    is_shared,
    join,
    replicate,
    see_whole_batch,
    shard,
)
from train.search import index_files, save_index, weights_of
from train.stream import Skipped, check_workers, first_pictures, from_step


@dataclass(frozen=True)
class TrainConfig:
    data: str = flag("data/herbs", "folder of pictures: captions.csv, or one folder for each class",
                     section="data and run folder")
    out: str = flag("out/herbs", "run folder to write")
    caption_column: str = flag("", "columns of captions.csv, the first of which is tested; default: caption, "
                               f"if it is there, else all but {', '.join(NO_CAPTIONS)} and that of --hold-out")
    hold_out: str = flag("", "never trained on, tested apart: column=value, such as artist=twitter, or a share "
                         "of the pictures, drawn by --seed, such as 0.2")
    size: int = flag(64, "pictures are S x S", at_least=32, at_most=1024)
    preset: str = flag("tiny", "size of a fresh model", choices=tuple(PRESETS), section="model and training")
    loss: str = flag("infonce", "infonce, or siglip: every pair for itself", choices=("infonce", "siglip"))
    steps: int = flag(150, "optimizer steps", at_least=1)
    batch: int = flag(16, "pairs a step; a small set is repeated, each time jittered anew", at_least=2)
    chunk: int = flag(0, "hold only so many pairs in memory, same gradients; 0 holds all", at_least=0)
    optimizer: str = flag("muon", "muon (learns faster) or adamw", choices=("muon", "adamw"))
    lr: float = flag(1e-3, "peak learning rate of AdamW", above=0)
    muon_lr: float = flag(0.02, "peak learning rate of Muon", above=0)
    warmup: int = flag(20, "steps of linear warm-up", at_least=0)
    ema: float = flag(0.0, "largest decay of the weights' running mean; 0 for none", at_least=0, at_most=1)
    clip: float = flag(1.0, "clip the gradient's norm to this", above=0)
    jitter: bool = flag(True, "random rotations, shifts, scalings, and changes of colour")
    hues: float = flag(0.0, "how far colours turn into others, such as 0.3: for names that do not depend on them",
                       at_least=0, at_most=1)
    flip: bool = flag(False, "mirror half of the pictures")
    shuffle_captions: bool = flag(False, "a control: deal the captions out at random once; then held out is chance")
    checks: int = flag(6, "how many times on the way to measure R@1 and draw the matrix", at_least=0, at_most=10_000)
    seed: int = flag(0, "one seed, one result (on one machine, on the CPU)", section="machine, memory and speed",
                     **SEEDS)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    threads: int = flag(0, "CPU threads; 0: one for a tiny preset, whose operations are too small to share, else all",
                        at_least=0, at_most=4096)
    precision: str = flag("auto", "of the forward pass; auto: bf16 on a GPU that has it, else float32",
                          choices=PRECISIONS)
    gradient_checkpointing: bool = flag(False, "compute activations twice instead of keeping them, to save memory")
    compile: bool = flag(False, "torch.compile both towers: slow to start, then faster, most of all on a GPU")
    init: str = flag("", "start from this model folder instead of a fresh model", section="starting from what others trained")
    lock: str = flag("none", "tower of --init that stays as it is", choices=("none", "image", "text"))
    lora: int = flag(0, "rank of LoRA on the towers' attention: --init stays as it is, a small file learns; 0 for none",
                     at_least=0, at_most=4096)
    lora_alpha: float = flag(0.0, "LoRA adds alpha / rank times what it learned; 0 takes the rank", at_least=0)
    freeze: str = flag("", "leave alone what has this regular expression in its name, such as ^text_model")
    shard: bool = flag(False, "FSDP2: torchrun's processes share out the weights too, for models that do not fit on one",
                       section="more processes, more data")
    stream: bool = flag(False, "read pictures as they are needed: for more than memory holds; skips broken files")
    workers: int = flag(0, "processes that read ahead for --stream; 0 reads in the training process", at_least=0,
                        at_most=1024)
    save_every: int = flag(100, "steps between checkpoints, beside those at each evaluation", section="checkpoints",
                           at_least=1)
    keep: int = flag(2, "how many checkpoints to keep, beside the best", at_least=1, at_most=10_000)
    resume: bool = flag(False, "go on from the run folder's newest good checkpoint; settings that are not given are "
                        "those of its config.json")
    overwrite: bool = flag(False, "begin anew in a run folder that holds a run, which is removed")


def main(cfg: TrainConfig) -> None:
    check(cfg)
    cfg = with_columns(cfg)
    # ---- processes, device and data
    group = join(pick_device(cfg.device))
    device, amp = group.device, autocast(cfg.precision, group.device)
    if device.type == "cpu" and (cfg.threads or "tiny" in cfg.preset):
        torch.set_num_threads(cfg.threads or 1)
    out = claim(cfg, group)
    pairs, skipped = (list_pairs(cfg, out) if cfg.stream else read_pairs(cfg)), Skipped(out, group, cfg.resume)
    seen = fingerprint([Path(name).relative_to(cfg.data).as_posix() for name in pairs.files], sum(pairs.captions, []))
    must_be_alike(cfg, seen, group)
    if group.main:
        print(*summary(cfg.data, pairs.files, dict(zip(columns_in(cfg), pairs.captions)), cfg.size, channels=3),
              sep="\n", flush=True)
    train, test = pairs.split()
    if cfg.shuffle_captions:
        train = train.shuffled(cfg.seed)
    shown = (some_of(train, cfg), some_of(test, cfg)) if cfg.stream else (train, test)      # to evaluate on

    # ---- model
    torch.manual_seed(cfg.seed)
    matcher = initial_matcher(cfg, [c for column in train.captions for c in column])
    matcher.spellings = find_spellings(train.captions)
    check_shares(cfg, group, matcher)
    if cfg.shard:                                           # FSDP takes the towers block by block: they may not fit in one
        matcher.model.logit_scale.data = matcher.model.logit_scale.data.to(device)
    else:
        matcher.to(device, memory_format=torch.channels_last)       # convolutions run faster so, on CPUs and GPUs
    recompute(matcher, cfg.gradient_checkpointing)
    if cfg.compile:
        compile_towers(matcher)
    if group.main:
        matcher.warn_long(matcher.captions)
    texts = [matcher.tokens(column) for column in train.captions]                   # [N, T] for each column
    labels = [indices(column).to(device) for column in train.captions]              # [N]: equal captions, one label
    logit_bias = nn.Parameter(torch.tensor(-10.0, device=device), requires_grad=cfg.loss == "siglip")
    parameters = sum(p.numel() for p in matcher.parameters() if p.requires_grad)
    group.say(f"{len(train.pictures)} pictures, {len(set(train.captions[0]))} captions, {len(test.pictures)} pictures held "
              f"out; {parameters:,} parameters; {describe_machine(device)}"
              + (f", {group.size} processes" if group.size > 1 else ""))

    # ---- optimizer and averages
    trained = nn.ModuleDict({"matcher": matcher, "bias": nn.ParameterList([logit_bias])})
    twin = copy.deepcopy(matcher).cpu() if cfg.shard and group.main else matcher        # the one that is saved
    loss_of = distribute(trained, cfg, group)
    alone = [p for p in trained.parameters() if not is_shared(p)] if cfg.shard or cfg.chunk else []
    optimizers = build_optimizers(trained, cfg.optimizer, cfg.lr, cfg.muon_lr)
    ema = EMA((p for p in trained.parameters() if p.requires_grad), cfg.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    dice = torch.Generator().manual_seed(cfg.seed)          # one stream for batches, columns and jitter

    # ---- resume
    checkpoints = Checkpoints(out, cfg.keep)
    state = RunState(dataclasses.asdict(cfg), seen, trained, ema, optimizers, scaler, dice)
    resume_at = go_on(state, checkpoints, group, MAY_CHANGE) if cfg.resume else None
    metrics, speed = open_books(cfg, group, resume_at)
    start = state.step
    check_points = evaluation_steps(cfg.steps, cfg.checks)
    part, = group.shares(cfg.batch, 1)                      # this process's rows of each batch
    batches = from_step(Stream(folder_of(train, cfg), cfg.batch, cfg.seed, cfg.steps, part), start, cfg.workers)
    stop, stopping, progress, loss_mean = StopFlag(), False, Progress(cfg.steps, start), math.nan
    blind = math.log(cfg.batch)     # the loss of a model for which all pictures are alike

    # ---- loop: one turn more than there are steps, so that the last evaluation and save are ordinary ones
    for step in range(start, cfg.steps + 1):
        state.step = step
        evaluating = step in check_points and step != resume_at
        if evaluating:
            with ema:
                scores = examine(matcher, twin, shown, cfg, group, step)
            metrics.add(step=step, **scores)
            group.say(verdict(step, scores, loss_mean, blind, cfg))
        if evaluating or stopping or (step % cfg.save_every == 0 and step != resume_at):
            keep(state, checkpoints, group, 1 - mean_recall(scores) if evaluating else math.inf)
        if (evaluating or step == cfg.steps) and group.main:
            write_report(out, cfg, metrics, speed, parameters, *shown)
        if step == cfg.steps or stopping:
            break

        factor = set_learning_rate(optimizers, step, cfg.steps, cfg.warmup)
        chosen, column, views = draw(len(train.files), len(texts), cfg, dice)       # of the whole batch
        if cfg.stream:
            pixels, own, broken = next(batches)
            pictures, chosen = pixels.float() / 127.5 - 1, group.gather(own.to(device))
            skipped.add(broken)
        else:
            pictures, chosen = train.pictures[chosen[part]], chosen.to(device)
        pictures = augment(pictures, [drawn[part] for drawn in views], cfg).to(device)
        ids, mask = (t[chosen] for t in texts[column])
        ids, mask = (t[:, : int(mask.sum(dim=1).max())] for t in (ids, mask))       # no further than the longest text
        same = labels[column][chosen]

        set_training(matcher, cfg.lock)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        rows = pictures, ids[part], mask[part], same, group, cfg
        with amp:
            loss = chunked_backward(trained, *rows, scaler) if cfg.chunk else loss_of(*rows)
        if not cfg.chunk:
            scaler.scale(loss).backward()
        average_gradients(alone, group)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = clip_gradients(trained.parameters(), cfg.clip)
        least = floor(same, cfg.batch) if cfg.loss == "infonce" else 0.0      # equal captions set a least loss: to 0
        value, asked = group.mean(loss.item() - least, float(stop.set))
        blind, stopping = math.log(cfg.batch) - least, asked > 0              # asked of any process
        stop_unless_finite(value, norm, factor, state, metrics, checkpoints.kept[0])
        state.learn(norm)
        clamp_temperature(matcher.model.logit_scale)
        ema.update(step)

        loss_mean = value if math.isnan(loss_mean) else 0.9 * loss_mean + 0.1 * value
        scale = matcher.model.logit_scale                   # told of if it learns: else it is no wonder that it stands
        metrics.add(step=step, loss=value, blind=blind, grad_norm=norm, lr=factor,
                    **({"logit_scale": scale.item()} if scale.requires_grad else {}))
        speed.add(step)
        if group.main:
            progress.show(step + 1, f"loss {loss_mean:.3f}")
    progress.close()
    stop.restore()

    if stopping and step < cfg.steps:
        group.say(f"stopped at step {step}; go on with {how_to_go_on('train.train_clip', out, group)}")
        return
    with ema, merged(matcher.model):
        if group.main or cfg.shard:
            write_index(matcher, pairs, cfg, skipped)
    if cfg.stream:
        skipped.add_those_of_others()
    left = f", {len(skipped.files)} broken files left out ({skipped.path})" if skipped.files else ""
    group.say(f"done in {speed.seconds():.0f} s{left}: open {out / 'report.html'}; ask with "
              + command("train.search", run=out, text=train.captions[0][0]))


def check(cfg: TrainConfig) -> None:
    """Refuses what cannot work, in one line, before any work starts."""
    check_flags(cfg)
    check_init(cfg.init)
    preset = PRESETS[cfg.preset]
    if not cfg.init and preset.tower == "vit" and cfg.size % preset.patch:
        raise UserError(f"--size {cfg.size}: preset {cfg.preset} takes a multiple of {preset.patch}")
    if cfg.hold_out and "=" not in cfg.hold_out and not share_of(cfg):
        raise UserError(f"--hold-out {cfg.hold_out}: must be column=value, such as artist=twitter, or a share of the "
                        "pictures above 0 and below 1, such as 0.2")
    if cfg.lock != "none" and not cfg.init:
        raise UserError(f"--lock {cfg.lock}: only a tower that was trained before is worth locking; give --init")
    if cfg.chunk and not cfg.init and preset.tower == "resnet":
        raise UserError(f"--chunk {cfg.chunk}: preset {cfg.preset} has batch norm, which needs the whole batch")
    check_shard(cfg)
    check_pattern(cfg.freeze)
    check_workers(cfg.workers, cfg.stream)
    check_lora(cfg.lora, cfg.lora_alpha, cfg.init)


def check_shares(cfg: TrainConfig, group: Group, matcher: Matcher) -> None:
    if cfg.batch % group.size:
        raise UserError(f"--batch {cfg.batch}: cannot be shared evenly among {group.size} processes")
    check_shard(cfg, group.size)
    if cfg.shard and any(isinstance(m, nn.BatchNorm2d) for m in matcher.modules()):
        raise UserError("--shard: shares out transformers, this model has a ResNet; take a vit preset")


# -------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Pairs:
    """Pictures [N, 3, S, S] in -1..1 with their captions, one list of N for each column, and who is held out."""

    files: list[str]
    pictures: Tensor
    captions: list[list[str]]
    held_out: list[bool]

    def split(self) -> tuple[Pairs, Pairs]:
        return tuple(self.take([i for i, held in enumerate(self.held_out) if held == which]) for which in (False, True))

    def shuffled(self, seed: int) -> Pairs:
        """The same pictures and the same rows of captions, dealt out anew: there is nothing to learn but by heart."""
        order = torch.randperm(len(self.files), generator=torch.Generator().manual_seed(seed)).tolist()
        return dataclasses.replace(self, captions=[[column[i] for i in order] for column in self.captions])

    def take(self, rows: list[int]) -> Pairs:
        captions = [[column[i] for i in rows] for column in self.captions]
        return Pairs([self.files[i] for i in rows], self.pictures[rows], captions, [self.held_out[i] for i in rows])


def with_columns(cfg: TrainConfig) -> TrainConfig:
    """An empty --caption-column is that of the run to go on with; a new run takes what the table has."""
    if cfg.caption_column:
        return cfg
    known = ""
    with contextlib.suppress(OSError, WeightsError):            # no such run: --resume will say so
        known = read_json(Path(cfg.out) / "config.json").get("caption_column") if cfg.resume else ""
    return dataclasses.replace(cfg, caption_column=known or ",".join(columns_in(cfg)))


def columns_in(cfg: TrainConfig) -> list[str]:
    """The columns of captions. Class folders have one: their names."""
    if not cfg.caption_column or not (Path(cfg.data) / "captions.csv").exists():
        return caption_columns(cfg.data, besides=cfg.hold_out.partition("=")[0])
    columns = [name.strip() for name in cfg.caption_column.split(",") if name.strip()]
    if not columns:
        raise UserError("--caption-column: name at least one column")
    return columns


def share_of(cfg: TrainConfig) -> float:
    """The share of --hold-out; 0 if it is none."""
    try:
        share = float(cfg.hold_out)
    except ValueError:
        return 0.0
    return share if 0 < share < 1 else 0.0


def by_lot(files: list[str], captions: list[list[str]], share: float, seed: int) -> list[bool]:
    """Which rows are held out: those of a share of the files, drawn by lot.

    Of the pictures with one caption, in any column, one stays to train on, so there may be fewer than asked for; where a
    caption has but one picture, that may be held out.
    """
    told: dict[str, set[tuple[int, str]]] = {file: set() for file in files}
    for k, column in enumerate(captions):
        for file, caption in zip(files, column, strict=True):
            told[file].add((k, caption))
    left = Counter(caption for own in told.values() for caption in own)
    alone = {caption for caption, count in left.items() if count == 1}
    distinct, held = list(told), set()
    for i in torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist() if share else ():
        if len(held) >= max(1, round(share * len(distinct))):
            break
        own = told[distinct[i]]
        if all(left[caption] > 1 or caption in alone for caption in own):
            held.add(distinct[i])
            left.subtract(own)
    return [file in held for file in files]


def read_pairs(cfg: TrainConfig) -> Pairs:
    pairs = list_pairs(cfg)
    return dataclasses.replace(pairs, pictures=folder_of(pairs, cfg).pictures())


def list_pairs(cfg: TrainConfig, out: Path | None = None) -> Pairs:
    """The pairs with pictures of no pixels [N, 0]. The lists of a large table are kept in `out`."""
    columns = columns_in(cfg)
    name, equals, value = cfg.hold_out.partition("=")
    there = columns_of(cfg.data)
    if equals and there and not find_column(there, name):
        raise UserError(f"--hold-out {cfg.hold_out}: no column {name!r} in captions.csv; it has {', '.join(there)}")
    wanted = [*columns, name] if equals else columns
    folders = [PictureFolder(cfg.data, size=cfg.size, channels=3, caption_column=column,
                             index=out / f"index.{i}.json" if out else None) for i, column in enumerate(wanted)]
    captions = [folder.captions for folder in folders[:len(columns)]]
    files = [str(entry.path) for entry in folders[0].entries]
    held_out = by_lot(files, captions, share_of(cfg), cfg.seed)
    if equals:
        values = folders[-1].captions
        held_out = [v == value for v in values]
        if not any(held_out) or all(held_out):
            known = ", ".join(list(dict.fromkeys(values))[:10])
            raise UserError(f"--hold-out {cfg.hold_out}: leaves nothing to {'test' if not any(held_out) else 'train'}; "
                            f"{name} holds {known}")
    trained = {c for c, held in zip(captions[0], held_out, strict=True) if not held}
    if len(trained) < 2 <= len(set(captions[0])):
        raise UserError(f"--hold-out {cfg.hold_out}: leaves fewer than two captions to train on; hold out less")
    if len(trained) < 2:
        raise DataError(f"{cfg.data}: one caption for all pictures; matching needs at least two")
    if len(trained) > 2 and all(Path(c).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") for c in trained):
        raise DataError(f"{cfg.data}: the captions are file names; are two columns of captions.csv swapped?")
    return Pairs(files, torch.empty(len(files), 0), captions, held_out)


def folder_of(pairs: Pairs, cfg: TrainConfig) -> PictureFolder:
    """Reads just these pictures, in this order."""
    entries = [Picture(Path(file), caption) for file, caption in zip(pairs.files, pairs.captions[0], strict=True)]
    return PictureFolder(cfg.data, size=cfg.size, channels=3, entries=entries)


def some_of(pairs: Pairs, cfg: TrainConfig) -> Pairs:
    """Up to 64 pairs with their pictures."""
    if not pairs.files:
        return pairs
    pictures, rows = first_pictures(folder_of(pairs, cfg))
    return dataclasses.replace(pairs.take(rows), pictures=pictures)


def write_index(matcher: Matcher, pairs: Pairs, cfg: TrainConfig, skipped: Skipped) -> None:
    """The index of all pictures; of a stream those that can be read. Only the first process writes."""
    out, folder, weights = Path(cfg.out), None, None
    if skipped.group.main:
        folder, weights = out / "index", weights_of(out / "model")      # the last evaluation saved them
    if cfg.stream:
        skipped.add(index_files(matcher, pairs.files, pairs.captions[0], folder, weights))
        return
    vectors = matcher.embed_pictures(pairs.pictures)
    if folder is not None:
        save_index(folder, pairs.files, pairs.captions[0], vectors, weights)


def indices(texts: list[str]) -> Tensor:
    """[N] numbers, equal for equal texts."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([number[text] for text in texts])


def draw(n: int, columns: int, cfg: TrainConfig, dice: torch.Generator) -> tuple[Tensor, int, list[Tensor]]:
    """All random numbers of a step, for the whole batch, in a fixed order: who trains a part of it takes its rows.

    Which of the n pictures [B], which column of captions, and for each picture's view moves [B, 6], colours [B, 8]
    and hues [B, 3, 3].
    """
    B = cfg.batch
    chosen = torch.zeros(B, dtype=torch.long) if cfg.stream else draw_batch(n, B, dice)     # a stream has its own order
    column = int(torch.randint(columns, (), generator=dice))
    if not cfg.jitter:
        return chosen, column, [torch.empty(B, 0)] * 3
    moves, colours = torch.rand(B, 6, generator=dice), torch.rand(B, 8, generator=dice) * 2 - 1      # colours in -1..1
    return chosen, column, [moves, colours, torch.randn(B, 3, 3, generator=dice) if cfg.hues else torch.empty(B, 0)]


def augment(pictures: Tensor, view: list[Tensor], cfg: TrainConfig) -> Tensor:
    """Another view of each picture [B, 3, S, S]: moved, turned, sheared, lighter or darker, of other colours."""
    if not cfg.jitter:
        return pictures
    moves, u, hues = view
    pictures = affine(pictures, moves, degrees=12, translate=0.06, scale=0.2, shear=8, flip=cfg.flip)
    ink = (1 - pictures) / 2                                                        # 0 on white paper, 1 on black
    gain = 1 + 0.35 * u[:, :1] + 0.15 * u[:, 1:4]                                   # [B, 3]: of all, of each channel
    grey = ink.mean(dim=1, keepdim=True)
    mix = (0.35 * (u[:, 4] + 0.3).clamp_min(0))[:, None, None, None]                # towards grey
    ink = ((1 - mix) * ink + mix * grey) * gain[:, :, None, None]
    if cfg.hues:
        ink = turn_hues(ink, cfg.hues * hues)
    soft = F.avg_pool2d(ink, 3, stride=1, padding=1)
    ink = torch.where((u[:, 5] > 0.5)[:, None, None, None], soft, ink)
    return (1 - 2 * ink.clamp(0, 1)).contiguous(memory_format=torch.channels_last)


def turn_hues(ink: Tensor, noise: Tensor) -> Tensor:
    """Mixes the inks [B, 3, S, S] of each picture anew, by weights that sum to 1: grey stays grey. noise [B, new, old]."""
    mixing = torch.eye(3) + noise - noise.mean(dim=2, keepdim=True)
    return torch.einsum("bij,bjhw->bihw", mixing.to(ink.device), ink)


# ------------------------------------------------------------------------------------------ model and loss


def initial_matcher(cfg: TrainConfig, captions: list[str]) -> Matcher:
    """A fresh matcher or the one of --init, with what shall not learn frozen."""
    matcher = loaded_matcher(cfg, captions) if cfg.init else build_matcher(PRESETS[cfg.preset], cfg.size, captions)
    for norm in (module for module in matcher.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 0.3         # torch's 0.1 lags behind weights that move so fast (docs/clip.md)
    freeze_named(matcher.model, cfg.freeze)
    return matcher


def loaded_matcher(cfg: TrainConfig, captions: list[str]) -> Matcher:
    """The one of --init, with one tower locked if asked."""
    matcher = Matcher.load(cfg.init)
    if matcher.size != cfg.size:
        raise UserError(f"--init {cfg.init}: reads pictures of size {matcher.size}; give --size {matcher.size}")
    norms = any(isinstance(m, nn.BatchNorm2d) for m in modules_of(matcher, "image"))
    if cfg.chunk and norms and cfg.lock != "image":
        raise UserError(f"--chunk {cfg.chunk}: this model has batch norm, which needs the whole batch")
    matcher.captions = list(dict.fromkeys(captions))
    if cfg.lora:
        add_lora(matcher.model, cfg.lora, cfg.lora_alpha or cfg.lora, CLIP_PROJECTIONS)
    for module in modules_of(matcher, cfg.lock):
        for p in module.parameters(recurse=False):
            p.requires_grad_(False)
    return matcher


TOWERS = {"image": ("vision_model", "visual", "image_encoder"), "text": ("text_model", "text_encoder"), "none": ()}


def modules_of(matcher: Matcher, side: str) -> list[nn.Module]:
    """All modules of the picture or the text tower; its projection is not part of it."""
    towers = [getattr(matcher.model, name) for name in TOWERS[side] if hasattr(matcher.model, name)]
    return [module for tower in towers for module in tower.modules()]


def recompute(matcher: Matcher, on: bool) -> None:
    """Transformers keep only what enters their blocks; a ResNet keeps all, as its batch norms must not see it twice."""
    blocks = [module for module in matcher.modules() if hasattr(module, "gradient_checkpointing")]
    if on and not blocks:
        raise UserError("--gradient-checkpointing: this model has no transformer that can compute twice")
    for module in blocks:
        module.gradient_checkpointing = on


def compile_towers(matcher: Matcher) -> None:
    for side in ("image", "text"):
        tower, *inside = modules_of(matcher, side)
        (inside[0] if isinstance(tower, nn.ModuleDict) else tower).compile()       # a ModuleDict is never called


def set_training(matcher: Matcher, lock: str) -> None:
    """Train mode, but for a locked tower: its batch norms keep their statistics, its dropout stays off.

    So do batch norms whose weights are frozen one by one.
    """
    matcher.train()
    norms = [m for m in matcher.modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.requires_grad]
    for module in [*norms, *modules_of(matcher, lock)]:
        module.training = False


def distribute(trained: nn.ModuleDict, cfg: TrainConfig, group: Group) -> nn.Module:
    """The loss as a module whose backward pass speaks with the other processes, if there are any."""
    model, loss = trained["matcher"].model, Loss(trained, match_loss)
    see_whole_batch(model, group)
    if not cfg.shard:
        return replicate(loss, group, unused=bool(cfg.init))
    blocks = [module for module in model.modules() if isinstance(module, (CLIPEncoderLayer, BertLayer))]
    shard([*blocks, *model.children()], group)              # all but the temperature and the bias, two numbers
    return loss


def match_loss(trained: nn.ModuleDict, pictures: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, group: Group,
               cfg: TrainConfig) -> Tensor:
    """The loss of the whole batch, of which these are this process's rows [B/n, ...]; labels [B] are all of them."""
    matcher = trained["matcher"]
    images, texts = matcher.encode_pictures(pictures), matcher.encode_tokens(ids, mask)
    return pair_loss(trained, group.gather(images), group.gather(texts), labels, cfg)


def pair_loss(trained: nn.ModuleDict, images: Tensor, texts: Tensor, labels: Tensor, cfg: TrainConfig) -> Tensor:
    """images, texts [B, E], labels [B]."""
    scale = trained["matcher"].model.logit_scale
    if cfg.loss == "siglip":
        return siglip_loss(texts @ images.T, scale, trained["bias"][0], labels)
    return contrastive_loss(texts @ images.T * scale.exp(), labels)


def chunked_backward(trained: nn.ModuleDict, pictures: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, group: Group,
                     cfg: TrainConfig, scaler: torch.amp.GradScaler) -> Tensor:
    """Fills the gradients of one batch chunk by chunk; returns the loss. Arguments as those of match_loss."""
    encoders = (trained["matcher"].encode_pictures, trained["matcher"].encode_tokens)

    def loss_of(images: Tensor, texts: Tensor) -> Tensor:
        return scaler.scale(pair_loss(trained, group.gather(images), group.gather(texts), labels, cfg))

    return cached_backward(encoders, ((pictures,), (ids, mask)), loss_of, cfg.chunk) / scaler.get_scale()


# ---------------------------------------------------------------------------------------------- evaluation


def examine(matcher: Matcher, twin: Matcher, shown: tuple[Pairs, Pairs], cfg: TrainConfig, group: Group,
            step: int) -> dict[str, float]:
    """`evaluate` on pairs trained on and held out, which leaves the model and, with --lora, its small file.

    twin: the matcher itself, or if its weights are shared out a copy that is to hold them.
    """
    out = Path(cfg.out)
    if cfg.lora and group.main:
        save_adapter(matcher.model, out / "lora", cfg.lora)
    with merged(matcher.model):                             # LoRA, if any
        scores = evaluate(matcher, *shown, out if group.main else None, step)
        if cfg.shard:
            gather_into(twin, matcher, group)
        if group.main:
            twin.save(out / "model")
    return scores


def evaluate(matcher: Matcher, train: Pairs, test: Pairs, out: Path | None, step: int) -> dict[str, float]:
    """R@1 and R@5 both ways, of the trained and of the held-out pictures, and the similarity matrix as a picture.

    Every picture against every distinct caption of the first column, trained or not; equal captions all count.
    """
    names = list(dict.fromkeys(train.captions[0] + test.captions[0]))
    texts = matcher.embed_texts(names)                                              # [M, E]
    scores = {}
    for prefix, pairs in (("", train), ("held_out_", test)):
        if not pairs.files:
            continue
        similarity = matcher.embed_pictures(pairs.pictures) @ texts.T               # [N, M]
        relevant = torch.tensor([names.index(c) for c in pairs.captions[0]])[:, None] == torch.arange(len(names))
        scores |= {prefix + name: value for name, value in retrieval(similarity, relevant).items()}
        if out is not None:
            draw_matrix(similarity, pairs, names, out / "matrix" / f"{prefix}{step:06d}.png")
    return scores


def mean_recall(scores: dict[str, float]) -> float:
    """What the best checkpoint is the best in: R@1 of both ways, of the pictures held out if there are any."""
    prefix = "held_out_" if "held_out_image_to_text_R@1" in scores else ""
    return (scores[f"{prefix}image_to_text_R@1"] + scores[f"{prefix}text_to_image_R@1"]) / 2


def retrieval(similarity: Tensor, relevant: Tensor) -> dict[str, float]:
    """similarity, relevant: [N pictures, M captions]. A caption without a picture here is not asked for."""
    asked = relevant.any(dim=0)
    ways = {"image_to_text": (similarity, relevant), "text_to_image": (similarity.T[asked], relevant.T[asked])}
    scores = {}
    for way, (s, r) in ways.items():
        place = ranks(s, r)
        scores |= {f"{way}_R@{k}": (place < k).double().mean().item() for k in (1, 5)}
        scores[f"{way}_chance"] = chance(r)
    return scores


def verdict(step: int, scores: dict[str, float], loss: float, blind: float, cfg: TrainConfig) -> str:
    """One line: the loss beside what it is worth, and a warning where it sits at the value of blind guessing."""
    parts = [f"step {step}:" + ("" if math.isnan(loss) else f" loss {loss:.3f},")]
    for prefix, name in (("", "R@1"), ("held_out_", "held out R@1")):
        if prefix + "image_to_text_R@1" in scores:
            one, other = scores[prefix + "image_to_text_R@1"], scores[prefix + "text_to_image_R@1"]
            by_chance = dict.fromkeys(f"{scores[f'{prefix}{way}_chance']:.3f}" for way in WAYS.values())
            parts.append(f"{name} picture to name {one:.3f}, name to picture {other:.3f} "
                         f"(chance {' and '.join(by_chance)})")
    if stuck(step, loss, blind, cfg):
        different = "" if blind > math.log(cfg.batch) - 1e-6 else f", {math.exp(blind):.0f} different captions a batch"
        parts.append(f"NOT LEARNING: the loss sits at {blind:.3f}, which is ln(batch){different}: all vectors are alike")
    return "  ".join(parts)


def stuck(step: int, loss: float, blind: float, cfg: TrainConfig) -> bool:
    """Whether an InfoNCE loss still is what blind guessing gives, well after the warm-up."""
    return cfg.loss == "infonce" and step >= cfg.warmup + 50 and loss > 0.97 * blind


def draw_matrix(similarity: Tensor, pairs: Pairs, names: list[str], path: Path, most: int = 16) -> None:
    """The similarity matrix as a PNG: pictures along the top, a row for each caption, dark where they match.

    At most `most` captions and pictures are drawn, those of the first captions.
    """
    shown = [i for i, c in enumerate(pairs.captions[0]) if c in names[:most]][:most]
    cell = max(24, min(64, 640 // len(shown)))
    values = similarity[shown][:, :most].T.clamp(-1, 1)                             # [M, N]
    heat = (values[:, :, None, None] * -1).expand(-1, -1, cell, cell)               # white is 1: dark where alike
    heat = heat.permute(0, 2, 1, 3).reshape(1, values.shape[0] * cell, len(shown) * cell).expand(3, -1, -1)
    small = F.interpolate(pairs.pictures[shown], size=(cell, cell), mode="bilinear", antialias=True)
    top = small.permute(1, 2, 0, 3).reshape(3, cell, len(shown) * cell)
    save_picture(torch.cat([top, heat], dim=1), path)


# ---------------------------------------------------------------------------------------- saving and telling


MAY_CHANGE = ("out", "data", "device", "resume", "checks", "threads", "compile", "gradient_checkpointing", "save_every",
              "keep", "workers", "shard", "chunk")


WAYS = {"picture to name": "image_to_text", "name to picture": "text_to_image"}


def write_report(out: Path, cfg: TrainConfig, metrics: Metrics, speed: Speed, parameters: int, train: Pairs,
                 test: Pairs) -> None:
    last = [row for row in metrics.rows if "image_to_text_R@1" in row][-1]
    sides = {"": f"{len(train.files)} trained pictures"}
    if test.files:
        sides["held_out_"] = f"{len(test.files)} pictures held out ({cfg.hold_out})"
    rows = [[side, way, *(f"{last[f'{prefix}{key}_{what}']:.3f}" for what in ("R@1", "R@5", "chance"))]
            for prefix, side in sides.items() for way, key in WAYS.items()]
    found = {f"{side}, {way}": metrics.series(f"{prefix}{key}_R@1")
             for prefix, side in sides.items() for way, key in WAYS.items()}
    parts = [
        f"<p>{parameters:,} parameters, step {last['step']} of {cfg.steps}, {speed.seconds():.0f} s.</p>",
        report.notes(metrics.rows),
        report.table(rows, ["", "", "R@1", "R@5", "R@1 by chance"]),
        "<h2>R@1</h2>", report.curve(found, "step", "R@1", log=False),
        "<h2>Loss</h2>",
        report.curve({"training loss": metrics.series("loss"), "all vectors alike": metrics.series("blind")}, "step",
                     "loss above its least value", log=False),
        "<p class='note'>Where all vectors are alike the loss is ln(batch), less what equal captions in a batch take "
        "off: a loss on that line means that nothing is learned, however it got there.</p>",
    ]
    names = "; ".join(list(dict.fromkeys(train.captions[0] + test.captions[0]))[:16])
    for prefix, side in sides.items():
        drawn = {step: out / "matrix" / f"{prefix}{step:06d}.png" for step, _ in metrics.series("image_to_text_R@1")}
        matrices = [report.picture(path, f"step {step}") for step, path in drawn.items() if path.exists()]
        parts += [f"<h2>Who is like whom: {side}</h2><p class='note'>Rows: {html.escape(names)}. Dark where alike.</p>",
                  f"<div class='row'>{''.join(matrices)}</div>"]
    others = [{k: v for k, v in row.items() if k != "loss" and "R@" not in k} for row in metrics.rows]   # drawn above
    parts += report.curves({"": (others, speed.metrics.rows)})
    parts += ["<h2>Settings</h2>", report.table(list(dataclasses.asdict(cfg).items()))]
    report.write_page(out / "report.html", f"Pictures and their names: {Path(cfg.data).name}", parts)


if __name__ == "__main__":
    run(lambda: main(parse_flags(TrainConfig, __doc__.split("\n\n")[0])))
