"""Train a CLIP from scratch on a folder of pictures with captions, and see whether each finds the other.

    python -m train.train_clip --data data/herbs --hold-out artist=twitter --out out/herbs

Read after matcher.py; search.py asks the result. Papers: Radford 2021, section 2 (loss, temperature, schedule);
Zhai 2023 (SigLIP); Gao 2021 (large batches in chunks).
Leaves a run folder: report.html, metrics.jsonl, matrix/, config.json, checkpoint.pt (everything needed to go on),
model/ (all that train.search needs) and index/ (the pictures' embeddings).
Shapes: B batch, N pictures, M captions, S picture size, E width of the shared space.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.folder import DataError, PictureFolder, jitter, list_pictures
from miniclip.loss import cached_backward, chance, clamp_temperature, contrastive_loss, floor, ranks, siglip_loss
from miniclip.weights import write_json
from train import report
from train.common import (
    EMA,
    Metrics,
    Progress,
    StopFlag,
    UserError,
    describe_machine,
    flag,
    load_checkpoint,
    make_folder,
    parse_flags,
    pick_device,
    run,
    save_checkpoint,
    save_picture,
)
from train.matcher import PRESETS, Matcher, build_matcher
from train.optim import build_optimizers, set_learning_rate
from train.search import save_index


@dataclass(frozen=True)
class TrainConfig:
    data: str = flag("data/herbs", "folder of pictures: captions.csv, or one folder for each class")
    out: str = flag("out/herbs", "run folder to write")
    caption_column: str = flag("zh-Hant,zh-Hans,en", "columns of captions.csv, the first of which is tested")
    hold_out: str = flag("", "column=value: rows never trained on, tested apart, such as artist=twitter")
    size: int = flag(64, "pictures are S x S")
    preset: str = flag("tiny", "size of a fresh model", choices=tuple(PRESETS))
    init: str = flag("", "start from this model folder instead of a fresh model")
    lock: str = flag("none", "tower of --init that stays as it is", choices=("none", "image", "text"))
    loss: str = flag("infonce", "infonce, or siglip: every pair for itself", choices=("infonce", "siglip"))
    steps: int = flag(150, "optimizer steps")
    batch: int = flag(32, "pairs a step; a small set is repeated, never twice the same picture under jitter")
    chunk: int = flag(0, "hold only so many pairs in memory, same gradients; 0 holds all")
    optimizer: str = flag("muon", "muon (learns faster) or adamw", choices=("muon", "adamw"))
    lr: float = flag(1e-3, "peak learning rate of AdamW")
    muon_lr: float = flag(0.02, "peak learning rate of Muon")
    warmup: int = flag(20, "steps of linear warm-up")
    ema: float = flag(0.0, "largest decay of the weights' running mean; 0 for none")
    clip: float = flag(1.0, "clip the gradient's norm to this")
    jitter: bool = flag(True, "random rotations, shifts, scalings, and changes of colour")
    flip: bool = flag(False, "mirror half of the pictures")
    checks: int = flag(6, "how many times on the way to measure R@1 and draw the matrix")
    seed: int = flag(0, "one seed, one result (on one machine, on the CPU)")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    resume: bool = flag(False, "go on from the run folder's checkpoint")


def main(cfg: TrainConfig) -> None:
    check(cfg)
    # ---- device and data
    device = pick_device(cfg.device)
    out = make_folder(cfg.out)
    pairs = read_pairs(cfg)
    train, test = pairs.split()

    # ---- model
    torch.manual_seed(cfg.seed)
    matcher = initial_matcher(cfg, [c for column in train.captions for c in column]).to(device)
    texts = [matcher.tokens(column) for column in train.captions]                   # [N, T] for each column
    labels = [indices(column).to(device) for column in train.captions]              # [N]: equal captions, one label
    logit_bias = nn.Parameter(torch.tensor(-10.0, device=device))                   # of SigLIP only
    parameters = sum(p.numel() for p in matcher.parameters() if p.requires_grad)
    print(f"{len(train.pictures)} pictures, {len(set(train.captions[0]))} captions, {len(test.pictures)} pictures held "
          f"out; {parameters:,} parameters; {describe_machine(device)}")

    # ---- optimizer and averages
    trained = nn.ModuleDict({"matcher": matcher, "bias": nn.ParameterList([logit_bias])})
    optimizers = build_optimizers(trained, cfg.optimizer, cfg.lr, cfg.muon_lr)
    ema = EMA((p for p in trained.parameters() if p.requires_grad), cfg.ema)
    dice = torch.Generator().manual_seed(cfg.seed)          # one stream for batches, columns and jitter

    # ---- resume
    start, checkpoint = 0, out / "checkpoint.pt"
    if cfg.resume:
        start = restore(checkpoint, cfg, trained, ema, optimizers, dice)
    metrics = Metrics(out / "metrics.jsonl", resume_at=start if cfg.resume else None)
    write_json(out / "config.json", dataclasses.asdict(cfg))
    check_points = {0, cfg.steps} | {round(cfg.steps * (i / (cfg.checks + 1)) ** 1.3) for i in range(1, cfg.checks + 1)}
    stop, progress, loss_mean, began = StopFlag(), Progress(cfg.steps, start), math.nan, time.monotonic()
    blind = math.log(cfg.batch)     # the loss of a model for which all pictures are alike

    # ---- loop: one turn more than there are steps, so that the last evaluation and save are ordinary ones
    for step in range(start, cfg.steps + 1):
        if step in check_points and (step > start or not cfg.resume):
            with ema:
                scores = evaluate(matcher, train, test, out, step)
                matcher.save(out / "model")
            metrics.add(step=step, seconds=round(time.monotonic() - began, 1), **scores)
            save_state(checkpoint, cfg, step, trained, ema, optimizers, dice)
            write_report(out, cfg, metrics, parameters, train, test)
            print(verdict(step, scores, loss_mean, blind, cfg), flush=True)
        if step == cfg.steps or stop.set:
            break

        factor = set_learning_rate(optimizers, step, cfg.steps, cfg.warmup)
        chosen = draw_batch(len(train.pictures), cfg.batch, dice).to(device)
        column = int(torch.randint(len(texts), (), generator=dice))
        pictures = augment(train.pictures[chosen.cpu()], cfg, dice).to(device)
        (ids, mask), same = texts[column], labels[column][chosen]

        set_training(matcher, cfg.lock)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = backward(matcher, pictures, ids[chosen], mask[chosen], same, logit_bias, cfg)
        norm = torch.nn.utils.clip_grad_norm_([p for p in trained.parameters() if p.grad is not None], cfg.clip)
        least = floor(same, cfg.batch) if cfg.loss == "infonce" else 0.0      # equal captions set a least loss: to 0
        value, norm, blind = loss.item() - least, norm.item(), math.log(cfg.batch) - least
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise UserError(f"step {step}: the loss is {value} and the gradient norm {norm}; stopped before the "
                            f"weights were touched. {checkpoint} holds the last good state: try a lower --muon-lr")
        for optimizer in optimizers:
            optimizer.step()
        clamp_temperature(matcher.model.logit_scale)
        ema.update(step)

        loss_mean = value if math.isnan(loss_mean) else 0.9 * loss_mean + 0.1 * value
        metrics.add(step=step, loss=value, blind=blind, grad_norm=norm, lr=factor, logit_scale=matcher.model.logit_scale.item())
        progress.show(step + 1, f"loss {loss_mean:.3f}")
    progress.close()
    stop.restore()

    if stop.set and step < cfg.steps:
        save_state(checkpoint, cfg, step, trained, ema, optimizers, dice)
        print(f"stopped at step {step}; go on with the same command and --resume")
        return
    with ema:
        save_index(out / "index", pairs.files, pairs.captions[0], matcher.embed_pictures(pairs.pictures))
    print(f"done in {time.monotonic() - began:.0f} s: open {out / 'report.html'}; ask with "
          f"python -m train.search --run {out} --text {train.captions[0][0]}")


def check(cfg: TrainConfig) -> None:
    """Refuses what cannot work, in one line, before any work starts."""
    for name, least in (("steps", 1), ("batch", 2), ("size", 32), ("chunk", 0), ("checks", 0)):
        if not least <= getattr(cfg, name) <= 10_000_000:
            raise UserError(f"--{name} {getattr(cfg, name)}: at least {least}")
    preset = PRESETS[cfg.preset]
    if cfg.size > 1024 or (not cfg.init and preset.tower == "vit" and cfg.size % preset.patch):
        raise UserError(f"--size {cfg.size}: at most 1024, and for {cfg.preset} a multiple of {preset.patch or 1}")
    if cfg.hold_out and "=" not in cfg.hold_out:
        raise UserError(f"--hold-out {cfg.hold_out}: must be column=value, such as artist=twitter")
    if cfg.lock != "none" and not cfg.init:
        raise UserError(f"--lock {cfg.lock}: only a tower that was trained before is worth locking; give --init")
    if cfg.chunk and not cfg.init and preset.tower == "resnet":
        raise UserError(f"--chunk {cfg.chunk}: preset {cfg.preset} has batch norm, which needs the whole batch; take a vit")
    if not 0 <= cfg.ema < 1:
        raise UserError(f"--ema {cfg.ema}: from 0 up to, not including, 1")


# -------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Pairs:
    """Pictures [N, 3, S, S] in -1..1 with their captions, one list of N for each column, and who is held out."""

    files: list[str]
    pictures: Tensor
    captions: list[list[str]]
    held_out: list[bool]

    def split(self) -> tuple[Pairs, Pairs]:
        return self._take(False), self._take(True)

    def _take(self, which: bool) -> Pairs:
        rows = [i for i, held in enumerate(self.held_out) if held == which]
        captions = [[column[i] for i in rows] for column in self.captions]
        return Pairs([self.files[i] for i in rows], self.pictures[rows], captions, [which] * len(rows))


def read_pairs(cfg: TrainConfig) -> Pairs:
    columns = [name.strip() for name in cfg.caption_column.split(",") if name.strip()]
    if not columns:
        raise UserError("--caption-column: name at least one column")
    if not (Path(cfg.data) / "captions.csv").exists():
        columns = ["caption"]                                       # class folders: their names are the captions
    entries = [list_pictures(cfg.data, column) for column in columns]
    captions = [[entry.caption for entry in column] for column in entries]
    held_out = [False] * len(captions[0])
    if cfg.hold_out:
        name, value = cfg.hold_out.split("=", 1)
        values = [entry.caption for entry in list_pictures(cfg.data, name)]
        held_out = [v == value for v in values]
        if not any(held_out) or all(held_out):
            known = ", ".join(list(dict.fromkeys(values))[:10])
            raise UserError(f"--hold-out {cfg.hold_out}: leaves nothing to {'test' if not any(held_out) else 'train'}; "
                            f"{name} holds {known}")
    trained = {c for c, held in zip(captions[0], held_out, strict=True) if not held}
    if len(trained) < 2:
        raise DataError(f"{cfg.data}: one caption for all pictures; matching needs at least two")
    if len(trained) > 2 and all(Path(c).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") for c in trained):
        raise DataError(f"{cfg.data}: the captions are file names; are two columns of captions.csv swapped?")
    folder = PictureFolder(cfg.data, size=cfg.size, channels=3, caption_column=columns[0])
    return Pairs([str(entry.path) for entry in folder.entries], folder.pictures(), captions, held_out)


def indices(texts: list[str]) -> Tensor:
    """[N] numbers, equal for equal texts."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([number[text] for text in texts])


