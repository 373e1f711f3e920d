"""Teach a run to draw in 1 to 4 steps: python -m train.distill --run out/calligraphy --out out/quick

Read after train_diffusion.py and minidiff/samplers/lcm.py. A student begins as a copy of the run, its
teacher. From a noisy picture the teacher takes one guided step of DDIM; the student's guess of the clean
picture before the step shall be its own guess after it. So all points of a path come to lead to the same end,
in one step. Leaves a run folder: model/, which draws by LCM, config.json, and distilled.png: 1, 2 and 4 steps
beside the teacher's 30.
Papers: Song 2023 (consistency distillation, Algorithm 2), Luo 2023 (with guidance, Algorithm 1; its w is
guidance - 1), Song 2024 (pseudo-Huber loss).
Shapes: N training images, B batch, L latent channels, h w latent size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from miniclip.weights import write_json
from minidiff.optimize import optimize
from minidiff.samplers import DDPMScheduler, LCMScheduler
from minidiff.schedule import Sampler, to_eps, to_x0
from minidiff.text_to_image import TextToImage

from .data.augment import affine
from .data.batches import draw_indices
from .data.folder import CaptionedImages
from .data.grid import save_grid
from .errors import UserError
from .optim import build_optimizers, descend, set_learning_rate
from .run.cli import MAX_SEED, check_flags, flag, model_folder, parse_flags, pick_device, read_settings, start
from .run.folder import MARKS, clear, make_folder
from .run.log import Progress
from .run.state import EMA

EMA_DECAY = 0.5             # of the student whose guess is the goal: 0 drifts, 0.95 is slow
SMALL = 0.03                # of the pseudo-Huber loss: squares errors below it, takes larger ones as they are
PICTURE = "distilled.png"
SHOWN = 10                  # captions in it


@dataclass(frozen=True)
class DistillConfig:
    """The flags of train.distill."""

    run: str = flag("out/calligraphy", "run folder of train.train_diffusion: the teacher")
    out: str = flag("out/quick", "run folder to write")
    data: str = flag("", "training pictures; empty: those that the run names")
    steps: int = flag(160, "optimizer steps", at_least=1)
    batch: int = flag(20, "images a step", at_least=1, at_most=100_000)
    guidance: float = flag(1.5, "of the teacher's steps: the student learns to draw as if guided so",
                           at_least=-1000, at_most=1000)
    points: int = flag(12, "timesteps that it learns to draw from, evenly spread", at_least=1, at_most=1000)
    muon_lr: float = flag(0.01, "peak learning rate of matrices", above=0, at_most=10)
    lr: float = flag(5e-4, "of all other parameters", above=0, at_most=10)
    seed: int = flag(0, "one seed, one student", at_least=0, at_most=MAX_SEED)
    overwrite: bool = flag(False, "begin anew in a folder that holds a run, which is removed")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: DistillConfig) -> None:
    """Distils. Raises UserError, DataError, and WeightsError or ConfigError for the run."""
    check_flags(cfg)
    settings = read_settings(Path(cfg.run), data=str, caption_column=str)
    teacher = open_teacher(cfg).to(pick_device(cfg.device))
    data = CaptionedImages(cfg.data or settings["data"], teacher.format.size, teacher.format.channels,
                           settings["caption_column"])
    images, out = data.images().to(teacher.device), make_folder(cfg.out)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    student = student_of(teacher, cfg.points)
    optimizers = build_optimizers(student, "muon", cfg.lr, cfg.muon_lr)
    ema = EMA(student.parameters(), EMA_DECAY)

    progress = Progress(cfg.steps)
    for step in range(cfg.steps):
        set_learning_rate(optimizers, step, cfg.steps, warmup=10)
        batch = draw(images, data.captions, teacher, cfg, generator)
        loss = consistency_loss(student, ema, teacher, batch, cfg.guidance)
        descend(loss, student, optimizers)
        ema.update(step)
        progress.show(step + 1, f"loss {loss.item():.4f}")
    progress.close()

    clear(out)                                              # an upscaler of before would draw on
    with ema:
        student.eval().save(out / "model")
        write_json(out / "config.json", {**settings, "data": cfg.data or settings["data"], "out": cfg.out})
        show(student, teacher, cfg, out)
    print(f"{cfg.out} draws in 1 to 4 steps, as in python -m train.sample --run {cfg.out} --steps 1; "
          f"open {out / PICTURE}")


def open_teacher(cfg: DistillConfig) -> TextToImage:
    """The run's model, which learns no more. Raises UserError for what cannot teach, or be written over."""
    teacher = TextToImage.load(model_folder(cfg.run))
    if type(teacher.scheduler) is not DDPMScheduler:
        raise UserError(f"--run {cfg.run}: trained by {type(teacher.scheduler).__name__}; only a run of "
                        "--objective diffusion is distilled")
    if cfg.points > len(teacher.scheduler):
        raise UserError(f"--points {cfg.points}: the run knows {len(teacher.scheduler)} timesteps")
    out = Path(cfg.out)
    inside = model_folder(cfg.run).resolve().is_relative_to(out.resolve())
    if inside or (not cfg.overwrite and any(found for mark in MARKS for found in out.glob(mark))):
        raise UserError(f"--out {cfg.out}: holds a model already; give another, or --overwrite for one that "
                        "is not the teacher")
    return optimize(teacher.requires_grad_(False))


