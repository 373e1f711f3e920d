"""Train a diffusion model from scratch on a folder of images with captions, a few dozen images being enough.

    python -m train.train_diffusion --data data/calligraphy --out out/calligraphy

Read after minidiff/text_to_image.py, whose forward is the loss.
Papers: Ho 2020 (Algorithm 1), Ho 2022 (dropped captions for guidance), Kingma 2021 (evenly spread timesteps),
Liu 2022 (--objective flow).
Leaves a run folder: report.html, metrics.jsonl, speed.jsonl, samples/, config.json,
checkpoint.pt and those before it (everything needed to go on), best.pt and model/ (the EMA weights in
upstream's layout, all that train.sample needs).
More processes, memory and precision: docs/training.md.
Shapes: N images, B a batch, b this process's rows of it, C image channels, S image size, f fold, L = C*f*f,
h = w = S/f.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from minidiff.attention import Transformer2DModel
from minidiff.lora import FILE as LORA_FILE
from minidiff.objective import OBJECTIVES, objective_in
from minidiff.resnet import ResnetBlock2D
from minidiff.text_to_image import FILE, PRESETS, ImageFormat, TextToImage, build_text_to_image

if not __package__:                                         # python train/train_diffusion.py
    __package__ = "train"

from .data.augment import affine
from .data.batches import InMemory, Skipped, Streamed, checksums, from_dataset, preview
from .data.folder import CaptionedImages, Stream
from .data.grid import grid_columns, save_grid
from .data.summary import summary
from .errors import UserError
from .latent import LatentTextToImage, load_pipeline
from .lora import add_lora, merged, save_lora
from .optim import build_optimizers, parameter_count, set_learning_rate
from .pages import SHOWN, write_diffusion_report
from .run import distributed
from .run.cli import changed, describe_machine, flag, parse_flags, pick_device, start
from .run.distributed import FullCopy, Ranks, synchronized
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
from .strokes import Scaling, affine_tokens, build_stroke_writer, holds_strokes, read_strokes, tokens_of
from .validation import validate

SAMPLE_BATCH = 20       # samples on the way that go through the UNet together
NOISE_BIAS = 5.0        # at first, of fresh models of images (docs/experiments.md)


@dataclass(frozen=True)
class TrainConfig(TrainSettings):
    """The flags of train.train_diffusion."""

    data: str = changed(TrainSettings, "data", default="data/calligraphy")
    out: str = changed(TrainSettings, "out", default="out/calligraphy")
    channels: int = flag(1, "1 for grey, 3 for colour", section=DATA, choices=(1, 3))
    fold: int = flag(2, "pixel unshuffle: each f x f square of pixels becomes channels", section=DATA,
                     at_least=1, at_most=64)
    preset: str = changed(TrainSettings, "preset", default="small", choices=tuple(PRESETS))
    steps: int = changed(TrainSettings, "steps", default=220)
    ema: float = changed(TrainSettings, "ema", default=0.98)
    objective: str = flag("diffusion", "what a model learns: diffusion (v; sampled by DDIM) or flow "
                          "(eps - x0 on straight paths; by Euler)", section=MODEL,
                          choices=("diffusion", "flow"))
    caption_drop: float = flag(0.1, "share of images trained without caption, for guidance", section=MODEL,
                               at_least=0, at_most=1)
    noise_bias: float = flag(0.0, "above 1 training sees much noise more often at first, and all timesteps "
                             "evenly at the end; 0: 5, but 1 with --init and for strokes", section=MODEL,
                             at_least=0, at_most=100)
    jitter: bool = changed(TrainSettings, "jitter", help="small random rotations, shifts, scalings")
    jitter_amount: float = flag(0.5, "how far: 1 is up to 3 degrees, 3 %% of the side and 5 %% of the size",
                                section=MODEL, at_least=0, at_most=10)
    flip: bool = changed(TrainSettings, "flip", help="mirror half of the images; never for writing")
    samples: int = flag(2, "how many times on the way to write a grid of samples and validate",
                        section=EVALUATION, at_least=0, at_most=1000, may_change=True)
    sample_steps: int = flag(8, "denoising steps for those samples", section=EVALUATION, at_least=1,
                             at_most=1000, may_change=True)
    guidance: float = flag(1.5, "guidance for those samples", section=EVALUATION, at_least=-1000,
                           at_most=1000, may_change=True)
    accumulate: int = flag(1, "go through a batch in so many parts, to save memory", section=MACHINE,
                           at_least=1, may_change=True)
    init: str = changed(TrainSettings, "init",
                        help="start from this: a run's model folder, an SD 1, SD 2, SDXL or "
                        "inpainting folder, or one file of its weights")
    tokenizer: str = flag("", "tokenizer of an --init that is a single file", section=OTHERS)


def main(cfg: TrainConfig, dataset: Dataset | None = None) -> None:
    """Trains. dataset: in place of the folder cfg.data, from Python; see `from_dataset`."""
    check(cfg)
    ranks = distributed.init(pick_device(cfg.device))
    check_processes(cfg, ranks.size, cfg.accumulate)
    out = claim(cfg, ranks)
    data = open_data(cfg, ranks, dataset)
    check_same_on_all_ranks(cfg, data.fingerprint, ranks)
    model, data = build_model(cfg, data, ranks)
    full = FullCopy(model, ranks, cfg.shard)                                # what is saved
    loss_fn = ranks.wrap(model, modules_to_shard(model) if cfg.shard else [])
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, cfg.muon_lr)
    state = TrainState.begin(cfg, data.fingerprint, model, optimizers, ranks.device)
    run = Run("train_diffusion", cfg, state, ranks, cfg.samples)
    batches = open_batches(cfg, data, ranks)

    for step in run.steps():                            # one turn more, for the last evaluation and save
        if run.is_evaluation(step):
            with state.ema:
                scores = evaluate_and_save(model, full, data, cfg, ranks, step)
            run.evaluated(step, scores, scores["val"])
        if run.is_save(step):
            run.save()
        if run.is_report(step):
            write_diffusion_report(run, data.captions, parameter_count(model))
        if run.is_over(step):
            break

        lr = set_learning_rate(optimizers, step, cfg.steps, cfg.warmup)
        indices, images = batches.batch(step, state.generator)              # x0 ~ q(x0)
        batch = draw(model, step, indices, images, data, cfg, ranks, state.generator)       # t, eps
        loss = forward_backward(loss_fn, batch, cfg, state, ranks.device)   # || target - answer(x_t, t) ||^2
        norm = state.clip_gradients(cfg.clip)
        loss = run.agreed(loss)
        run.check_finite(loss, norm, lr)
        state.update(norm)
        state.ema.update(step)
        run.log(step, loss, grad_norm=norm, lr=lr)

    if run.close():
        seconds, skipped = run.speed.seconds(), data.skipped.summary()
        ranks.print0(f"done in {seconds:.0f} s{skipped}: open {out / 'report.html'}")


def check(cfg: TrainConfig) -> None:
    """Refuses what cannot work, in one line, before any work starts."""
    check_together(cfg)
    multiple = cfg.fold * 2 ** (len(PRESETS[cfg.preset].block_out_channels) - 1)
    if not cfg.init and cfg.size % multiple:
        raise UserError(f"--size {cfg.size}: preset {cfg.preset} with --fold {cfg.fold} takes multiples of "
                        f"{multiple}")
    if cfg.tokenizer and (not cfg.init or Path(cfg.init).is_dir()):
        raise UserError(f"--tokenizer {cfg.tokenizer}: only for an --init that is a single file")
    if cfg.init and not (Path(cfg.init) / FILE).exists():
        check_latent(cfg)
    else:
        check_objective(cfg)


def check_objective(cfg: TrainConfig) -> None:
    """Refuses to go on with weights that learned by the other objective."""
    folder = Path(cfg.init) if cfg.init else Path(cfg.out) / "model"
    if (cfg.init or cfg.resume) and (folder / "scheduler").is_dir():
        learned = objective_in(folder / "scheduler")
        if learned != cfg.objective:
            other = f"--objective {learned}" if OBJECTIVES[learned].fresh else "the run it was taught by"
            raise UserError(f"--objective {cfg.objective}: {folder} learned by {learned}; give {other}")


def check_latent(cfg: TrainConfig) -> None:
    """What an --init of others, whose images are encoded once, cannot do."""
    if not Path(cfg.init).exists():
        raise UserError(f"--init {cfg.init}: no such file or folder")
    if cfg.objective != "diffusion":
        raise UserError(f"--objective {cfg.objective}: not with --init {cfg.init}, which diffusion trained")
    if cfg.stream:
        raise UserError(f"--stream: not with --init {cfg.init}, whose latents are encoded once and kept")
    if cfg.jitter or cfg.flip or cfg.channels != 3:
        raise UserError(f"--init {cfg.init}: its latents are encoded once: give --no-jitter, no --flip and "
                        "--channels 3")
    if Path(cfg.init).is_file() and not cfg.tokenizer:
        raise UserError(f"--init {cfg.init}: a single file holds no tokenizer; give --tokenizer")


# --------------------------------------------------------------------------------------------- data and model


class Data(NamedTuple):
    """What `open_data` found; `build_model` may put latents in place of the images."""

    captions: list[str]             # of all N images
    images: Tensor                  # [N, C, S, S] in -1..1 or, of a stream, some to evaluate on
    image_captions: list[str]       # of `images`
    complete: bool                  # whether these are all images
    fingerprint: dict[str, int]
    skipped: Skipped                # broken files
    folder: CaptionedImages | None  # to stream from
    strokes: Scaling | None = None  # where `images` are stroke tokens [N, F, K, 1]


def open_data(cfg: TrainConfig, ranks: Ranks, dataset: Dataset | None = None) -> Data:
    """The images and captions of a folder, or of a dataset given from Python."""
    out = Path(cfg.out)
    skipped = Skipped(out, ranks, cfg.resume)
    if dataset is None and holds_strokes(cfg.data):
        return open_strokes(cfg, ranks, skipped)
    if dataset is not None:
        images, captions = from_dataset(dataset, cfg.size, cfg.channels)
        seen = fingerprint(checksums(images), captions)
        return Data(captions, images.to(ranks.device), captions, True, seen, skipped, None)
    folder = CaptionedImages(cfg.data, cfg.size, cfg.channels, cfg.caption_column,
                             index=out / "index.json" if cfg.stream else None)
    captions, files = folder.captions, [str(entry.path) for entry in folder.entries]
    if ranks.main:
        lines = summary(cfg.data, files, {cfg.caption_column: captions}, cfg.size, cfg.channels)
        print(*lines, sep="\n", flush=True)
    names = [Path(file).relative_to(cfg.data).as_posix() for file in files]
    images, rows = preview(folder) if cfg.stream else (folder.images(), range(len(captions)))
    return Data(captions, images.to(ranks.device), [captions[i] for i in rows], not cfg.stream,
                fingerprint(names, captions), skipped, folder)


def open_strokes(cfg: TrainConfig, ranks: Ranks, skipped: Skipped) -> Data:
    """The characters of a folder of strokes, as tokens; captions such as 春 楷書."""
    for name, usual in (("stream", False), ("flip", False), ("init", "")):
        if getattr(cfg, name) != usual:
            raise UserError(f"--{name}: not with {cfg.data}, which holds strokes")
    characters, files = read_strokes(cfg.data)
    tokens, scaling = tokens_of(characters)
    captions = [f"{character.char} {character.hand}" for character in characters]
    names = [file.relative_to(cfg.data).as_posix() for file in files]
    seen = fingerprint(names, captions)
    return Data(captions, tokens.to(ranks.device), captions, True, seen, skipped, None, scaling)


def open_batches(cfg: TrainConfig, data: Data, ranks: Ranks) -> InMemory | Streamed:
    """This process's rows of the images or latents, on its device, from memory or a stream."""
    rows = ranks.local_rows(cfg.batch)
    if not cfg.stream:
        return InMemory(data.images, cfg.batch, rows)
    stream = Stream(data.folder, cfg.batch, cfg.seed, cfg.steps, rows)
    return Streamed(stream, cfg.workers, data.skipped, ranks.device)


