"""Ours beside open_clip's own model: the same pictures and names, the same wall time,
asked about an artist never seen.

    python -m data.make_emoji --out out/emoji --fetch
    python -m tests.bench.bench_clip --data out/emoji --minutes 5

Each training is a process of its own, one after the other, on one CPU thread.
Ours goes first; theirs get as many seconds for their steps alone as ours took with imports, reading,
evaluation and saving. Their schedule runs on the clock, so that it ends when the time does.
Theirs: open_clip.model.CLIP, its ClipLoss, its SimpleTokenizer, AdamW without decay on norms and biases,
1e-3 and 0.1 as in its README's example for one machine, warm-up and cosine;
batches, pictures and augmentation are ours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from train.data.augment import augment, draw_view
from train.data.batches import draw_indices
from train.evaluate_clip import answers, by_chance, by_colours, measure, tell
from train.run.distributed import Ranks
from train.train_clip import TrainConfig, read_folder

THEIRS = {"resnet": {"layers": (1, 1, 1, 1), "width": 16},          # as ours: four bottlenecks
          "vit": {"layers": 4, "width": 128, "head_width": 64, "patch_size": 8}}


def main() -> None:
    args = parse()
    if args.child:
        return train_theirs(args)
    cfg = TrainConfig(**recipe(args))
    train, asked = read_folder(cfg, Ranks(0, 1, torch.device("cpu")))[0].split()
    names, relevant = answers(train, asked)
    things = asked.captions[0]
    scores = {}

    steps = args.steps or calibrate(args)
    seconds = train_ours(args, "ours", steps)
    scores["ours"] = evaluated(args.out / "ours")
    for tower in args.theirs:
        run_child(args, tower, seconds)
        found = torch.load(args.out / f"open_clip-{tower}.pt", weights_only=True)
        scores[f"open_clip, {tower}"] = measure(found["pictures"] @ found["texts"].T, relevant, things)
    if args.control:
        train_ours(args, "control", steps, "--shuffle-captions")
        scores["ours, captions shuffled"] = evaluated(args.out / "control")
    scores["nearest by colours"] = measure(by_colours(train, asked, names), relevant, things)
    scores["chance"] = by_chance(relevant)
    print(f"\n{len(asked.files)} pictures by the artist never seen, {len(names)} names; {steps} steps of "
          f"{cfg.batch} in {seconds:.0f} s, theirs as long; torch {torch.__version__}")
    tell(scores)
    (args.out / "bench.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="out/emoji")
    parser.add_argument("--out", type=Path, default=Path("out/bench-clip"))
    parser.add_argument("--minutes", type=float, default=5.0, help="for each training")
    parser.add_argument("--hold-out", default="artist=twitter")
    parser.add_argument("--caption-column", default="en")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--hues", type=float, default=HUES,
                        help="turn the colours so far, for ours and theirs")
    parser.add_argument("--preset", default="tiny", help="of ours")
    parser.add_argument("--muon-lr", type=float, default=MUON_LR, help="of ours")
    parser.add_argument("--theirs", nargs="*", choices=tuple(THEIRS), default=list(THEIRS))
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--lr", type=float, default=1e-3, help="of open_clip")
    parser.add_argument("--steps", type=int, default=0,
                        help="of ours; 0: as many as --minutes holds, by a short trial")
    parser.add_argument("--child", choices=tuple(THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


BATCH, WARMUP, HUES, MUON_LR = 128, 40, 0.3, 0.02


def recipe(args: argparse.Namespace) -> dict:
    taken = ("data", "hold_out", "caption_column", "size", "batch", "hues", "muon_lr", "preset")
    fixed = dict(warmup=WARMUP, checks=0, save_every=1_000_000, threads=1, device="cpu")
    return {name: getattr(args, name) for name in taken} | fixed


# ------------------------------------------------------------------------------------------------------- ours


def train_ours(args: argparse.Namespace, name: str, steps: int, *more: str) -> float:
    """Seconds from start to end of `python -m train.train_clip`, imports and all."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in recipe(args).items()]
    return start("-m", "train.train_clip", *flags, f"--out={args.out / name}", f"--steps={steps}",
                 "--overwrite", *more)


