"""Feeds every reader damaged input: does it load, or end in one line that says what is wrong?

    python -m tests.faults.fuzz --seconds 120 --seed 1 [--inputs N] [--readers a,b] [--jobs 1]
    python -m tests.faults.fuzz --seed 1 --only json:17         one input, here, with its traceback
    python -m tests.faults.fuzz --corpus                        each case that once failed

Read after fuzz_folders.py. Inputs are read in workers, each a child of this process with limits on time and
memory and an audit hook; see fuzz_guard.py. What fails is left in --out as files of the corpus's form.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import functools
import gc
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.faults import fuzz_guard as guard
from tests.faults.fuzz_folders import READERS, Reader
from tests.faults.fuzz_guard import GOOD, KINDS, ROOT, Result
from tests.faults.fuzz_mutate import Base, Case, Content, mutated
from train.run.log import Progress

CORPUS = Path(__file__).parent / "corpus"
TURN = 2.0              # seconds that a reader's worker lives, before it is another reader's turn
WATCHDOG = 30.0         # seconds without an answer after which a worker is killed: it blocks, or loops in C
METHOD = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


# ---------------------------------------------------------------------------------------------------- inputs


def base_of(reader: Reader) -> Base:
    """The reader's valid inputs; each is read once, so that what it imports is there before workers fork."""
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        reader.build(Path(place))
        entries = sorted(Path(place).iterdir())
        base = {entry.name: {file.relative_to(place).as_posix(): file.read_bytes()
                             for file in sorted([entry, *entry.rglob("*")]) if file.is_file()} for entry in entries}
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
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        if file.relative_to(folder).as_posix() not in files:
            file.unlink()


# --------------------------------------------------------------------------------------------------- workers


def work(connection: Any, reader: Reader, base: Base, case_of: Callable[[int], Case], first: int, last: int,
         seconds: float, folder: Path) -> None:
    """Reads the inputs first .. last - 1 until so many seconds have passed, and sends a Result of each."""
    torch.set_num_threads(1)
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
    mine = {path: content for path, content in base[case.entry].items()}
    others = {file: b"" for name in base if name != case.entry for file in base[name]}
    restore(folder, {**others, **mine}, case.changes)
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
        except EOFError:
            self.process.join()
            yield self.failed("died", f"exit code {self.process.exitcode}")
        if not self.over and time.monotonic() - self.heard > WATCHDOG:
            yield self.failed("hang", f"silent for {WATCHDOG:.0f} s")

    def failed(self, kind: str, why: str) -> Result:
        self.end()
        self.next += 1
        return Result(self.next - 1, kind, f"{kind} {why}", why, time.monotonic() - self.heard)

    def end(self) -> None:
        """Ends the process and removes its folder."""
        self.over = True
        self.process.join(1)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- the run