def build_model(cfg: TrainConfig, data: Data, ranks: Ranks) -> tuple[TextToImage, Data]:
    """A fresh model or the one of --init, on its device, and the data as it takes them: perhaps latents."""
    torch.manual_seed(cfg.seed)
    model = initial_model(cfg, data.captions, data.strokes)
    for part in model.children():
        if part is not model.unet:
            part.to(ranks.device)
    if not cfg.shard:                   # else FSDP takes it, block by block: it may not fit in one piece
        model.unet.to(ranks.device, memory_format=torch.channels_last)      # convolutions run faster so
    model.unet.enable_gradient_checkpointing(cfg.gradient_checkpointing)
    if cfg.compile:
        model.unet.compile()
    if isinstance(model, LatentTextToImage):                # its images are encoded once for all
        key = f"{cfg.size}-{data.fingerprint['checksum']:08x}"
        data = data._replace(images=model.cache_latents(data.images, Path(cfg.out) / "cache", key))
    ranks.print0(f"{len(data.captions)} pictures, {len(model.captions)} captions; "
                 f"{parameter_count(model):,} parameters; {describe_machine(ranks.device, ranks.size)}")
    return model, data


def initial_model(cfg: TrainConfig, captions: list[str], strokes: Scaling | None = None) -> TextToImage:
    """A fresh model or the one of --init, with what shall not learn frozen."""
    format = ImageFormat(cfg.size, cfg.channels, cfg.fold)
    if strokes is not None:
        model = build_stroke_writer(strokes, captions, OBJECTIVES[cfg.objective].fresh(clip=False))
    elif not cfg.init:
        model = build_text_to_image(PRESETS[cfg.preset], format, captions, OBJECTIVES[cfg.objective].fresh())
    elif (Path(cfg.init) / FILE).exists():
        model = TextToImage.load(cfg.init).train()
        model.upscaler = None                               # learned for the weights that now change
        if model.format != format:
            raise UserError(f"--init {cfg.init}: give --size, --channels and --fold {tuple(model.format)}")
        model.captions = list(dict.fromkeys(captions))
    else:
        model = LatentTextToImage(load_pipeline(cfg.init, cfg.tokenizer), cfg.size, captions)
        if cfg.size % model.size_multiple:
            raise UserError(f"--size {cfg.size}: --init {cfg.init} takes multiples of {model.size_multiple}")
    if cfg.lora:
        model.requires_grad_(False)
        add_lora(model.unet, cfg.lora, cfg.lora_alpha or cfg.lora)
    freeze_named(model, cfg.freeze)
    return model


