"""Feeds every reader damaged input: does it load, or end in one line that says what is wrong?

    python -m tests.faults.fuzz --seconds 120 --seed 1 [--inputs N] [--readers a,b] [--jobs 1]
    python -m tests.faults.fuzz --seed 1 --only json:17         one input, here, with its traceback
    python -m tests.faults.fuzz --corpus                        each case that once failed

Read last of the fuzzer: fuzz_guard, fuzz_mutate, fuzz_inputs, fuzz_models, fuzz_readers, fuzz_workers, fuzz.
What fails is left in --out as files of the corpus's form.
"""

from __future__ import annotations

import argparse
import base64
import collections
import functools
import gc
import json
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from tests.faults.fuzz_guard import GOOD, KINDS, ROOT, Result
from tests.faults.fuzz_mutate import Base, Case, Content, mutated
from tests.faults.fuzz_readers import READERS, Reader
from tests.faults.fuzz_workers import Turn, base_of, put
from train.run.log import Progress

CORPUS = Path(__file__).parent / "corpus"
TURN = 2.0              # seconds that a reader's worker lives, before it is another reader's turn


# --------------------------------------------------------------------------------------------------- the run


class Tally:
    """What became of a reader's inputs."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds, self.peak = 0.0, 0
        self.slowest = Result(0, "loaded")
        self.holes: dict[str, Result] = {}

    def add(self, result: Result) -> bool:
        """Whether it is a failure of a kind not seen before."""
        self.counts[result.kind] += 1
        self.seconds += result.seconds
        self.peak = max(self.peak, result.peak)
        self.slowest = max(self.slowest, result, key=lambda r: r.seconds)
        new = result.kind not in GOOD and result.key not in self.holes
        if new:
            self.holes[result.key] = result
        return new


def fuzz(readers: dict[str, Reader], seed: int = 0, seconds: float = 1e6, inputs: int = 10**12, jobs: int = 1,
         each: int = 10**12, bases: dict[str, Base] | None = None,
         found: Callable[[str, Result], None] = lambda name, result: None) -> dict[str, Tally]:
    """Readers take turns for so many seconds or inputs, or until Ctrl-C. each: inputs of one reader at most.
    bases: the readers' valid inputs, where they are there. found: is told of each new kind of failure."""
    bases = bases or {name: base_of(reader) for name, reader in readers.items()}
    gc.collect(), gc.freeze()                   # so that workers share what lies in memory
    tallies, starts = {name: Tally() for name in readers}, dict.fromkeys(readers, 0)
    queue, turns, began = collections.deque(readers), [], time.monotonic()
    counted = inputs < 10**12
    progress = Progress(inputs, unit="input") if counted else Progress(round(seconds), unit="second")
    place = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        while queue or turns:
            done, now = sum(tally.counts.total() for tally in tallies.values()), time.monotonic() - began
            failures = sum(len(tally.holes) for tally in tallies.values())
            progress.show(min(done, inputs) if counted else round(now),
                          f"{done:,} inputs, {failures} kinds of failure")
            if done >= inputs or now > seconds:
                queue.clear()
            while queue and len(turns) < jobs:
                name = queue.popleft()
                case_of, first = functools.partial(mutated, bases[name], seed, name), starts[name]
                turns.append(Turn(name, readers[name], bases[name], case_of, first,
                                  min(each, first + inputs - done), TURN, place))
            follow(turns, tallies, found)
            for turn in [turn for turn in turns if turn.over]:
                turns.remove(turn)
                starts[turn.name] = turn.next
                queue.extend([turn.name] if turn.next < each else [])
    except KeyboardInterrupt:
        print("stopped")
    finally:
        for turn in turns:
            turn.kill()
        shutil.rmtree(place, ignore_errors=True)
        gc.unfreeze()
    progress.close()
    return tallies


