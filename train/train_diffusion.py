"""Train a diffusion model from scratch on a folder of pictures with captions, a few dozen pictures being enough.

    python -m train.train_diffusion --data data/calligraphy --out out/calligraphy

Read after writer.py. Papers: Ho 2020 (Algorithm 1), Salimans 2022 (v-prediction), Nichol 2021 (cosine schedule),
Lin 2023 (zero terminal SNR, so that paper comes out white), Ho 2022 (caption dropout for guidance).
Leaves a run folder: report.html, metrics.jsonl, samples/, config.json, checkpoint.pt (everything needed to go on)
and model/ (the EMA weights in upstream's layout, all that train.sample needs).
Shapes: B batch, C picture channels, S picture size, f fold, [B, C*f*f, S/f, S/f] inside the UNet.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.folder import PictureFolder, jitter
from miniclip.weights import atomic_write, write_json
from minidiff import DDPMScheduler
from train import report
from train.common import (
    EMA,
    Metrics,
    Progress,
    StopFlag,
    UserError,
    describe_machine,
    flag,
    grid_columns,
    load_checkpoint,
    make_folder,
    parse_flags,
    pick_device,
    run,
    save_checkpoint,
    save_grid,
)
from train.optim import build_optimizers, set_learning_rate
from train.writer import PRESETS, PictureFormat, Writer, build_writer


@dataclass(frozen=True)
class TrainConfig:
    data: str = flag("data/calligraphy", "folder of pictures: captions.csv, or one folder for each class")
    out: str = flag("out/calligraphy", "run folder to write")
    caption_column: str = flag("caption", "column of captions.csv that holds the captions")
    size: int = flag(64, "pictures are S x S")
    channels: int = flag(1, "1 for grey, 3 for colour", choices=(1, 3))
    fold: int = flag(2, "fold each f x f square of pixels into channels")
    preset: str = flag("small", "size of the model", choices=tuple(PRESETS))
    steps: int = flag(400, "optimizer steps")
    batch: int = flag(20, "pictures a step")
    optimizer: str = flag("muon", "muon (learns faster on few pictures) or adamw", choices=("muon", "adamw"))
    lr: float = flag(1e-3, "peak learning rate of AdamW")
    muon_lr: float = flag(0.02, "peak learning rate of Muon")
    warmup: int = flag(20, "steps of linear warm-up")
    ema: float = flag(0.98, "largest decay of the weights' running mean")
    clip: float = flag(1.0, "clip the gradient's norm to this")
    caption_drop: float = flag(0.1, "share of pictures trained without caption, for guidance")
    jitter: bool = flag(True, "small random rotations, shifts, scalings")
    flip: bool = flag(False, "mirror half of the pictures; never for writing")
    samples: int = flag(4, "how many times on the way to write a grid of samples and validate")
    sample_steps: int = flag(15, "denoising steps for those samples")
    guidance: float = flag(1.3, "guidance for those samples")
    seed: int = flag(0, "one seed, one result (on one machine, on the CPU)")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    resume: bool = flag(False, "go on from the run folder's checkpoint")


def main(cfg: TrainConfig) -> None:
    check(cfg)
    # ---- device and data
    device = pick_device(cfg.device)
    out = make_folder(cfg.out)
    folder = PictureFolder(cfg.data, size=cfg.size, channels=cfg.channels, caption_column=cfg.caption_column)
    pictures, captions = folder.pictures().to(device), folder.captions              # [N, C, S, S] in [-1, 1]

    # ---- model
    torch.manual_seed(cfg.seed)
    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                             rescale_betas_zero_snr=True, timestep_spacing="trailing")
    picture = PictureFormat(cfg.size, cfg.channels, cfg.fold)
    writer = build_writer(PRESETS[cfg.preset], picture, captions, schedule).to(device)
    writer.unet.to(memory_format=torch.channels_last)       # convolutions run faster so, on CPUs and GPUs
    parameters = sum(p.numel() for p in writer.parameters())
    print(f"{len(captions)} pictures, {len(writer.captions)} captions; {parameters:,} parameters; "
          f"{describe_machine(device)}")

    # ---- optimizer and averages
    optimizers = build_optimizers(writer, cfg.optimizer, cfg.lr, cfg.muon_lr)
    ema = EMA(writer.parameters(), cfg.ema)
    dice = torch.Generator().manual_seed(cfg.seed)          # one stream for batches, jitter, timesteps, noise, drops

    # ---- resume
    start, checkpoint = 0, out / "checkpoint.pt"
    if cfg.resume:
        start = restore(checkpoint, cfg, writer, ema, optimizers, dice)
    metrics = Metrics(out / "metrics.jsonl", resume_at=start if cfg.resume else None)
    write_json(out / "config.json", dataclasses.asdict(cfg))
    check_points = evaluation_steps(cfg)
    stop, progress, loss_mean, began = StopFlag(), Progress(cfg.steps, start), math.nan, time.monotonic()

    # ---- loop: one turn more than there are steps, so that the last evaluation and save are ordinary ones
    for step in range(start, cfg.steps + 1):
        if step in check_points and (step > start or not cfg.resume):
            with ema:
                scores = evaluate(writer, pictures, captions, cfg, out, step)
                writer.save(out / "model")
            metrics.add(step=step, seconds=round(time.monotonic() - began, 1), **scores)
            save_state(checkpoint, cfg, step, writer, ema, optimizers, dice)
            write_report(out, cfg, metrics, parameters, captions)
        if step == cfg.steps or stop.set:
            break

        factor = set_learning_rate(optimizers, step, cfg.steps, cfg.warmup)
        chosen = draw_batch(len(captions), cfg.batch, dice).to(device)
        x0 = pictures[chosen]
        if cfg.jitter:
            x0 = jitter(x0, dice, flip=cfg.flip)
        prompts = drop_captions([captions[i] for i in chosen.tolist()], cfg.caption_drop, dice)
        loss = diffusion_loss(writer, x0, prompts, schedule, dice)

        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(writer.parameters(), cfg.clip)
        value, norm = loss.item(), norm.item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise UserError(f"step {step}: the loss is {value} and the gradient norm {norm}; stopped before the "
                            f"weights were touched. {checkpoint} holds the last good state: try a lower --muon-lr")
        for optimizer in optimizers:
            optimizer.step()
        ema.update(step)

        loss_mean = value if math.isnan(loss_mean) else 0.95 * loss_mean + 0.05 * value
        metrics.add(step=step, loss=value, grad_norm=norm, lr=factor)
        progress.show(step + 1, f"loss {loss_mean:.4f}")
    progress.close()
    stop.restore()

    if stop.set and step < cfg.steps:
        save_state(checkpoint, cfg, step, writer, ema, optimizers, dice)
        print(f"stopped at step {step}; go on with the same command and --resume")
    else:
        print(f"done in {time.monotonic() - began:.0f} s: open {out / 'report.html'}")


def check(cfg: TrainConfig) -> None:
    """Refuses what cannot work, in one line, before any work starts."""
    levels = len(PRESETS[cfg.preset].block_out_channels)
    multiple = cfg.fold * 2 ** (levels - 1)
    if cfg.fold < 1 or cfg.size < multiple or cfg.size % multiple:
        raise UserError(f"--size {cfg.size}: preset {cfg.preset} with --fold {cfg.fold} takes multiples of {multiple}")
    if cfg.size > 2048:
        raise UserError(f"--size {cfg.size}: at most 2048")
    for name in ("steps", "batch", "sample_steps"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least 1")
    for name in ("caption_drop", "ema"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: between 0 and 1")
    if cfg.sample_steps > 1000:
        raise UserError(f"--sample-steps {cfg.sample_steps}: at most the 1000 timesteps of training")


def draw_batch(n: int, batch: int, dice: torch.Generator) -> Tensor:
    """Indices [batch]: whole shuffled rounds of the pictures first, so that each is seen equally often."""
    rounds = [torch.randperm(n, generator=dice) for _ in range(math.ceil(batch / n))]
    return torch.cat(rounds)[:batch]


def drop_captions(prompts: list[str], share: float, dice: torch.Generator) -> list[str]:
    """Some captions become empty, so that guidance has something to guide away from (Ho 2022, Algorithm 1)."""
    chances = torch.rand(len(prompts), generator=dice).tolist()
    return ["" if chance < share else prompt for prompt, chance in zip(prompts, chances, strict=True)]


def diffusion_loss(writer: Writer, pictures: Tensor, prompts: list[str], schedule: DDPMScheduler,
                   dice: torch.Generator) -> Tensor:
    """Mean squared error of the predicted v over a batch: Ho 2020, Algorithm 1, with v in place of eps.

    The B timesteps are spread evenly over the schedule (one in each B-th part): less variance than B free draws.
    """
    x0 = writer.fold(pictures)                                                      # [B, C*f*f, S/f, S/f]
    B, T = len(x0), len(schedule)
    even = (torch.randperm(B, generator=dice) + torch.rand(B, generator=dice)) / B
    t = (even * T).long().clamp(max=T - 1)
    noise = torch.randn(x0.shape, generator=dice).to(x0.device)
    x_t = schedule.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    v = schedule.get_velocity(x0, noise, t)
    predicted = writer.unet(x_t, t, writer.encode(prompts)).sample
    return torch.nn.functional.mse_loss(predicted, v)


def evaluation_steps(cfg: TrainConfig) -> set[int]:
    """When to sample and validate: `cfg.samples` times on the way, closer together at first, and at the end."""
    return {0, cfg.steps} | {round(cfg.steps * (i / (cfg.samples + 1)) ** 1.3) for i in range(1, cfg.samples + 1)}


# ---------------------------------------------------------------------------------------------- evaluation

VALIDATION_TIMESTEPS = (99, 299, 499, 699, 899, 959)


@torch.no_grad()
def evaluate(writer: Writer, pictures: Tensor, captions: list[str], cfg: TrainConfig, out: Path, step: int) -> dict:
    """Writes a grid of samples; returns validation errors at fixed timesteps and noise beside their lower bound.

    The error is the mean squared error of the predicted x0, in grey levels from -1 to 1. `val_free` is without
    captions, and no predictor without captions can beat `bound` on these pictures. `val` is with captions.
    """
    writer.eval()
    prompts = writer.captions[:40]
    grid = writer.write(prompts, seed=cfg.seed, steps=cfg.sample_steps, guidance=cfg.guidance)
    save_grid(grid, out / "samples" / f"{step:06d}.png", columns=grid_columns(len(prompts)))
    chosen = torch.arange(min(len(pictures), 64))
    noise = torch.randn(pictures[chosen].shape, generator=torch.Generator().manual_seed(1))
    errors = {"val": [], "val_free": [], "bound": []}
    for t in VALIDATION_TIMESTEPS:
        x0, eps = writer.fold(pictures[chosen]), writer.fold(noise.to(pictures.device))
        times = torch.full((len(x0),), t)
        x_t = writer.scheduler.add_noise(x0, eps, times)
        best = optimal_denoiser(x_t, writer.fold(pictures), writer.scheduler.alphas_cumprod[t].item())
        errors["bound"].append((best - x0).square().mean().item())
        for name, told in (("val", [captions[i] for i in chosen]), ("val_free", [""] * len(chosen))):
            v = writer.unet(x_t, t, writer.encode(told)).sample
            alpha_bar = writer.scheduler.alphas_cumprod[t].item()
            predicted = alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * v
            errors[name].append((predicted - x0).square().mean().item())
    writer.train()
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    by_time = {f"{name}_{t}": values[i] for name, values in errors.items() for i, t in enumerate(VALIDATION_TIMESTEPS)}
    return {**means, **by_time}


def optimal_denoiser(x_t: Tensor, bank: Tensor, alpha_bar: float) -> Tensor:
    """E[x0 | x_t] when x0 is one of the pictures in `bank`, each as likely: their mean, weighted by likelihood.

    x_t [B, ...], bank [N, ...] -> [B, ...]. No network can have a smaller mean squared error on these pictures.
    """
    flat = bank.flatten(1).cpu().double()                                           # [N, D]; MPS has no float64
    distance = torch.cdist(x_t.flatten(1).cpu().double(), alpha_bar**0.5 * flat).square()
    weights = torch.softmax(-distance / (2 * (1 - alpha_bar)), dim=1)               # [B, N]
    return (weights @ flat).to(x_t).reshape(x_t.shape)


# ---------------------------------------------------------------------------------------- saving and telling


def save_state(path: Path, cfg: TrainConfig, step: int, writer: Writer, ema: EMA, optimizers: list,
               dice: torch.Generator) -> None:
    save_checkpoint(path, {
        "config": dataclasses.asdict(cfg), "step": step, "model": writer.state_dict(), "ema": ema.mean,
        "optimizers": [o.state_dict() for o in optimizers], "dice": dice.get_state(), "rng": torch.get_rng_state(),
    })


MAY_CHANGE = ("out", "data", "device", "resume", "samples", "sample_steps", "guidance")


def restore(path: Path, cfg: TrainConfig, writer: Writer, ema: EMA, optimizers: list, dice: torch.Generator) -> int:
    """Puts everything back as it was; returns the step to go on from. Flags that shape training may not change."""
    if not path.exists():
        raise UserError(f"--resume: there is no {path}")
    state = load_checkpoint(path)
    for name, value in dataclasses.asdict(cfg).items():
        if name not in MAY_CHANGE and state["config"].get(name) != value:
            raise UserError(f"--resume: {path} was trained with {name} = {state['config'].get(name)}, not {value}")
    writer.load_state_dict(state["model"])
    for mine, saved in zip(ema.mean, state["ema"], strict=True):
        mine.copy_(saved)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    dice.set_state(state["dice"])
    torch.set_rng_state(state["rng"])
    print(f"resumed at step {state['step']}")
    return state["step"]


def write_report(out: Path, cfg: TrainConfig, metrics: Metrics, parameters: int, captions: list[str]) -> None:
    losses = smooth(metrics.series("loss"))
    loss_curve = report.curve({"training loss": losses}, "step", "mean squared error of v, smoothed")
    with atomic_write(out / "loss.svg") as file:
        file.write(loss_curve.encode("utf-8"))
    validation = {"with captions": metrics.series("val"), "without captions": metrics.series("val_free"),
                  "best possible without captions": metrics.series("bound")}
    last = [row for row in metrics.rows if "val" in row][-1]
    rows = [[t, *(f"{last[f'{name}_{t}']:.4f}" for name in ("val", "val_free", "bound"))] for t in VALIDATION_TIMESTEPS]
    grids = sorted((out / "samples").glob("*.png"), reverse=True)
    report.write_page(out / "report.html", f"Learning to write: {Path(cfg.data).name}", [
        f"<p>{len(captions)} pictures, {parameters:,} parameters, step {last['step']} of {cfg.steps}, "
        f"{last['seconds']:.0f} s.</p>",
        report.picture(grids[0], f"Newest samples, {cfg.size} x {cfg.size}, one for each caption: "
                                 + "、".join(list(dict.fromkeys(captions))[:40])),
        "<h2>Training loss</h2>", loss_curve,
        "<h2>Validation</h2>", report.curve(validation, "step", "mean squared error of x0"),
        "<p>Fixed pictures, timesteps and noise. The best possible value is computed exactly from the training "
        "pictures; only a captioned model may go below it. Timestep by timestep, 0 being clean and 999 noise:</p>",
        report.table(rows, ["timestep", "with captions", "without captions", "best without captions"]),
        "<h2>On the way</h2>", *(report.picture(path, f"after {int(path.stem)} steps") for path in grids[1:]),
        "<h2>Settings</h2>", report.table(list(dataclasses.asdict(cfg).items())),
    ])


def smooth(series: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """An exponential mean over about 20 steps: a diffusion loss is mostly variance."""
    smoothed, mean = [], None
    for step, value in series:
        mean = value if mean is None else 0.95 * mean + 0.05 * value
        smoothed.append((step, mean))
    return smoothed


if __name__ == "__main__":
    run(lambda: main(parse_flags(TrainConfig, __doc__.split("\n\n")[0])))