def draw_batch(n: int, batch: int, dice: torch.Generator) -> Tensor:
    """Indices [batch]: whole shuffled rounds of the pictures first, so that each is seen equally often."""
    rounds = [torch.randperm(n, generator=dice) for _ in range(math.ceil(batch / n))]
    return torch.cat(rounds)[:batch]


def augment(pictures: Tensor, cfg: TrainConfig, dice: torch.Generator) -> Tensor:
    """Another view of each picture [B, 3, S, S]: moved, turned, sheared, lighter or darker, of other colours."""
    if not cfg.jitter:
        return pictures
    pictures = jitter(pictures, dice, degrees=12, translate=0.06, scale=0.2, shear=8, flip=cfg.flip)
    u = torch.rand(len(pictures), 8, generator=dice) * 2 - 1                        # [B, 8] in -1..1
    ink = (1 - pictures) / 2                                                        # 0 on white paper, 1 on black
    gain = 1 + 0.35 * u[:, :1] + 0.15 * u[:, 1:4]                                   # [B, 3]: of all, of each channel
    grey = ink.mean(dim=1, keepdim=True)
    mix = (0.35 * (u[:, 4] + 0.3).clamp_min(0))[:, None, None, None]                # towards grey
    ink = ((1 - mix) * ink + mix * grey) * gain[:, :, None, None]
    soft = F.avg_pool2d(ink, 3, stride=1, padding=1)
    ink = torch.where((u[:, 5] > 0.5)[:, None, None, None], soft, ink)
    return (1 - 2 * ink.clamp(0, 1)).contiguous()


