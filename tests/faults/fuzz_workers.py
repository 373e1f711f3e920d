"""Valid inputs, and workers that read cases of them: each a child with limits and an audit hook.

Read after fuzz_readers.py.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.faults import fuzz_guard as guard
from tests.faults.fuzz_guard import Result
from tests.faults.fuzz_inputs import Reader
from tests.faults.fuzz_mutate import Base, Case, Content

WATCHDOG = 30.0         # seconds without an answer after which a worker is killed: it blocks, or loops in C
METHOD = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


# ---------------------------------------------------------------------------------------------------- inputs


def base_of(reader: Reader) -> Base:
    """The reader's valid inputs; each is read once, so that what it imports is there before workers fork."""
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        reader.build(Path(place))
        entries = sorted(Path(place).iterdir())
        files = {entry.name: [file for file in sorted([entry, *entry.rglob("*")]) if file.is_file()]
                 for entry in entries}
        base = {name: {file.relative_to(place).as_posix(): file.read_bytes() for file in those}
                for name, those in files.items()}
        with contextlib.redirect_stdout(io.StringIO()):
            for entry in entries:
                reader.read(entry)
    return base


def put(path: Path, content: Content) -> None:
    """Makes a file what a case says."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "pipe" and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()


def restore(folder: Path, files: dict[str, bytes], changed: Iterable[str]) -> None:
    """Makes the input valid again: what was changed is put back, and what the reader left is taken away."""
    for path in changed:
        put(folder / path, files[path])
    for file in [file for file in folder.rglob("*") if not file.is_dir()]:
        if file.relative_to(folder).as_posix() not in files:
            file.unlink()


# --------------------------------------------------------------------------------------------------- workers


def work(connection: Any, reader: Reader, base: Base, case_of: Callable[[int], Case], first: int, last: int,
         seconds: float, folder: Path) -> None:
    """Reads the inputs first .. last - 1 until so many seconds have passed, and sends a Result of each."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent ends it
    for stream in (1, 2):               # what readers and libraries print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    guard.limit_memory()
    guard.install(folder)
    began = time.monotonic()
    for number in range(first, last):
        connection.send(examined(reader, base, case_of(number), number, folder))
        if time.monotonic() - began > seconds:
            break
    connection.send(None)
    connection.close()


def examined(reader: Reader, base: Base, case: Case, number: int, folder: Path) -> Result:
    """Lays an input into the folder, reads it, and makes it valid again."""
    entry = folder / case.entry
    for path, content in base[case.entry].items() if not entry.exists() else ():
        put(folder / path, content)
    for path, content in case.changes.items():
        put(folder / path, content)
    result = guard.examine(number, reader.read, entry, reader.errors)
    valid = {path: content for files in base.values() for path, content in files.items()}
    restore(folder, valid, case.changes)
    return result


class Turn:
    """A worker for one reader, and what it has sent."""

    def __init__(self, name: str, reader: Reader, base: Base, case_of: Callable[[int], Case], first: int,
                 last: int, seconds: float, place: Path):
        self.name, self.next, self.last, self.heard = name, first, last, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(dir=place))
        context = multiprocessing.get_context(METHOD)
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=work, daemon=True, args=(
            theirs, reader, base, case_of, first, last, seconds, self.folder))
        self.process.start()
        theirs.close()
        self.over = False

    def results(self) -> Iterator[Result]:
        """Those that have come. A worker that died, or is silent for too long, is the result of its input."""
        try:
            while not self.over and self.connection.poll():
                result = self.connection.recv()
                self.heard = time.monotonic()
                if result is None:
                    self.end()
                else:
                    self.next = result.number + 1
                    yield result
        except (EOFError, OSError):
            self.process.join()
            yield self.failed("died", f"exit code {self.process.exitcode}")
        if not self.over and time.monotonic() - self.heard > WATCHDOG:
            yield self.failed("hang", f"silent for {WATCHDOG:.0f} s")

    def failed(self, kind: str, why: str) -> Result:
        self.kill()
        self.next += 1
        return Result(self.next - 1, kind, f"{kind} {why}", why, time.monotonic() - self.heard)

    def kill(self) -> None:
        """Ends it at once."""
        self.process.kill()
        self.end()

    def end(self) -> None:
        """Ends the process and removes its folder."""
        self.over = True
        self.process.join(1)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)