def calibrate(args: argparse.Namespace) -> int:
    """How many steps fit into --minutes, from a trial of 10 and one of 50."""
    few, many = train_ours(args, "trial", 10), train_ours(args, "trial", 50)
    per_step = (many - few) / 40
    return max(20, int((60 * args.minutes - few) / per_step))


def evaluated(run: Path) -> dict:
    start("-m", "train.evaluate_clip", "--run", str(run), "--device", "cpu", quiet=True)
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["scores"]["model"]


def start(*command: str, quiet: bool = False) -> float:
    """Runs Python on one thread; returns the wall time.
    The CPU time beside it tells whether the machine was shared."""
    began, used = time.monotonic(), cpu_seconds()
    subprocess.run([sys.executable, *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                   stdout=subprocess.DEVNULL if quiet else None)
    seconds = time.monotonic() - began
    if not quiet:
        print(f"{seconds:.0f} s of wall time, {cpu_seconds() - used:.0f} s of CPU time", flush=True)
    return seconds


def cpu_seconds() -> float:
    """Of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


# ----------------------------------------------------------------------------------------------------- theirs


def run_child(args: argparse.Namespace, tower: str, seconds: float) -> None:
    kept = [f"--{key.replace('_', '-')}={getattr(args, key)}"
            for key in ("data", "out", "hold_out", "caption_column", "size", "batch", "hues", "lr")]
    start("-m", "tests.bench.bench_clip", f"--child={tower}", f"--seconds={seconds}", *kept)


def train_theirs(args: argparse.Namespace) -> None:
    """open_clip's model until the time is up; leaves its embeddings of the pictures and names asked about."""
    from open_clip import ClipLoss, SimpleTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = TrainConfig(**recipe(args))
    train, asked = read_folder(cfg, Ranks(0, 1, torch.device("cpu")))[0].split()
    names, _ = answers(train, asked)
    tokens = SimpleTokenizer()
    # 77 would cost them time for nothing
    tokens.context_length = max(len(tokens.encode(name)) for name in names) + 2
    texts, asked_texts = tokens(train.captions[0]), tokens(names)
    model = build_theirs(args.child, cfg.size, tokens.context_length)
    loss_of, optimizer = ClipLoss(), adamw(model, args.lr, args.child)
    generator, step, share, began = torch.Generator().manual_seed(0), 0, 0.0, time.monotonic()
    while share < 1:
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        chosen = draw_indices(len(train.images), cfg.batch, generator)
        images, words, scale = model(augment(train.images[chosen],
                                             draw_view(cfg.batch, cfg.hues > 0, generator), cfg.hues,
                                             cfg.flip), texts[chosen])
        loss = loss_of(images, words, scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        step, share = step + 1, (time.monotonic() - began) / args.seconds
        if step % 50 == 0:
            print(f"open_clip {args.child}, step {step}, loss {loss.item():.3f}, {share:.0%} of the time",
                  flush=True)
    count = sum(p.numel() for p in model.parameters())
    table = model.token_embedding.weight.numel()
    print(f"open_clip {args.child}: {count:,} parameters, of which {table:,} in the token table; {step} "
          "steps")
    model.eval()
    with torch.no_grad():
        found = {"pictures": torch.cat([model.encode_image(p, normalize=True)
                                        for p in asked.images.split(256)]),
                 "texts": torch.cat([model.encode_text(t, normalize=True) for t in asked_texts.split(256)])}
    torch.save(found, args.out / f"open_clip-{args.child}.pt")


def build_theirs(tower: str, size: int, context: int) -> torch.nn.Module:
    """About as many parameters as our preset tiny, the token table apart: their vocabulary is fixed at
    49,408."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    text = CLIPTextCfg(context_length=context, vocab_size=49408, width=128, heads=2, layers=2)
    model = CLIP(embed_dim=128, vision_cfg=CLIPVisionCfg(image_size=size, **THEIRS[tower]), text_cfg=text)
    return model.to(memory_format=torch.channels_last)


def adamw(model: torch.nn.Module, lr: float, tower: str) -> torch.optim.AdamW:
    """Decay, betas and eps as open_clip's training has them."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    betas, eps = ((0.9, 0.98), 1e-6) if tower == "vit" else ((0.9, 0.999), 1e-8)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                              {"params": plain, "weight_decay": 0.0}],
                             lr=lr, betas=betas, eps=eps)


if __name__ == "__main__":
    main()