class Tally:
    """What became of a reader's inputs."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds, self.peak = 0.0, 0
        self.slowest = Result(0, "loaded")
        self.holes: dict[str, Result] = {}

    def add(self, result: Result) -> None:
        self.counts[result.kind] += 1
        self.seconds += result.seconds
        self.peak = max(self.peak, result.peak)
        self.slowest = max(self.slowest, result, key=lambda r: r.seconds)
        if result.kind not in GOOD:
            self.holes.setdefault(result.key, result)


def fuzz(readers: dict[str, Reader], seed: int = 0, seconds: float = 1e9, inputs: int = 10**12, jobs: int = 1,
         each: int = 10**12, bases: dict[str, Base] | None = None) -> dict[str, Tally]:
    """Readers take turns until so many seconds have passed or so many inputs were read; each: of one reader."""
    bases = bases or {name: base_of(reader) for name, reader in readers.items()}
    gc.collect(), gc.freeze()
    tallies, starts = {name: Tally() for name in readers}, dict.fromkeys(readers, 0)
    queue, turns, done, began = collections.deque(readers), [], 0, time.monotonic()
    progress = Progress(round(seconds), unit="second")
    place = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        while turns or queue:
            over = done >= inputs or time.monotonic() - began > seconds
            while queue and len(turns) < jobs and not over:
                name = queue.popleft()
                case_of = functools.partial(mutated, bases[name], seed, name)
                last = min(each, starts[name] + inputs - done)
                turns.append(Turn(name, readers[name], bases[name], case_of, starts[name], last, TURN, place))
            wait([turn.connection for turn in turns], 0.5)
            for turn in list(turns):
                for result in turn.results():
                    tallies[turn.name].add(result)
                    done += 1
                if turn.over:
                    turns.remove(turn)
                    starts[turn.name] = turn.next
                    if turn.next < each:
                        queue.append(turn.name)
            bad = sum(len(tally.holes) for tally in tallies.values())
            progress.show(round(time.monotonic() - began), f"{done:,} inputs, {bad} kinds of failure")
            if over and not turns:
                break
    finally:
        for turn in turns:
            turn.process.kill()
            turn.end()
        shutil.rmtree(place, ignore_errors=True)
        gc.unfreeze()
    progress.close()
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """A row for each reader, and all of them together."""
    heads = ["reader", "inputs", "loaded", "one line", *(f"{kind}s" for kind in ("traceback", "message", "hang")),
             "memory", "processes", "sockets", "outside", "died", "slowest s", "peak MB", "inputs/s"]
    rows = []
    for name, tally in tallies.items():
        total = tally.counts.total()
        rows.append([name, total, *(tally.counts[kind] for kind in KINDS), round(tally.slowest.seconds, 2),
                     tally.peak >> 20, round(total / max(tally.seconds, 1e-9))])
    columns = list(zip(*rows))[1:]
    total, seconds = sum(columns[0]), sum(tally.seconds for tally in tallies.values())
    rows.append(["all", *map(sum, columns[:11]), max(columns[11]), max(columns[12]), round(total / max(seconds, 1e-9))])
    lines = [["| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row) + " |"]
             for row in [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]]
    return "\n".join(itertools.chain(*lines))


# ---------------------------------------------------------------------------------------------------- corpus


def as_entry(reader: str, case: Case, found: str) -> dict[str, Any]:
    """A case as the corpus keeps it."""
    files = {path: {"is": content or "missing"} if not isinstance(content, bytes) else packed(content)
             for path, content in case.changes.items()}
    return {"reader": reader, "entry": case.entry, "found": found, "closed": False, "files": files}


def packed(content: bytes) -> dict[str, str]:
    """As text where it is short and plain, else packed."""
    if len(content) < 2_000 and content.isascii() and content.decode().replace("\n", "").isprintable():
        return {"text": content.decode()}
    return {"zlib": base64.b64encode(zlib.compress(content, 9)).decode()}


def case_of_entry(entry: dict[str, Any]) -> Case:
    """The case back."""
    def content(file: dict[str, str]) -> Content:
        if "is" in file:
            return None if file["is"] == "missing" else file["is"]
        return file["text"].encode() if "text" in file else zlib.decompress(base64.b64decode(file["zlib"]))

    return Case(entry["entry"], {path: content(file) for path, file in entry["files"].items()})


def corpus() -> dict[Path, dict[str, Any]]:
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(CORPUS.glob("*.json"))}


def replay(entries: list[dict[str, Any]], bases: dict[str, Base], readers: dict[str, Reader] = READERS
           ) -> list[Result]:
    """Reads cases of the corpus; a worker for each reader."""
    results: dict[int, Result] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in dict.fromkeys(entry["reader"] for entry in entries):
            mine = [i for i, entry in enumerate(entries) if entry["reader"] == name]
            cases, first = [case_of_entry(entries[i]) for i in mine], 0
            while first < len(cases):
                turn = Turn(name, readers[name], bases[name], cases.__getitem__, first, len(cases), 1e9, Path(place))
                while not turn.over:
                    wait([turn.connection], 0.5)
                    results |= {mine[result.number]: result for result in turn.results()}
                first = turn.next
    return [results[i] for i in range(len(entries))]


def keep(tallies: dict[str, Tally], bases: dict[str, Base], seed: int, out: Path) -> None:
    """Prints each hole, and leaves its first case as a file."""
    for name, tally in tallies.items():
        for key, result in tally.holes.items():
            print(f"\n{result.kind}: {name}:{result.number} ({key})\n{result.detail}")
            entry = as_entry(name, mutated(bases[name], seed, name, result.number), f"{result.kind}: {key}")
            out.mkdir(parents=True, exist_ok=True)
            file = f"{name}-{zlib.crc32(key.encode()):08x}.json"
            (out / file).write_text(json.dumps(entry, ensure_ascii=False, indent=1), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- command line


def only(name: str, number: int, seed: int) -> int:
    """One input in this process, without guard, so that its traceback is Python's own."""
    base = base_of(READERS[name])
    case = mutated(base, seed, name, number)
    with tempfile.TemporaryDirectory() as place:
        for path, content in {**base[case.entry], **case.changes}.items():
            put(Path(place, path), content)
        print(f"{case.entry}: " + ", ".join(f"{path} {content if not isinstance(content, bytes) else len(content)}"
                                            for path, content in case.changes.items()))
        READERS[name].read(Path(place, case.entry))
    print("loaded")
    return 0


def replay_corpus() -> int:
    """Prints how each case of the corpus ends, and marks those that are closed by now."""
    found = corpus()
    bases = {name: base_of(READERS[name]) for name in dict.fromkeys(e["reader"] for e in found.values())}
    for (path, entry), result in zip(found.items(), replay(list(found.values()), bases), strict=True):
        print(f"{result.kind:10s}{'' if entry['closed'] else 'open  '}{path.name}  {entry['found']}")
        if result.kind in GOOD and not entry["closed"]:
            path.write_text(json.dumps({**entry, "closed": True}, ensure_ascii=False, indent=1), encoding="utf-8")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="how long (%(default)s)")
    parser.add_argument("--inputs", type=int, default=10**9, help="how many at most")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same inputs (%(default)s)")
    parser.add_argument("--readers", default=",".join(READERS), help="some of %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="workers at a time (%(default)s)")
    parser.add_argument("--only", metavar="READER:NUMBER", help="one input, with its traceback")
    parser.add_argument("--corpus", action="store_true", help="the cases that once failed; marks what is closed")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz", help="for cases that fail (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.only:
        name, _, number = args.only.partition(":")
        return only(name, int(number), args.seed)
    if args.corpus:
        return replay_corpus()
    readers = {name: READERS[name] for name in args.readers.split(",")}
    bases = {name: base_of(reader) for name, reader in readers.items()}
    tallies = fuzz(readers, args.seed, args.seconds, args.inputs, args.jobs, bases=bases)
    keep(tallies, bases, args.seed, args.out)
    print(f"\n{table(tallies)}")
    return int(any(tally.holes for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