# ------------------------------------------------------------------------------------------ model and loss


def initial_matcher(cfg: TrainConfig, captions: list[str]) -> Matcher:
    """A fresh matcher, or the one of --init with one tower locked if asked."""
    if not cfg.init:
        return build_matcher(PRESETS[cfg.preset], cfg.size, captions)
    matcher = Matcher.load(cfg.init)
    if matcher.size != cfg.size:
        raise UserError(f"--init {cfg.init}: reads pictures of size {matcher.size}; give --size {matcher.size}")
    if cfg.chunk and any(isinstance(m, nn.BatchNorm2d) for m in locked_or_not(matcher, "image")) and cfg.lock != "image":
        raise UserError(f"--chunk {cfg.chunk}: this model has batch norm, which needs the whole batch")
    matcher.captions = list(dict.fromkeys(captions))
    for module in locked_or_not(matcher, cfg.lock):
        for p in module.parameters(recurse=False):
            p.requires_grad_(False)
    return matcher


TOWERS = {"image": ("vision_model", "visual", "image_encoder"), "text": ("text_model", "text_encoder"), "none": ()}


def locked_or_not(matcher: Matcher, side: str) -> list[nn.Module]:
    """All modules of the picture or the text tower; its projection is not part of it."""
    towers = [getattr(matcher.model, name) for name in TOWERS[side] if hasattr(matcher.model, name)]
    return [module for tower in towers for module in tower.modules()]