def modules_to_shard(model: TextToImage) -> list[nn.Module]:
    """For FSDP, from the inside out. A latent model has its captions encoded, and needs no text encoder."""
    blocks = [m for m in model.unet.modules() if isinstance(m, (ResnetBlock2D, Transformer2DModel))]
    return [*blocks, model.unet, *([] if isinstance(model, LatentTextToImage) else [model.text_encoder])]


# -------------------------------------------------------------------------------------------- a training step


class Batch(NamedTuple):
    """The arguments of TextToImage.forward, for this process's rows."""

    x0: Tensor                      # [b, L, h, w]
    prompts: list[str]
    t: Tensor                       # [b]
    noise: Tensor                   # [b, L, h, w]
    inpaint: dict[str, Tensor]      # of inpainting models

    def split(self, parts: int) -> list[Batch]:
        """Equal parts of the rows."""
        n = len(self.prompts) // parts
        rows = [slice(i * n, (i + 1) * n) for i in range(parts)]
        return [Batch(self.x0[r], self.prompts[r], self.t[r], self.noise[r],
                      {k: v[r] for k, v in self.inpaint.items()}) for r in rows]


def draw(model: TextToImage, step: int, indices: Tensor, images: Tensor, data: Data, cfg: TrainConfig,
         ranks: Ranks, generator: torch.Generator) -> Batch:
    """All random numbers of a step: for the whole batch, in a fixed order; this process keeps its rows.

    indices [b], images [b, C, S, S]. The B timesteps are spread over the schedule, one in each B-th part of
    u in 0..1, at u^(1 / noise_bias of the step): less variance than B free draws.
    """
    B, own = cfg.batch, ranks.local_rows(cfg.batch)
    jitter = torch.rand(B, 6, generator=generator)[own] if cfg.jitter else None
    dropped = (torch.rand(B, generator=generator) < cfg.caption_drop)[own].tolist()     # Ho 2022, Algorithm 1
    even = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    t = model.scheduler.timesteps_at(even ** (1 / noise_bias(cfg, data, step)))[own]
    noise = torch.randn(B, *model.latent_shape, generator=generator)[own]
    masks = model.draw_masks(B, generator)[own]
    if jitter is not None:
        images = (affine(images, 0.5 + cfg.jitter_amount * (jitter - 0.5), flip=cfg.flip)
                  if data.strokes is None else affine_tokens(images, jitter, data.strokes))
    x0 = model.to_x0(images)
    prompts = ["" if drop else data.captions[i] for i, drop in zip(indices.tolist(), dropped, strict=True)]
    return Batch(x0, prompts, t, noise, model.inpaint_input(indices, masks))


