"""Runs a training script, kills it, lets it go on,
and holds what it leaves against a run that was never disturbed.

Each life of a run is a forked child of this process, so that a kill costs no second start of Python.
POSIX only.
Some kills come from outside at a random moment, some strike from inside at a random file operation of a save.
"""

from __future__ import annotations

import dataclasses
import filecmp
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from miniclip import image_text, weights
from minidiff.text_to_image import Preset
from train import train_clip, train_diffusion
from train.errors import UserError
from train.run import cli
from train.run.checkpoint import Checkpoints, load_checkpoint

ROOT = Path(__file__).parent.parent.parent
FORK = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else None
NOT_OF_THE_RESULT = ("speed.jsonl", "report.html")      # they tell the time


class Script(NamedTuple):
    """A training script with flags that make it tiny; `prepare` runs in the child before it."""

    module: ModuleType
    flags: dict[str, Any]
    prepare: Callable[[], None]

    def run(self, **flags: Any) -> None:
        self.module.main(self.module.TrainConfig(**{**self.flags, **flags}))


def tiny_diffusion() -> None:
    train_diffusion.PRESETS["tiny"] = Preset((8, 16), (False, True), 1, 32, 1)


DIFFUSION = Script(train_diffusion, {
    "data": str(ROOT / "data" / "calligraphy"), "size": 16, "preset": "tiny", "steps": 12, "batch": 4,
    "samples": 2,
    "sample_steps": 1, "save_every": 1, "device": "cpu"}, tiny_diffusion)

def tiny_clip() -> None:
    train_clip.PRESETS["tiny"] = image_text.Preset("resnet", 8, (1, 1, 1, 1), 0, 64, 1, 64)


CLIP = Script(train_clip, {
    "data": str(ROOT / "data" / "herbs"), "size": 32, "preset": "tiny", "steps": 12, "batch": 8, "checks": 2,
    "ema": 0.9,
    "hold_out": "artist=twitter", "save_every": 1, "device": "cpu"}, tiny_clip)
SCRIPTS = {"diffusion": DIFFUSION, "clip": CLIP}


class Life(NamedTuple):
    code: int           # exit status; minus the signal that ended it
    error: str          # its stderr
    seconds: float


def live(script: Script, kill_after: float | None = None, before: Callable[[], None] | None = None,
         **flags: Any) -> Life:
    """One life of a run: to its end, or to a SIGKILL after so many seconds.
    `before` runs in the child first."""
    reader, writer = FORK.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = Pipe(writer)
        script.prepare()
        if before:
            before()
        cli.start(lambda: script.run(**flags))

    job, began = FORK.Process(target=child), time.monotonic()
    job.start()
    writer.close()
    job.join(kill_after if kill_after is not None else 300)
    os.kill(job.pid, signal.SIGKILL) if job.is_alive() else None
    job.join()
    return Life(job.exitcode, received(reader), time.monotonic() - began)


class Pipe(io.TextIOBase):
    def __init__(self, connection: Any):
        self.connection = connection

    def write(self, text: str) -> int:
        self.connection.send(text)
        return len(text)


def received(reader: Any) -> str:
    parts = []
    try:
        while reader.poll():
            parts.append(reader.recv())
    except (EOFError, OSError):
        pass
    return "".join(parts)


def die_in_a_save(rng: random.Random) -> Callable[[], None]:
    """A SIGKILL from inside: at one of the next file operations of saving, some of them half done."""
    count, half = rng.randrange(1, 40), rng.random()

    def install() -> None:
        left = [count]

        def counted(work: Callable, torn: bool = False) -> Callable:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] <= 0 and torn:                       # torch.save(state, file): write a part of it
                    buffer = io.BytesIO()
                    work(args[0], buffer)
                    args[1].write(buffer.getvalue()[:int(half * buffer.tell())])
                    args[1].flush()
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(*args, **kwargs)
            return wrapper

        weights.os.replace, weights.os.fsync = counted(os.replace), counted(os.fsync)
        weights.os.unlink = counted(os.unlink)
        torch.save = counted(torch.save, torn=True)

    return install


class Tally(NamedTuple):
    kills: int
    in_saves: int
    lost: int           # times the newest checkpoint was damaged, or older than one seen before
    runs: int
    differing: list[str]


def torment(script: Script, folder: Path, kills: int, seed: int) -> Tally:
    """Runs, killed and resumed over and over until they end, `kills` times in all;
    their files beside an undisturbed run's."""
    rng, whole = random.Random(seed), folder / "whole"
    life = live(script, out=str(whole))
    assert life.code == 0, life.error
    done, in_saves, lost, runs, differing = 0, 0, 0, 0, []
    while done < kills:
        out, newest = folder / f"run{runs}", -1
        while True:
            inside = rng.random() < 0.5
            after = None if inside else rng.uniform(0.02, 0.8) * life.seconds
            found, damage = step_of(out)
            lost += damage or found < newest
            newest = found
            end = live(script, after if done < kills else None,
                       die_in_a_save(rng) if inside and done < kills else None,
                       out=str(out), resume=newest >= 0, overwrite=newest < 0)
            if end.code != -signal.SIGKILL:
                break
            done, in_saves = done + 1, in_saves + inside
        assert end.code == 0, end.error
        differing += [f"{out.name}/{name}" for name in differences(whole, out)]
        shutil.rmtree(out)
        runs += 1
    return Tally(done, in_saves, lost, runs, differing)


def step_of(out: Path) -> tuple[int, bool]:
    """Step of the newest good checkpoint, -1 if there is none; and whether one was damaged."""
    damage: list[str] = []
    try:
        return Checkpoints(out, 2).load(damage.append)["step"], bool(damage)
    except UserError:
        return -1, bool(damage)


def differences(one: Path, other: Path) -> list[str]:
    """Files that are not in both, or not the same byte for byte;
    of checkpoints, not the same in every value."""
    names = {path.relative_to(root) for root in (one, other) for path in root.rglob("*") if path.is_file()}
    return [str(name) for name in sorted(names) if name.name not in NOT_OF_THE_RESULT
            and not equal(one / name, other / name)]


def equal(one: Path, other: Path) -> bool:
    if not (one.is_file() and other.is_file()):
        return False
    if one.suffix == ".pt":
        a, b = (load_checkpoint(path) for path in (one, other))
        a["config"].pop("out"), b["config"].pop("out")
        return same(a, b)
    if one.name == "config.json":
        a, b = (weights.read_json(path) for path in (one, other))
        return {**a, "out": ""} == {**b, "out": ""}
    return filecmp.cmp(one, other, shallow=False)


def same(a: Any, b: Any) -> bool:
    """Nested dicts, lists and tensors, equal to the last bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return dataclasses.is_dataclass(a) or a == b