def set_training(matcher: Matcher, lock: str) -> None:
    """Train mode, but for a locked tower: its batch norms keep their statistics, its dropout stays off."""
    matcher.train()
    for module in locked_or_not(matcher, lock):
        module.training = False


def backward(matcher: Matcher, pictures: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, logit_bias: Tensor,
             cfg: TrainConfig) -> Tensor:
    """Fills the gradients of one batch, all at once or chunk by chunk; returns the loss."""

    def loss_of(images: Tensor, texts: Tensor) -> Tensor:                           # [B, E] each
        scale = matcher.model.logit_scale
        if cfg.loss == "siglip":
            return siglip_loss(texts @ images.T, scale, logit_bias, labels)
        return contrastive_loss(texts @ images.T * scale.exp(), labels)

    if cfg.chunk:
        encoders = (matcher.encode_pictures, matcher.encode_tokens)
        return cached_backward(encoders, ((pictures,), (ids, mask)), loss_of, cfg.chunk)
    loss = loss_of(matcher.encode_pictures(pictures), matcher.encode_tokens(ids, mask))
    loss.backward()
    return loss.detach()


# ---------------------------------------------------------------------------------------------- evaluation


def evaluate(matcher: Matcher, train: Pairs, test: Pairs, out: Path, step: int) -> dict[str, float]:
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
        draw_matrix(similarity, pairs, names, out / "matrix" / f"{prefix}{step:06d}.png")
    return scores


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
            by_chance = scores[prefix + "image_to_text_chance"]
            parts.append(f"{name} picture to name {one:.3f}, name to picture {other:.3f} (chance {by_chance:.3f})")
    if stuck(step, loss, blind, cfg):
        different = "" if blind > math.log(cfg.batch) - 1e-6 else f", {math.exp(blind):.0f} different captions a batch"
        parts.append(f"NOT LEARNING: the loss sits at {blind:.3f}, which is ln(batch){different}: all vectors are alike")
    return "  ".join(parts)