def student_of(teacher: TextToImage, points: int) -> TextToImage:
    """A copy that learns, and draws by LCM from `points` timesteps."""
    scheduler = LCMScheduler.from_config(teacher.scheduler.config, original_inference_steps=points,
                                         clip_sample=teacher.scheduler.config.clip_sample)
    student = TextToImage(copy.deepcopy(teacher.unet), copy.deepcopy(teacher.text_encoder), teacher.tokenizer,
                          scheduler, teacher.format, teacher.captions, teacher.upscaler)
    student.unet.requires_grad_(True).to(memory_format=torch.channels_last)
    student.text_encoder.requires_grad_(True)
    return student.train()


# -------------------------------------------------------------------------------------------- a training step


class Batch(NamedTuple):
    """Noisy pictures, and where on their paths they are."""

    x_t: Tensor             # [B, L, h, w]
    prompts: list[str]
    t: Tensor               # [B], timesteps
    s: Tensor               # [B], those before, with less noise; -1: none


def draw(images: Tensor, captions: list[str], teacher: TextToImage, cfg: DistillConfig,
         generator: torch.Generator) -> Batch:
    """Training images [N, C, S, S], moved a little, with the noise of points evenly spread over the path."""
    B, stride = cfg.batch, len(teacher.scheduler) // cfg.points
    chosen = draw_indices(len(images), B, generator)
    moved = affine(images[chosen.to(images.device)], 0.25 + 0.5 * torch.rand(B, 6, generator=generator))
    x0 = teacher.to_x0(moved)
    even = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator)) / B
    t = stride * ((even * cfg.points).long().clamp(max=cfg.points - 1) + 1) - 1
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    x_t = teacher.scheduler.add_noise(x0, noise, t)
    return Batch(x_t, [captions[i] for i in chosen.tolist()], t, t - stride)


def consistency_loss(student: TextToImage, ema: EMA, teacher: TextToImage, batch: Batch,
                     guidance: float) -> Tensor:
    """How far the student's guess lies from its mean's guess one step on: pseudo-Huber, a scalar."""
    with torch.no_grad():
        x_s = ddim_step(teacher, batch, guidance)
        with ema:
            goal = guess(student, x_s, batch.s, batch.prompts).clamp(-1, 1)
    error = guess(student, batch.x_t, batch.t, batch.prompts) - goal
    return ((error.square() + SMALL**2).sqrt() - SMALL).mean()


def guess(model: TextToImage, x: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
    """The clean picture [B, L, h, w] behind x [B, L, h, w] at timesteps t [B]; x itself where t is -1."""
    output = model.predict(x.contiguous(memory_format=torch.channels_last), t.clamp(min=0),
                           model.conditioning(prompts))
    x0 = to_x0(model.scheduler.prediction_kind, output, x, *levels(model.scheduler, t, x))
    return torch.where((t < 0).to(x.device)[:, None, None, None], x, x0)


def ddim_step(teacher: TextToImage, batch: Batch, guidance: float) -> Tensor:
    """x_t -> x_s [B, L, h, w], each row from its own t to its own s (Song 2021, eq. 12 without noise)."""
    x, B = batch.x_t, len(batch.prompts)
    conditioning = teacher.conditioning([""] * B + batch.prompts)
    free, guided = teacher.predict(torch.cat([x, x]), torch.cat([batch.t, batch.t]), conditioning).chunk(2)
    output = free + guidance * (guided - free)
    alpha, sigma = levels(teacher.scheduler, batch.t, x)
    x0 = teacher.scheduler.clip_x0(to_x0(teacher.scheduler.prediction_kind, output, x, alpha, sigma))
    eps = to_eps("sample", x0, x, alpha, sigma)         # of the clipped x0, as in sampling
    alpha, sigma = levels(teacher.scheduler, batch.s, x)
    return alpha * x0 + sigma * eps


def levels(scheduler: Sampler, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at timesteps t [B], shaped to multiply x; 1 and 0 where t is -1."""
    alpha_bar = torch.where(t < 0, 1.0, scheduler.alphas_cumprod[t.clamp(min=0)]).to(x)[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def show(student: TextToImage, teacher: TextToImage, cfg: DistillConfig, out: Path) -> None:
    """Leaves the same captions and seeds, drawn in 1, 2 and 4 steps, and by the teacher in 30."""
    prompts = student.captions[:SHOWN]
    rows = [student.sample(prompts, cfg.seed, steps) for steps in (1, 2, 4)]
    rows.append(teacher.sample(prompts, cfg.seed, 30, cfg.guidance))
    save_grid(torch.cat(rows), out / PICTURE, columns=len(prompts))


if __name__ == "__main__":
    start(lambda: main(parse_flags(DistillConfig, __doc__.split("\n\n")[0])))