def noise_bias(cfg: TrainConfig, data: Data, step: int) -> float:
    """How much more often this step sees much noise: from the setting, or what 0 stands for, down to 1.

    Which caption means which of a few pictures is learned last, and from much noise, where nothing else
    tells; clean strokes are learned from little noise, while the learning rate falls. What others trained,
    and strokes, learn evenly.
    """
    first = cfg.noise_bias or (1.0 if cfg.init or data.strokes is not None else NOISE_BIAS)
    return first + (1 - first) * min(step / cfg.steps, 1)


def forward_backward(loss_fn: nn.Module, batch: Batch, cfg: TrainConfig, state: TrainState,
                     device: torch.device) -> float:
    """Leaves the gradients of the loss, which it returns; part by part, if memory is short."""
    state.zero_grad()
    total, parts = 0.0, batch.split(cfg.accumulate)
    for part in parts:
        with synchronized(loss_fn, now=part is parts[-1]):
            with autocast(cfg.precision, device):
                loss = loss_fn(*part) / len(parts)
            state.backward(loss)
        total += loss.item()
    return total


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate_and_save(model: TextToImage, full: FullCopy, data: Data, cfg: TrainConfig, ranks: Ranks,
                      step: int) -> dict[str, float]:
    """Validation errors; leaves samples, the model and, with --lora, its small file in the run folder."""
    out = Path(cfg.out)
    if cfg.lora and ranks.main:
        save_lora(model.unet, out / "lora" / LORA_FILE)
    with merged(model.unet):                                # LoRA, if any
        model.eval()
        prompts = model.captions[:SHOWN]
        grid = model.sample(prompts, cfg.seed, cfg.sample_steps, cfg.guidance,
                            batch=min(SAMPLE_BATCH, model.max_batch))
        scores = validate(model, data.images, data.image_captions, data.complete)
        saved = full.gather()
        if ranks.main:
            save_grid(grid, out / "samples" / f"{step:06d}.png", columns=grid_columns(len(grid)))
            saved.save(out / "model")
    return scores


if __name__ == "__main__":
    start(lambda: main(parse_flags(TrainConfig, __doc__.split("\n\n")[0])))
