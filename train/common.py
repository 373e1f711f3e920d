"""What the training scripts truly share: flags, device, clear errors, EMA, checkpoints, metrics, a progress line.

Read before train_diffusion.py. No loop lives here: each script keeps its own in sight.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from data.folder import DataError
from miniclip.config import ConfigError
from miniclip.weights import WeightsError, atomic_write, read_pickle


class UserError(Exception):
    """Something the user can mend; shown as one line, without a traceback."""


def flag(default: Any, help: str, **more: Any) -> Any:
    """A field of a script's config that is also a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def parse_flags(config_class: type, description: str, argv: list[str] | None = None) -> Any:
    """A dataclass's fields as flags: `jitter: bool = True` gives --jitter and --no-jitter."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        name, kind = "--" + f.name.replace("_", "-"), hints[f.name]
        options = {"help": f.metadata["help"], "default": f.default}
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        else:
            kind = next((t for t in typing.get_args(kind) if t is not type(None)), kind)    # int | None: int
            parser.add_argument(name, type=kind, choices=f.metadata.get("choices"), **options)
    return config_class(**vars(parser.parse_args(argv)))


def run(main: Callable[[], None]) -> None:
    """Runs a script: what the user can mend becomes one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")      # Chinese on any Windows console
    try:
        main()
    except (UserError, DataError, ConfigError, WeightsError) as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        sys.exit(_fail(f"{error.filename or 'file'}: {error.strerror or error}"))
    except torch.cuda.OutOfMemoryError:
        sys.exit(_fail("out of memory on the device: try a smaller --batch or --preset"))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(message: str, status: int = 2) -> int:
    print(f"\nerror: {' '.join(message.split())}", file=sys.stderr)
    return status


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, else Apple's MPS, else the CPU; a device that is not there is a UserError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in there.items() if present)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; try auto, cpu, cuda, cuda:1 or mps") from None
    if not there.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        have = ", ".join(d for d, present in there.items() if present)
        raise UserError(f"--device {name} is not there; this machine has: {have}")
    return device


def make_folder(path: str | Path) -> Path:
    """Creates an output folder and proves that it can be written before any work starts."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with atomic_write(path / "writable"):
        pass
    (path / "writable").unlink()
    return path


class EMA:
    """A running mean of the weights, for sampling. Parameters only: no table or buffer is touched.

    The decay grows as (1 + s) / (10 + s) up to `decay`, so that a run of a few hundred steps is not mostly its start.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.mean = [p.detach().clone() for p in self.parameters]

    def update(self, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - keep)

    def __enter__(self) -> None:
        """Within `with ema:` the model holds the means."""
        self.live = [p.detach().clone() for p in self.parameters]
        self._fill(self.mean)

    def __exit__(self, *_: Any) -> None:
        self._fill(self.live)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Written beside its place and then moved there: a kill never leaves half a file under the good name."""
    with atomic_write(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values only; a pickle that would run code is refused."""
    state = read_pickle(path)
    parts = ("model", "optimizers", "ema", "step", "config")
    missing = [name for name in parts if not isinstance(state, dict) or name not in state]
    if missing:
        raise UserError(f"{path}: not a checkpoint of a training run (no {', '.join(missing)})")
    return state


class Metrics:
    """One JSON object a line in `metrics.jsonl`; `rows` holds them all, those of a resumed run included."""

    def __init__(self, path: Path, resume_at: int | None = None):
        self.path, self.rows = path, []
        if resume_at is not None and path.exists():
            rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            self.rows = [row for row in rows if row["step"] < resume_at]
        with atomic_write(path) as file:
            file.write("".join(map(self._line, self.rows)).encode("utf-8"))
        self.file: TextIO = path.open("a", encoding="utf-8", newline="\n")

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.file.write(self._line(row))
        self.file.flush()

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        return json.dumps(row, ensure_ascii=False) + "\n"

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(row["step"], row[name]) for row in self.rows if name in row]


class Progress:
    """A line with rate and time left: rewritten in place on a terminal, every 10 seconds in a log."""

    def __init__(self, total: int, start: int = 0, unit: str = "step", stream: TextIO = sys.stdout):
        self.total, self.start, self.unit, self.stream = total, start, unit, stream
        self.live = stream.isatty()
        self.began = self.shown = time.monotonic()

    def show(self, done: int, text: str) -> None:
        now = time.monotonic()
        if done < self.total and now - self.shown < (0.2 if self.live else 10):
            return
        self.shown = now
        rate = (done - self.start) / max(now - self.began, 1e-9)
        left = (self.total - done) / rate if rate > 0 else 0
        line = f"{self.unit} {done}/{self.total}  {text}  {rate:.1f} {self.unit}s/s  {clock(left)} left"
        self.stream.write(f"\r\x1b[K{line}" if self.live else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.live:
            self.stream.write("\n")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d}"


class StopFlag:
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.set = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, _: Any) -> None:
        self.set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def save_picture(picture: Tensor, path: Path) -> None:
    """[C, H, W] in [-1, 1] as a PNG, grey if C is 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte()
    with atomic_write(path) as file:
        to_pil_image(levels).save(file, format="png")


def save_grid(pictures: Tensor, path: Path, columns: int) -> None:
    """Pictures [N, C, H, W] in [-1, 1] as one PNG, row by row, with a thin frame around each."""
    save_picture(make_grid(pictures, nrow=columns, padding=1, pad_value=0.6), path)


def grid_columns(n: int) -> int:
    """The widest of a few handy row lengths that fills whole rows, so that captions line up."""
    return next((k for k in (10, 8, 5, 6, 7, 4) if n % k == 0 and n > k), min(n, 8))


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads of {os.cpu_count()}" if device.type == "cpu" else "Apple GPU"
