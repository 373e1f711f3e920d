"""Teach a run to draw twice as large: python -m train.train_upscaler --run out/calligraphy

Read after train_diffusion.py and minidiff/upscaler.py. Half a minute on a CPU: it learns from crops of the
run's own training images, read at twice the size, made small and worse again. Leaves the upscaler in
RUN/model/upscaler, which train.sample and all else that draws then use, and RUN/upscaler.png.
Paper: Ho 2021, "Cascaded diffusion models", section 4 (what the second model is given is made worse in
training, so that it mends what the first one does).
Shapes: B batch, C channels, S the run's image size, c crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.text_to_image import UPSCALER, TextToImage
from minidiff.upscaler import Upscaler, build_upscaler

from .data.augment import affine
from .data.folder import CaptionedImages
from .data.grid import save_grid
from .errors import UserError
from .optim import build_optimizers, descend, parameter_count, set_learning_rate
from .run.cli import MAX_SEED, check_flags, flag, model_folder, parse_flags, pick_device, read_settings, start
from .run.log import Progress
from .run.state import EMA

MOVES = {"degrees": 10, "translate": 0.06, "scale": 0.12, "shear": 8}       # of `affine`: more than the run's
NOISE = 0.5                 # the most that is added, by standard deviation
BLOT = (2.2, 3.5)           # smooth noise above so many of its deviations is a speck or a hole
PICTURE = "upscaler.png"
SHOWN = 10                  # images in it


@dataclass(frozen=True)
class UpscalerConfig:
    """The flags of train.train_upscaler."""

    run: str = flag("out/calligraphy", "run folder of train.train_diffusion")
    data: str = flag("", "training pictures; empty: those that the run names")
    steps: int = flag(120, "optimizer steps", at_least=1)
    batch: int = flag(40, "crops a step", at_least=1, at_most=100_000)
    crop: int = flag(32, "side of a crop, in pixels of the run's images", at_least=8, at_most=4096)
    contrast: float = flag(1.2, "of what it learns to draw: harder edges, for ink on paper; 1: as they are",
                           at_least=1, at_most=10)
    muon_lr: float = flag(0.02, "peak learning rate of matrices", above=0, at_most=10)
    lr: float = flag(1e-3, "of all other parameters", above=0, at_most=10)
    seed: int = flag(0, "one seed, one upscaler", at_least=0, at_most=MAX_SEED)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: UpscalerConfig) -> None:
    """Trains on crops by L1. Raises UserError, DataError, and WeightsError or ConfigError for the run."""
    check_flags(cfg)
    folder, device = model_folder(cfg.run), pick_device(cfg.device)
    large = open_large(cfg, TextToImage.load(folder)).to(device)                 # [N, C, 2S, 2S]
    torch.manual_seed(cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    upscaler = build_upscaler(large.shape[1]).to(device, memory_format=torch.channels_last)
    optimizers = build_optimizers(upscaler, "muon", cfg.lr, cfg.muon_lr)
    ema = EMA(upscaler.parameters(), 0.98)
    print(f"{len(large)} pictures; {parameter_count(upscaler):,} parameters", flush=True)

    progress = Progress(cfg.steps)
    for step in range(cfg.steps):
        set_learning_rate(optimizers, step, cfg.steps, warmup=10)
        target = draw_crops(large, cfg, generator)                          # [B, C, 2c, 2c]
        small = worsened(F.avg_pool2d(target, 2), generator)                # [B, C, c, c]
        loss = F.l1_loss(upscaler(small), contrasted(target, cfg.contrast))
        descend(loss, upscaler, optimizers)
        ema.update(step)
        progress.show(step + 1, f"loss {loss.item():.4f}")
    progress.close()

    with ema:
        upscaler.eval().save(folder / UPSCALER)
        show(upscaler, large, cfg, generator)
    print(f"the run now draws {large.shape[-1]} x {large.shape[-1]}; open {Path(cfg.run) / PICTURE}")


def open_large(cfg: UpscalerConfig, model: TextToImage) -> Tensor:
    """The training images at twice the run's size [N, C, 2S, 2S]. Raises UserError where they do not fit."""
    size, channels, _ = model.format
    if not 8 <= cfg.crop <= size or size % 2 or cfg.crop % 2:
        raise UserError(f"--crop {cfg.crop}: even, and at most the {size} pixels of {cfg.run}'s images")
    run = read_settings(Path(cfg.run), data=str, caption_column=str)
    data = CaptionedImages(cfg.data or run["data"], 2 * size, channels, run["caption_column"])
    return data.images()


def draw_crops(large: Tensor, cfg: UpscalerConfig, generator: torch.Generator) -> Tensor:
    """Random images, moved and turned, and a random part of each: [B, C, 2c, 2c]."""
    chosen = torch.randint(len(large), (cfg.batch,), generator=generator)
    moved = affine(large[chosen], torch.rand(cfg.batch, 6, generator=generator), **MOVES)
    side = 2 * cfg.crop
    corners = torch.randint((large.shape[-1] - side) // 2 + 1, (cfg.batch, 2), generator=generator) * 2
    return torch.stack([image[:, y:y + side, x:x + side]
                        for image, (y, x) in zip(moved, corners.tolist(), strict=True)])


def contrasted(images: Tensor, factor: float) -> Tensor:
    """In -1..1: fewer greys between ink and paper, which turning has made more of."""
    return (images * factor).clamp(-1, 1)


def worsened(images: Tensor, generator: torch.Generator) -> Tensor:
    """[B, C, c, c] as a diffusion model might have drawn them: soft, noisy, with specks and holes."""
    def amount(low: float, high: float) -> Tensor:
        return (torch.rand(len(images), 1, 1, 1, generator=generator) * (high - low) + low).to(images)

    def noise() -> Tensor:
        return torch.randn(images.shape, generator=generator).to(images)

    soft = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = torch.lerp(images, soft, amount(0, 1))
    fine, coarse = noise(), blurred(noise())
    images = images + torch.where(amount(0, 1) < 0.5, fine, coarse) * amount(0, NOISE)
    blots = blurred(noise())
    images = torch.where(blots > amount(*BLOT), amount(-1, 1), images)
    images = torch.where(blots < -amount(*BLOT), amount(0, 1), images)
    return images.clamp(-1, 1)


def blurred(noise: Tensor) -> Tensor:
    """The mean of each 3 x 3 pixels, of the deviation that single ones have."""
    return 3 * F.avg_pool2d(noise, 3, stride=1, padding=1)


@torch.no_grad()
def show(upscaler: Upscaler, large: Tensor, cfg: UpscalerConfig, generator: torch.Generator) -> None:
    """Leaves whole images, made small and worse, what the upscaler makes of them, and as they were."""
    large = large[:SHOWN]
    small = worsened(F.avg_pool2d(large, 2), generator)
    rows = F.interpolate(small, scale_factor=2.0, mode="nearest"), upscaler(small), large
    save_grid(torch.cat(rows), Path(cfg.run) / PICTURE, columns=len(large))


if __name__ == "__main__":
    start(lambda: main(parse_flags(UpscalerConfig, __doc__.split("\n\n")[0])))