def stuck(step: int, loss: float, blind: float, cfg: TrainConfig) -> bool:
    """Whether an InfoNCE loss still is what blind guessing gives, well after the warm-up."""
    return cfg.loss == "infonce" and step >= 2 * cfg.warmup and loss > 0.97 * blind


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


def save_state(path: Path, cfg: TrainConfig, step: int, trained: nn.Module, ema: EMA, optimizers: list,
               dice: torch.Generator) -> None:
    save_checkpoint(path, {
        "config": dataclasses.asdict(cfg), "step": step, "model": trained.state_dict(), "ema": ema.mean,
        "optimizers": [o.state_dict() for o in optimizers], "dice": dice.get_state(), "rng": torch.get_rng_state(),
    })


MAY_CHANGE = ("out", "data", "device", "resume", "checks")


def restore(path: Path, cfg: TrainConfig, trained: nn.Module, ema: EMA, optimizers: list, dice: torch.Generator) -> int:
    """Puts everything back as it was; returns the step to go on from. Flags that shape training may not change."""
    if not path.exists():
        raise UserError(f"--resume: there is no {path}")
    state = load_checkpoint(path)
    for name, value in dataclasses.asdict(cfg).items():
        if name not in MAY_CHANGE and state["config"].get(name) != value:
            raise UserError(f"--resume: {path} was trained with {name} = {state['config'].get(name)}, not {value}")
    trained.load_state_dict(state["model"])
    for mine, saved in zip(ema.mean, state["ema"], strict=True):
        mine.copy_(saved)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    dice.set_state(state["dice"])
    torch.set_rng_state(state["rng"])
    print(f"resumed at step {state['step']}")
    return state["step"]


WAYS = {"picture to name": "image_to_text", "name to picture": "text_to_image"}


def write_report(out: Path, cfg: TrainConfig, metrics: Metrics, parameters: int, train: Pairs, test: Pairs) -> None:
    last = [row for row in metrics.rows if "image_to_text_R@1" in row][-1]
    sides = {"": f"{len(train.files)} trained pictures"}
    if test.files:
        sides["held_out_"] = f"{len(test.files)} pictures held out ({cfg.hold_out})"
    rows = [[side, way, *(f"{last[f'{prefix}{key}_{what}']:.3f}" for what in ("R@1", "R@5", "chance"))]
            for prefix, side in sides.items() for way, key in WAYS.items()]
    found = {f"{side}, {way}": metrics.series(f"{prefix}{key}_R@1")
             for prefix, side in sides.items() for way, key in WAYS.items()}
    parts = [
        f"<p>{parameters:,} parameters, step {last['step']} of {cfg.steps}, {last['seconds']:.0f} s.</p>",
        report.table(rows, ["", "", "R@1", "R@5", "R@1 by chance"]),
        "<h2>R@1</h2>", report.curve(found, "step", "R@1", log=False),
        "<h2>Loss</h2>",
        report.curve({"training loss": metrics.series("loss"), "all vectors alike": metrics.series("blind")}, "step",
                     "loss above its least value", log=False),
        "<p class='note'>Where all vectors are alike the loss is ln(batch), less what equal captions in a batch take "
        "off: a loss on that line means that nothing is learned, however it got there.</p>",
    ]
    for prefix, side in sides.items():
        parts.append(f"<h2>Who is like whom: {side}</h2>")
        matrices = sorted((out / "matrix").glob(f"{prefix}[0-9]*.png"), reverse=True)
        names = "、".join(list(dict.fromkeys(train.captions[0] + test.captions[0]))[:16])
        parts += [report.picture(path, f"after {int(path.stem[-6:])} steps; rows: {names}") for path in matrices]
    parts += ["<h2>Settings</h2>", report.table(list(dataclasses.asdict(cfg).items()))]
    report.write_page(out / "report.html", f"Pictures and their names: {Path(cfg.data).name}", parts)


if __name__ == "__main__":
    run(lambda: main(parse_flags(TrainConfig, __doc__.split("\n\n")[0])))
