"""Train a diffusion model from scratch on a folder of pictures with captions, a few dozen pictures being enough.

    python -m train.train_diffusion --data data/calligraphy --out out/calligraphy

Read after writer.py. Papers: Ho 2020 (Algorithm 1), Salimans 2022 (v-prediction), Nichol 2021 (cosine schedule),
Lin 2023 (zero terminal SNR, so that paper comes out white), Ho 2022 (caption dropout for guidance).
Leaves a run folder: report.html, metrics.jsonl, speed.jsonl, samples/, config.json, checkpoint.pt and those before it
(everything needed to go on), best.pt and model/ (the EMA weights in upstream's layout, all that train.sample needs).
More processes, memory and precision: docs/training.md.
Shapes: B batch, C picture channels, S picture size, f fold, [B, C*f*f, S/f, S/f] inside the UNet.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.folder import PictureFolder, Stream, affine
from data.summary import summary
from miniclip.weights import atomic_write
from minidiff import DDPMScheduler
from minidiff.attention import Transformer2DModel
from minidiff.resnet import ResnetBlock2D
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
    describe_machine,
    draw_batch,
    evaluation_steps,
    fingerprint,
    flag,
    freeze_named,
    go_on,
    grid_columns,
    how_to_go_on,
    keep,
    must_be_alike,
    open_books,
    parse_flags,
    pick_device,
    run,
    save_grid,
    stop_unless_finite,
)
from train.latent import LatentWriter, load_pipeline
from train.lora import FILE as LORA_FILE
from train.lora import add_lora, check_lora, merged, save_lora
from train.optim import build_optimizers, set_learning_rate
from train.parallel import (
    Group,
    Loss,
    check_shard,
    clip_gradients,
    gather_into,
    join,
    replicate,
    shard,
    synchronized,
)
from train.stream import Skipped, check_workers, first_pictures, from_step
from train.writer import PRESETS, PictureFormat, Writer, build_writer


@dataclass(frozen=True)
class TrainConfig:
    data: str = flag("data/calligraphy", "folder of pictures: captions.csv, or one folder for each class",
                     section="data and run folder")
    out: str = flag("out/calligraphy", "run folder to write")
    caption_column: str = flag("caption", "column of captions.csv that holds the captions")
    size: int = flag(64, "pictures are S x S", at_least=1, at_most=2048)
    channels: int = flag(1, "1 for grey, 3 for colour", choices=(1, 3))
    fold: int = flag(2, "fold each f x f square of pixels into channels", at_least=1, at_most=2048)
    preset: str = flag("small", "size of the model", choices=tuple(PRESETS), section="model and training")
    steps: int = flag(400, "optimizer steps", at_least=1)
    batch: int = flag(20, "pictures a step", at_least=1)
    optimizer: str = flag("muon", "muon (learns faster on few pictures) or adamw", choices=("muon", "adamw"))
    lr: float = flag(1e-3, "peak learning rate of AdamW", above=0)
    muon_lr: float = flag(0.02, "peak learning rate of Muon", above=0)
    warmup: int = flag(20, "steps of linear warm-up", at_least=0)
    ema: float = flag(0.98, "largest decay of the weights' running mean", at_least=0, at_most=1)
    clip: float = flag(1.0, "clip the gradient's norm to this", above=0)
    caption_drop: float = flag(0.1, "share of pictures trained without caption, for guidance", at_least=0,
                               at_most=1)
    jitter: bool = flag(True, "small random rotations, shifts, scalings")
    flip: bool = flag(False, "mirror half of the pictures; never for writing")
    samples: int = flag(3, "how many times on the way to write a grid of samples and validate",
                        section="samples on the way", at_least=0, at_most=10_000)
    sample_steps: int = flag(12, "denoising steps for those samples", at_least=1, at_most=1000)
    guidance: float = flag(1.5, "guidance for those samples", at_least=-1000, at_most=1000)
    seed: int = flag(0, "one seed, one result (on one machine, on the CPU)", section="machine, memory and speed",
                     **SEEDS)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: str = flag("auto", "of the forward pass; auto: bf16 on a GPU that has it, else float32",
                          choices=PRECISIONS)
    accumulate: int = flag(1, "go through a batch in so many parts, to save memory", at_least=1)
    gradient_checkpointing: bool = flag(False, "compute activations twice instead of keeping them, to save memory")
    compile: bool = flag(False, "torch.compile the UNet: slow to start, then faster, most of all on a GPU")
    init: str = flag("", "start from this: a run's model folder, an SD 1, SD 2, SDXL or inpainting folder, or one file of its "
                     "weights",
                     section="starting from what others trained")
    tokenizer: str = flag("", "tokenizer of an --init that is a single file")
    lora: int = flag(0, "rank of LoRA on the UNet's attention: --init stays as it is, a small file learns; 0 for none",
                     at_least=0, at_most=4096)
    lora_alpha: float = flag(0.0, "LoRA adds alpha / rank times what it learned; 0 takes the rank", at_least=0)
    freeze: str = flag("", "leave alone what has this regular expression in its name, such as ^text_encoder")
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
    # ---- processes, device and data
    group = join(pick_device(cfg.device))
    check_shares(cfg, group.size)
    device, out = group.device, claim(cfg, group)
    amp = autocast(cfg.precision, device)
    folder = PictureFolder(cfg.data, size=cfg.size, channels=cfg.channels, caption_column=cfg.caption_column,
                           index=out / "index.json" if cfg.stream else None)
    seen = fingerprint([entry.path.relative_to(cfg.data).as_posix() for entry in folder.entries], folder.captions)
    must_be_alike(cfg, seen, group)
    if group.main:
        print(*summary(cfg.data, [str(entry.path) for entry in folder.entries], {cfg.caption_column: folder.captions},
                       cfg.size, cfg.channels), sep="\n", flush=True)
    captions, parts = folder.captions, group.shares(cfg.batch, cfg.accumulate)
    own = slice(parts[0].start, parts[-1].stop)             # this process's rows of each batch
    stream, skipped = Stream(folder, cfg.batch, cfg.seed, cfg.steps, own), Skipped(out, group, cfg.resume)
    if cfg.stream:
        pictures, rows = first_pictures(folder)             # some to validate on
        shown = [captions[i] for i in rows]
    else:
        pictures, shown = folder.pictures(), captions
    pictures = pictures.to(device)                                                  # [N, C, S, S] in [-1, 1]

    # ---- model
    torch.manual_seed(cfg.seed)
    writer = initial_writer(cfg, captions)
    for part in writer.children():
        if part is not writer.unet:
            part.to(device)
    if not cfg.shard:                                       # else FSDP takes it, block by block: it may not fit in one piece
        writer.unet.to(device, memory_format=torch.channels_last)       # convolutions run faster so, on CPUs and GPUs
    writer.unet.enable_gradient_checkpointing(cfg.gradient_checkpointing)
    if cfg.compile:
        writer.unet.compile()
    frozen_codes = isinstance(writer, LatentWriter)         # its pictures are encoded once for all
    if frozen_codes:
        pictures = writer.latents(pictures, out / "cache", f"{cfg.size}-{seen['checksum']:08x}").to(device)     # [N, L, h, w]
    twin = copy.deepcopy(writer).cpu() if cfg.shard and group.main else writer      # the one that is saved
    loss_of = distribute(writer, cfg, group)
    parameters = sum(p.numel() for p in writer.parameters() if p.requires_grad)
    group.say(f"{len(captions)} pictures, {len(writer.captions)} captions; {parameters:,} parameters; "
              f"{describe_machine(device)}" + (f", {group.size} processes" if group.size > 1 else ""))

    # ---- optimizer and averages
    optimizers = build_optimizers(writer, cfg.optimizer, cfg.lr, cfg.muon_lr)
    ema = EMA((p for p in writer.parameters() if p.requires_grad), cfg.ema)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
    dice = torch.Generator().manual_seed(cfg.seed)          # one stream for batches, jitter, timesteps, noise, drops

    # ---- resume
    checkpoints = Checkpoints(out, cfg.keep)
    state = RunState(dataclasses.asdict(cfg), seen, writer, ema, optimizers, scaler, dice)
    resume_at = go_on(state, checkpoints, group, MAY_CHANGE) if cfg.resume else None
    metrics, speed = open_books(cfg, group, resume_at)
    start = state.step
    check_points = evaluation_steps(cfg.steps, cfg.samples)
    batches = from_step(stream, start, cfg.workers)
    stop, stopping, progress, loss_mean = StopFlag(), False, Progress(cfg.steps, start), math.nan

    # ---- loop: one turn more than there are steps, so that the last evaluation and save are ordinary ones
    for step in range(start, cfg.steps + 1):
        state.step = step
        evaluating = step in check_points and step != resume_at
        if evaluating:
            with ema:
                scores = examine(writer, twin, pictures, shown, cfg, group, step)
            metrics.add(step=step, **scores)
        if evaluating or stopping or (step % cfg.save_every == 0 and step != resume_at):
            keep(state, checkpoints, group, scores["val"] if evaluating else math.inf)
        if (evaluating or step == cfg.steps) and group.main:
            write_report(out, cfg, metrics, speed, parameters, captions)
        if step == cfg.steps or stopping:
            break

        factor = set_learning_rate(optimizers, step, cfg.steps, cfg.warmup)
        chosen, moves, told, t, noise = draw(len(captions), writer, cfg, dice)      # of the whole batch
        masks = writer.draw_masks(cfg.batch, dice)
        if cfg.stream:
            pixels, chosen[own], broken = next(batches)
            pixels = pixels.to(device).float() / 127.5 - 1
            skipped.add(broken)
        else:
            pixels = pictures[chosen[own].to(device)]
        prompts = drop_captions([captions[i] for i in chosen.tolist()], told, cfg.caption_drop)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part, x0 in zip(parts, pixels.chunk(len(parts)), strict=True):
            if not frozen_codes:
                x0 = writer.fold(affine(x0, moves[part], flip=cfg.flip) if cfg.jitter else x0)
            with synchronized(loss_of, now=part is parts[-1]):
                with amp:
                    around = writer.around(chosen[part], masks[part])
                    loss = loss_of(x0, prompts[part], t[part], noise[part], around) / len(parts)
                scaler.scale(loss).backward()
            value += loss.item()

        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = clip_gradients(writer.parameters(), cfg.clip)
        value, asked = group.mean(value, float(stop.set))
        stopping = asked > 0                                # of any process
        stop_unless_finite(value, norm, factor, state, metrics, checkpoints.kept[0])
        state.learn(norm)
        ema.update(step)

        loss_mean = value if math.isnan(loss_mean) else 0.95 * loss_mean + 0.05 * value
        metrics.add(step=step, loss=value, grad_norm=norm, lr=factor)
        speed.add(step)
        if group.main:
            progress.show(step + 1, f"loss {loss_mean:.4f}")
    progress.close()
    stop.restore()

    if stopping and step < cfg.steps:
        group.say(f"stopped at step {step}; go on with {how_to_go_on('train.train_diffusion', out, group)}")
        return
    if cfg.stream:
        skipped.add_those_of_others()
    left = f", {len(skipped.files)} broken files left out ({skipped.path})" if skipped.files else ""
    group.say(f"done in {speed.seconds():.0f} s{left}: open {out / 'report.html'}")


def check(cfg: TrainConfig) -> None:
    """Refuses what cannot work, in one line, before any work starts."""
    check_flags(cfg)
    check_init(cfg.init)
    levels = len(PRESETS[cfg.preset].block_out_channels)
    multiple = cfg.fold * 2 ** (levels - 1)
    if not cfg.init and (cfg.size < multiple or cfg.size % multiple):
        raise UserError(f"--size {cfg.size}: preset {cfg.preset} with --fold {cfg.fold} takes multiples of {multiple}")
    check_shard(cfg)
    check_workers(cfg.workers, cfg.stream)
    check_lora(cfg.lora, cfg.lora_alpha, cfg.init)
    if cfg.tokenizer and (not cfg.init or Path(cfg.init).is_dir()):
        raise UserError(f"--tokenizer {cfg.tokenizer}: only for an --init that is a single file")
    check_latent(cfg)
    check_pattern(cfg.freeze)


def check_latent(cfg: TrainConfig) -> None:
    """What an --init of others, whose pictures are encoded once, cannot do."""
    if not cfg.init or (Path(cfg.init) / "writer.json").exists():
        return
    if not Path(cfg.init).exists():
        raise UserError(f"--init {cfg.init}: no such file or folder")
    if cfg.stream:
        raise UserError(f"--stream: not with --init {cfg.init}, whose latents are encoded once and kept")
    if cfg.jitter or cfg.flip or cfg.channels != 3:
        raise UserError(f"--init {cfg.init}: its latents are encoded once: give --no-jitter, no --flip and --channels 3")
    if Path(cfg.init).is_file() and not cfg.tokenizer:
        raise UserError(f"--init {cfg.init}: a single file holds no tokenizer; give --tokenizer")


def check_shares(cfg: TrainConfig, processes: int) -> None:
    if cfg.batch % (processes * cfg.accumulate):
        raise UserError(f"--batch {cfg.batch}: cannot be shared evenly among {processes} "
                        f"{'process' if processes == 1 else 'processes'} times --accumulate {cfg.accumulate}")
    check_shard(cfg, processes)


def initial_writer(cfg: TrainConfig, captions: list[str]) -> Writer:
    """A fresh writer or the one of --init, with what shall not learn frozen."""
    if not cfg.init:
        schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                                 rescale_betas_zero_snr=True, timestep_spacing="trailing")
        picture = PictureFormat(cfg.size, cfg.channels, cfg.fold)
        writer = build_writer(PRESETS[cfg.preset], picture, captions, schedule)
    elif (Path(cfg.init) / "writer.json").exists():
        writer = Writer.load(cfg.init).train()
        if writer.picture != (cfg.size, cfg.channels, cfg.fold):
            raise UserError(f"--init {cfg.init}: give --size, --channels and --fold {tuple(writer.picture)}")
        writer.captions = list(dict.fromkeys(captions))
    else:
        writer = LatentWriter(load_pipeline(cfg.init, cfg.tokenizer), cfg.size, captions)
        multiple = writer.pipe.factor * 8
        if cfg.size < multiple or cfg.size % multiple:
            raise UserError(f"--size {cfg.size}: --init {cfg.init} takes multiples of {multiple}")
    if cfg.lora:
        writer.requires_grad_(False)
        add_lora(writer.unet, cfg.lora, cfg.lora_alpha or cfg.lora)
    freeze_named(writer, cfg.freeze)
    return writer


def distribute(writer: Writer, cfg: TrainConfig, group: Group) -> nn.Module:
    """The loss as a module whose backward pass speaks with the other processes, if there are any."""
    loss = Loss(writer, diffusion_loss)
    if not cfg.shard:
        return replicate(loss, group)
    units = [m for m in writer.unet.modules() if isinstance(m, (ResnetBlock2D, Transformer2DModel))]
    texts = [] if isinstance(writer, LatentWriter) else [writer.text_encoder]       # a LatentWriter has read its captions
    shard([*units, writer.unet, *texts], group)
    return loss


def draw(n: int, writer: Writer, cfg: TrainConfig, dice: torch.Generator) -> tuple[Tensor, ...]:
    """All random numbers of a step, for the whole batch, in a fixed order: who trains a part of it takes its rows.

    Indices [B], jitter [B, 6], caption drops [B], timesteps [B], noise [B, C*f*f, S/f, S/f].
    The B timesteps are spread evenly over the schedule (one in each B-th part): less variance than B free draws.
    """
    B, T = cfg.batch, len(writer.scheduler)
    chosen = torch.zeros(B, dtype=torch.long) if cfg.stream else draw_batch(n, B, dice)     # a stream has its own order
    moves = torch.rand(B, 6, generator=dice) if cfg.jitter else torch.empty(B, 6)
    told = torch.rand(B, generator=dice)
    even = (torch.randperm(B, generator=dice) + torch.rand(B, generator=dice)) / B
    noise = torch.randn(B, *writer.code_shape, generator=dice)
    return chosen, moves, told, (even * T).long().clamp(max=T - 1), noise


def drop_captions(prompts: list[str], chances: Tensor, share: float) -> list[str]:
    """Some captions become empty, so that guidance has something to guide away from (Ho 2022, Algorithm 1)."""
    return ["" if chance < share else prompt for prompt, chance in zip(prompts, chances.tolist(), strict=True)]


def diffusion_loss(writer: Writer, x0: Tensor, prompts: list[str], t: Tensor, noise: Tensor,
                   around: dict[str, Tensor] | None = None) -> Tensor:
    """Mean squared error over a batch: Ho 2020, Algorithm 1, with v in place of eps where the model speaks v.

    x0, noise [B, C*f*f, S/f, S/f], t [B]; around, of writer.around: what an inpainting model sees of the pictures.
    """
    schedule, noise = writer.scheduler, noise.to(x0)
    x_t = schedule.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    speaks_v = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(x0, noise, t) if speaks_v else noise
    predicted = writer.answer(x_t, t, {**writer.told(prompts), **(around or {})})
    return torch.nn.functional.mse_loss(predicted.to(target), target)


def predicted_x0(writer: Writer, x_t: Tensor, t: int, told: dict[str, Tensor]) -> Tensor:
    """What the model takes for the clean picture behind x_t [B, C*f*f, S/f, S/f]."""
    alpha_bar, times = writer.scheduler.alphas_cumprod[t].item(), torch.full((len(x_t),), t, device=x_t.device)
    output = writer.answer(x_t, times, told)                # times as a tensor: --compile would compile for each number
    if writer.scheduler.config.prediction_type == "v_prediction":
        return alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * output              # Salimans 2022, appendix D
    return (x_t - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5                 # Ho 2020, eq. 15


# ---------------------------------------------------------------------------------------------- evaluation

VALIDATION_TIMESTEPS = (99, 299, 499, 699, 899, 959)


def examine(writer: Writer, twin: Writer, pictures: Tensor, captions: list[str], cfg: TrainConfig, group: Group,
            step: int) -> dict[str, float]:
    """`evaluate`, which leaves samples, the model and, with --lora, its small file in the run folder.

    twin: the writer itself, or if its weights are shared out a copy that is to hold them.
    """
    out = Path(cfg.out)
    if cfg.lora and group.main:
        save_lora(writer.unet, out / "lora" / LORA_FILE)
    with merged(writer.unet):                               # LoRA, if any
        scores, grid = evaluate(writer, pictures, captions, cfg)
        if cfg.shard:
            gather_into(twin, writer, group)
        if group.main:
            save_grid(grid, out / "samples" / f"{step:06d}.png", columns=grid_columns(len(grid)))
            twin.save(out / "model")
    return scores


@torch.no_grad()
def evaluate(writer: Writer, pictures: Tensor, captions: list[str], cfg: TrainConfig) -> tuple[dict, Tensor]:
    """Validation errors at fixed timesteps and noise beside their lower bound, and samples [N, C, S, S].

    The error is the mean squared error of the predicted x0, in grey levels from -1 to 1. `val_free` is without
    captions, and no predictor without captions can beat `bound` on these pictures. `val` is with captions.
    A model for inpainting sees each picture around one of its masks, all masks in turn; it then has no such bound.
    """
    writer.eval()
    prompts = writer.captions[:40]
    grid = writer.write(prompts, cfg.seed, cfg.sample_steps, cfg.guidance, batch=min(20, writer.at_once))
    chosen = torch.arange(min(len(pictures), 64))
    noise = torch.randn(pictures[chosen].shape, generator=torch.Generator().manual_seed(1))
    parts, bounded = chosen.split(writer.at_once), not cfg.stream and writer.masks == 1
    errors = {"val": [], "val_free": [], "bound": []} if bounded else {"val": [], "val_free": []}
    fold = writer.fold if pictures.shape[1:] != writer.code_shape else torch.nn.Identity()     # latents are folded
    for t in VALIDATION_TIMESTEPS:
        x0, eps = fold(pictures[chosen]), fold(noise.to(pictures.device))
        times = torch.full((len(x0),), t)
        x_t = writer.scheduler.add_noise(x0, eps, times)
        if bounded:                                         # it takes all pictures
            best = optimal_denoiser(x_t, fold(pictures), writer.scheduler.alphas_cumprod[t].item())
            errors["bound"].append((best - x0).square().mean().item())
        for name, words in (("val", captions), ("val_free", [""] * len(chosen))):
            told = [{**writer.told([words[i] for i in part]), **writer.around(part, part % writer.masks)} for part in parts]
            predicted = torch.cat([predicted_x0(writer, x_t[p], t, heard) for p, heard in zip(parts, told, strict=True)])
            errors[name].append((predicted - x0).square().mean().item())
    writer.train()
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    by_time = {f"{name}_{t}": values[i] for name, values in errors.items() for i, t in enumerate(VALIDATION_TIMESTEPS)}
    return {**means, **by_time}, grid


def optimal_denoiser(x_t: Tensor, bank: Tensor, alpha_bar: float) -> Tensor:
    """E[x0 | x_t] when x0 is one of the pictures in `bank`, each as likely: their mean, weighted by likelihood.

    x_t [B, ...], bank [N, ...] -> [B, ...]. No network can have a smaller mean squared error on these pictures.
    """
    flat = bank.flatten(1).cpu().double()                                           # [N, D]; MPS has no float64
    distance = torch.cdist(x_t.flatten(1).cpu().double(), alpha_bar**0.5 * flat).square()
    weights = torch.softmax(-distance / (2 * (1 - alpha_bar)), dim=1)               # [B, N]
    return (weights @ flat).to(x_t).reshape(x_t.shape)


# ---------------------------------------------------------------------------------------- saving and telling


MAY_CHANGE = ("out", "data", "device", "resume", "samples", "sample_steps", "guidance", "accumulate", "compile",
              "gradient_checkpointing", "save_every", "keep", "workers", "shard")


def write_report(out: Path, cfg: TrainConfig, metrics: Metrics, speed: Speed, parameters: int, captions: list[str]) -> None:
    losses = report.smooth(metrics.series("loss"))
    loss_curve = report.curve({"training loss": losses}, "step", "mean squared error of v, smoothed")
    with atomic_write(out / "loss.svg") as file:
        file.write(loss_curve.encode("utf-8"))
    last = [row for row in metrics.rows if "val" in row][-1]
    drawn = [out / "samples" / f"{step:06d}.png" for step, _ in reversed(metrics.series("val"))]
    grids = [path for path in drawn if path.exists()]      # of this run; others may lie there too
    others = [{k: v for k, v in row.items() if k != "val"} for row in metrics.rows]                 # drawn by itself
    report.write_page(out / "report.html", f"Learning to write: {Path(cfg.data).name}", [
        f"<p>{len(captions)} pictures, {parameters:,} parameters, step {last['step']} of {cfg.steps}, "
        f"{speed.seconds():.0f} s.</p>",
        *(report.picture(path, f"Newest samples, {cfg.size} x {cfg.size}, one for each caption: "
                               + "、".join(list(dict.fromkeys(captions))[:40])) for path in grids[:1]),
        report.notes(metrics.rows), *validation(metrics, last),
        "<h2>On the way</h2>", *(report.picture(path, f"after {int(path.stem)} steps") for path in grids[1:]),
        *report.curves({"": (others, speed.metrics.rows)}),
        "<h2>Settings</h2>", report.table(list(dataclasses.asdict(cfg).items())),
    ])


def validation(metrics: Metrics, last: dict) -> list[str]:
    """A curve and a table of the report; a stream and a model for inpainting have no bound."""
    names = {"val": "with captions", "val_free": "without captions", "bound": "best possible without captions"}
    names = {name: words for name, words in names.items() if name in last}
    rows = [[t, *(f"{last[f'{name}_{t}']:.4f}" for name in names)] for t in VALIDATION_TIMESTEPS]
    bound = ("The best possible value is computed exactly from the training pictures; only a captioned model may go below "
             "it. ") if "bound" in names else ""
    return ["<h2>Validation" + (" beside its bound" if bound else "") + "</h2>",
            report.curve({words: metrics.series(name) for name, words in names.items()}, "step", "mean squared error of x0"),
            f"<p>Fixed pictures, timesteps and noise. {bound}Timestep by timestep, 0 being clean and 999 noise:</p>",
            report.table(rows, ["timestep", *names.values()])]


if __name__ == "__main__":
    run(lambda: main(parse_flags(TrainConfig, __doc__.split("\n\n")[0])))