def follow(turns: list[Turn], tallies: dict[str, Tally], found: Callable[[str, Result], None]) -> None:
    """Counts what workers have sent, within half a second."""
    wait([turn.connection for turn in turns], 0.5)
    for turn in turns:
        for result in turn.results():
            if tallies[turn.name].add(result):
                found(turn.name, result)


def table(tallies: dict[str, Tally]) -> str:
    """A row for each reader, and all of them together."""
    heads = ["reader", "inputs", "loaded", "one line", "tracebacks", "messages", "hangs", "memory",
             "processes", "sockets", "outside", "died", "slowest s", "peak MB", "inputs/s"]
    rows = []
    for name, tally in tallies.items():
        total = tally.counts.total()
        rows.append([name, total, *(tally.counts[kind] for kind in KINDS), round(tally.slowest.seconds, 2),
                     tally.peak >> 20, round(total / max(tally.seconds, 1e-9))])
    columns = list(zip(*rows))[1:]
    total, seconds = sum(columns[0]), sum(tally.seconds for tally in tallies.values())
    rows.append(["all", *map(sum, columns[:11]), max(columns[11]), max(columns[12]),
                 round(total / max(seconds, 1e-9))])
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row]
             for row in [heads, ["---"] + ["--:"] * (len(heads) - 1), *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


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


def write_entry(path: Path, entry: dict[str, Any]) -> None:
    path.write_text(json.dumps(entry, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


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
                turn = Turn(name, readers[name], bases[name], cases.__getitem__, first, len(cases), 1e9,
                            Path(place))
                while not turn.over:
                    wait([turn.connection], 0.5)
                    results |= {mine[result.number]: result for result in turn.results()}
                first = turn.next
    return [results[i] for i in range(len(entries))]


def keep(name: str, result: Result, base: Base, seed: int, out: Path) -> None:
    """Prints a failure, and leaves its input as a file."""
    print(f"\n{result.kind}: {name}:{result.number} ({result.key})\n{result.detail}", flush=True)
    entry = as_entry(name, mutated(base, seed, name, result.number), f"{result.kind}: {result.key}")
    out.mkdir(parents=True, exist_ok=True)
    write_entry(out / f"{name}-{zlib.crc32(result.key.encode()):08x}.json", entry)


# ---------------------------------------------------------------------------------------------- command line


def only(name: str, number: int, seed: int) -> int:
    """One input in this process, without guard, so that its traceback is Python's own."""
    base = base_of(READERS[name])
    case = mutated(base, seed, name, number)
    with tempfile.TemporaryDirectory() as place:
        for path, content in {**base[case.entry], **case.changes}.items():
            put(Path(place, path), content)
        for path, content in case.changes.items():
            print(f"{path}: {len(content)} bytes" if isinstance(content, bytes) else f"{path}: {content}")
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
            write_entry(path, {**entry, "closed": True})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="how long; 300 unless --inputs is given")
    parser.add_argument("--inputs", type=int, default=0, help="how many at most")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same inputs (%(default)s)")
    parser.add_argument("--readers", default=",".join(READERS), help="some of %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="workers at a time (%(default)s)")
    parser.add_argument("--only", metavar="READER:NUMBER", help="one input, with its traceback")
    parser.add_argument("--corpus", action="store_true", help="the cases that once failed; marks the closed")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz", help="for cases that fail")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.only:
        name, _, number = args.only.partition(":")
        return only(name, int(number), args.seed)
    if args.corpus:
        return replay_corpus()
    readers = {name: READERS[name] for name in args.readers.split(",")}
    bases = {name: base_of(reader) for name, reader in readers.items()}
    seconds, inputs = args.seconds or (1e6 if args.inputs else 300), args.inputs or 10**12
    tallies = fuzz(readers, args.seed, seconds, inputs, args.jobs, bases=bases, found=lambda name, result:
                   keep(name, result, bases[name], args.seed, args.out))
    print(f"\n{table(tallies)}")
    return int(any(tally.holes for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
