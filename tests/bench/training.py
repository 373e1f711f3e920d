"""What training options cost and save, and what checkpoints and metrics cost: part of make bench."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from train import train_clip
from train.data.batches import InMemory
from train.data.folder import CaptionedImages
from train.optim import build_optimizers
from train.run.checkpoint import Checkpoints
from train.run.distributed import Ranks, clip_gradients
from train.run.log import Metrics, Speed
from train.run.loop import evaluation_steps
from train.run.settings import autocast
from train.run.state import TrainState, fingerprint
from train.train_diffusion import TrainConfig, draw, initial_model

COMMON = ["--precision bf16", "--precision fp16", "--gradient-checkpointing", "--stream", "--compile"]
ALONE = Ranks(0, 1, torch.device("cpu"))
SCRIPTS = {"train.train_diffusion": (["--samples", "0", "--sample-steps", "1"],
                                     ["", "--accumulate 4", *COMMON]),
           "train.train_clip": (["--checks", "0", "--preset", "vit-small"], ["", "--chunk 4", *COMMON])}


def overhead(steps: int = 8) -> float:
    """Share of a demo run's time that checkpoints and metrics take: seconds measured apart,
    then counted together."""
    cfg = TrainConfig(device="cpu")
    folder = CaptionedImages(cfg.data, cfg.size, cfg.channels)
    model, seen = initial_model(cfg, folder.captions), fingerprint([], [])
    model.unet.to(memory_format=torch.channels_last)
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, cfg.muon_lr)
    state = TrainState.begin(cfg, seen, model, optimizers, ALONE.device)
    batches = InMemory(folder.images(), cfg.batch, slice(None))

    def step_backward() -> None:
        indices, images = batches.batch(0, state.generator)
        model(*draw(model, indices, images, folder.captions, cfg, ALONE, state.generator)).backward()

    def step() -> None:
        step_backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.ema.update(0)

    with tempfile.TemporaryDirectory() as out:
        checkpoints, metrics = Checkpoints(Path(out), cfg.keep), Metrics(Path(out) / "metrics.jsonl")
        speed = Speed(Metrics(Path(out) / "speed.jsonl"), torch.device("cpu"), cfg.steps, cfg.batch)
        a_step = median(step, steps)
        a_save, a_best = (median(lambda b=b: checkpoints.save(state.capture(), best=b), 4)
                          for b in (False, True))

        def rows() -> None:
            for i in range(400):
                metrics.add(step=i, loss=0.1, grad_norm=0.1, lr=0.1)
                speed.add(i)

        a_row = median(rows, 3) / 400
        step_backward()
        a_clip = median(lambda: clip_gradients(model.parameters(), cfg.clip), 20)
    evaluated = evaluation_steps(cfg.steps, cfg.samples)
    others = len(set(range(cfg.save_every, cfg.steps, cfg.save_every)) - evaluated)
    share = (len(evaluated) * a_best + others * a_save + cfg.steps * a_row) / (cfg.steps * a_step)
    print(f"demo step {a_step:.3f} s, clipping {1e3 * a_clip:.1f} ms, checkpoint {a_save:.3f} s, with the "
          f"best {a_best:.3f} s, "
          f"metrics {1e6 * a_row:.0f} us a step; {len(evaluated)} + {others} checkpoints in {cfg.steps} "
          f"steps: overhead {share:.2%}", flush=True)
    return share


def activations() -> None:
    """MiB of tensors kept for the backward pass of one step (or piece of one),
    at the demo's settings: exact."""
    cfg = TrainConfig(device="cpu")
    captions = CaptionedImages(cfg.data, cfg.size, cfg.channels).captions
    base = 0.0
    ways = (("as it is", cfg.batch, "float32", False), ("--precision bf16", cfg.batch, "bf16", False),
            ("--accumulate 4", cfg.batch // 4, "float32", False),
            ("--gradient-checkpointing", cfg.batch, "float32", True))
    for name, batch, precision, recompute in ways:
        model, kept = initial_model(cfg, captions), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        model.unet.enable_gradient_checkpointing(recompute)
        generator = torch.Generator().manual_seed(0)
        t = torch.arange(batch) * len(model.scheduler) // batch
        noise = torch.randn(batch, *model.latent_shape, generator=generator)

        def keep(tensor: torch.Tensor, weights=weights, kept=kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, autocast(precision, torch.device("cpu")):
            loss = model(noise, captions[:batch], t, noise)
        mib = sum(kept.values()) / 2**20
        base = base or mib
        print(f"{name:26} {mib:6.1f} MiB of activations  {mib / base:5.2f} of the plain one "
              f"({loss.item():.3f})", flush=True)


def median(work, times: int) -> float:
    work()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def options(script: str, steps: int = 6) -> None:
    """Seconds a step of short runs of a script itself at its demo's settings, one process and thread each."""
    always, choices = SCRIPTS[script]
    base = 0.0
    for choice in choices:
        rows = speed_of(["-m", script, *choice.split(), *always, "--steps", str(steps)])
        seconds = batch_of(script) / statistics.median(row["pictures_per_second"] for row in rows)
        base = base or seconds
        print(f"{script:22} {choice or 'as it is':26} {seconds:6.3f} s a step  {seconds / base:5.2f} of the "
              "plain one", flush=True)


def processes(script: str, steps: int = 12) -> None:
    """What a second process brings: two of one thread each beside one of one thread,
    the whole batch the same."""
    rates = {}
    for count in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        rows = speed_of([*torchrun, "-m", script, *SCRIPTS[script][0], "--steps", str(steps)])
        rates[count] = statistics.median(row["pictures_per_second"] for row in rows)
    print(f"{script:22} two processes: {rates[2] / rates[1]:.2f} times as many pictures a second as one",
          flush=True)


def speed_of(command: list[str]) -> list[dict]:
    """The rows of speed.jsonl that a run leaves."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([sys.executable, *command, "--out", out, "--device", "cpu"],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1][:200]}")
        rows = (Path(out) / "speed.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in rows.splitlines()]


def batch_of(script: str) -> int:
    return {"train.train_diffusion": TrainConfig, "train.train_clip": train_clip.TrainConfig}[script].batch


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    overhead()
    activations()
    for script in SCRIPTS:
        options(script)
        processes(script)
