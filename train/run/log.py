"""What a run tells: metrics, speed, a progress line. No tensor comes here.

Read after checkpoint.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from miniclip.files import WeightsError, atomic_write, parse_json, read_bytes, shown

from ..errors import UserError
from .cli import MANY

SPEED_ROWS = 100            # in speed.jsonl, about, for a whole run
MAX_ROW_BYTES = 512 * 2**20 # of metrics.jsonl
MAX_ROWS = 4_000_000
ROWS_AT_ONCE = 5_000
LARGEST = 1e39              # of a number in a row: beyond float32, whose infinity is written as such
SMOOTHING = 0.9             # of the loss in the progress line: a mean over about the last ten steps


def series(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of each row that has the value."""
    return [(row["step"], row[name]) for row in rows if name in row]


def read_rows(path: Path, needed: tuple[str, ...] = ("step",)) -> list[dict[str, Any]]:
    """The rows that `Metrics` wrote: a step and other numbers. Raises WeightsError with file, line and field.

    What follows the last line break is left out: a kill has torn it, or it is being written.
    """
    raw = read_bytes(path, MAX_ROW_BYTES)
    if raw.count(b"\n") > MAX_ROWS:
        raise WeightsError(f"{path}: more than {MAX_ROWS} lines are refused")
    rows, lines = [], raw.split(b"\n")[:-1]
    for first in range(0, len(lines), ROWS_AT_ONCE):
        rows += parse_rows(lines[first:first + ROWS_AT_ONCE], path, first + 1, needed)
    return rows


def parse_rows(lines: list[bytes], path: Path, first: int, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of some lines, the first of which has that number in the file: parsed together, four times as
    fast as one by one, which is how the line that is wrong is found."""
    together = b'{"rows": [%s]}' % b",\n".join(lines)       # no text may hold a line break: none spans two
    with contextlib.suppress(WeightsError):
        rows = parse_json(together, str(path))["rows"]
        whole = all(line[:1] == b"{" and line[-1:] == b"}" for line in lines)
        if whole and len(rows) == len(lines) and not any(problem_in(row, needed) for row in rows):
            return rows
    rows = []
    for number, line in enumerate(lines, first):
        rows.append(parse_json(line, f"{path}, line {number}"))
        if problem := problem_in(rows[-1], needed):
            raise WeightsError(f"{path}, line {number}: {problem}")
    return rows


def problem_in(row: dict[str, Any], needed: tuple[str, ...]) -> str:
    """Why it is no row of a run, in words; empty if it is one."""
    for name, value in row.items():
        if type(value) not in (int, float) or abs(value) > LARGEST and not math.isinf(value):
            return f"{shown(name)} = {shown(value)} is not a number of a run"
    if missing := [name for name in needed if name not in row]:
        return f"no {missing[0]}"
    step = row["step"]
    return "" if type(step) is int and 0 <= step <= MANY else f"step = {step} is not one of a run"


class Metrics:
    """One JSON object a line in a file; `rows` holds them all, those of a resumed run included.

    A checkpoint of step s is taken before s trains and after s is evaluated: on resuming,
    of step s the rows without a loss stay, and so does all before.
    What only looks on (`path` None) writes nothing. needed: what each row has; see `read_rows`.
    """

    def __init__(self, path: Path | None, resume_at: int | None = None, needed: tuple[str, ...] = ("step",)):
        self.path, self.rows, self.file = path, [], None
        if path is None:
            return
        if resume_at is not None and path.exists():
            self.rows = [r for r in read_rows(path, needed) if r["step"] < resume_at or r["step"] == resume_at
                         and "loss" not in r]
        with atomic_write(path) as file:
            file.write("".join(map(self._line, self.rows)).encode("utf-8"))
        self.file: TextIO | None = path.open("a", encoding="utf-8", newline="\n")

    def add(self, **row: Any) -> None:
        """Appends a row at once, so that a killed run keeps it. Raises UserError where the disk is full."""
        self.rows.append(row)
        if self.file is not None:
            try:
                self.file.write(self._line(row))
                self.file.flush()
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        return json.dumps(row, ensure_ascii=False) + "\n"

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each row that has the value."""
        return series(self.rows, name)


class Speed:
    """What no two runs share: seconds, images a second and memory, about a hundred times in a run,
    in a file apart."""

    def __init__(self, metrics: Metrics, device: torch.device, steps: int, batch: int):
        self.metrics, self.device, self.batch = metrics, device, batch
        self.every = max(1, steps // SPEED_ROWS)
        # of the run that is resumed
        self.before = metrics.rows[-1]["seconds"] if metrics.rows else 0.0
        self.began = self.last = time.monotonic()
        self.last_step: int | None = None

    def seconds(self) -> float:
        """Of the whole run, the time before it was resumed included."""
        return self.before + time.monotonic() - self.began

    def add(self, step: int) -> None:
        """To be called after each step."""
        if self.last_step is None:                  # the first step warms up: it is not counted
            self.last, self.last_step = time.monotonic(), step
        elif step - self.last_step >= self.every:
            now = time.monotonic()
            rate = (step - self.last_step) * self.batch / (now - self.last)
            self.metrics.add(step=step, seconds=round(self.seconds(), 1), pictures_per_second=round(rate, 2),
                             memory_mib=round(peak_memory(self.device) / 2**20))
            self.last, self.last_step = now, step


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what tensors took at most; else what the whole process took, where the system tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                             # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """A line with rate and time left: rewritten in place on a terminal, every 10 seconds in a log."""

    def __init__(self, total: int, start: int = 0, unit: str = "step", stream: TextIO = sys.stdout):
        self.total, self.start, self.unit, self.stream = total, start, unit, stream
        self.live = stream.isatty()
        self.began = self.shown = time.monotonic()

    def show(self, done: int, text: str) -> None:
        """Shows `text` after so many of the total; says nothing if the last line is too recent."""
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
        """Ends the line, so that what is printed next has one of its own."""
        if self.live:
            self.stream.write("\n")


def clock(seconds: float) -> str:
    """Minutes and seconds: 75:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d}"


def smoothed(mean: float, value: float) -> float:
    """The running mean of the loss after another value; `mean` is NaN before the first."""
    return value if math.isnan(mean) else SMOOTHING * mean + (1 - SMOOTHING) * value


class StopFlag:
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.set = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, _: Any) -> None:
        self.set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        """Puts back the handlers of before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
