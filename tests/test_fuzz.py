"""The fuzzer in short: some inputs for every reader, the corpus, and that it catches what it is there for."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from miniclip.weights import WeightsError
from tests.faults import fuzz, fuzz_guard, fuzz_workers
from tests.faults.fuzz import READERS, Reader, base_of, case_of_entry, corpus, mutated, replay
from tests.faults.fuzz_guard import GOOD, KINDS

pytestmark = [pytest.mark.skipif(fuzz_workers.METHOD != "fork", reason="its workers are forked"),
              pytest.mark.filterwarnings("ignore")]     # torch.jit is deprecated; it builds inputs only
EACH = 12           # inputs of each reader
CORPUS = corpus()


def marks(entry: dict) -> tuple:
    """Of a case that is not yet closed; python -m tests.faults.fuzz --corpus marks what is."""
    hangs = entry["found"].startswith("hang")
    return () if entry["closed"] else (pytest.mark.xfail(reason="not yet closed", run=not hangs),)


@pytest.fixture(scope="module")
def bases() -> dict[str, fuzz.Base]:
    torch.set_num_threads(1)
    return {name: base_of(reader) for name, reader in READERS.items()}


def hole(found: str) -> str:
    """A key without its line, which any change of the file moves."""
    return re.sub(r":\d+ ", " ", found)


def test_every_reader_loads_or_ends_in_one_line(bases: dict) -> None:
    tallies = fuzz.fuzz(READERS, seed=0, each=EACH, bases=bases)
    known = {hole(entry["found"]) for entry in CORPUS.values() if not entry["closed"]}
    new = [f"{name}:{result.number} {result.kind} {result.detail}" for name, tally in tallies.items()
           for result in tally.holes.values() if hole(f"{result.kind}: {result.key}") not in known]
    assert not new, "\n".join(new)
    assert all(tally.counts.total() == EACH for tally in tallies.values())
    total = sum((tally.counts for tally in tallies.values()), start=tallies["json"].counts.__class__())
    assert total["loaded"] > EACH and total["line"] > EACH * len(READERS) / 4


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=marks(entry))
                                  for path, entry in CORPUS.items()])
def test_what_once_failed(path: Path, bases: dict) -> None:
    result = replay([CORPUS[path]], bases)[0]
    assert result.kind in GOOD, result.detail


def test_the_same_seed_gives_the_same_bytes(bases: dict) -> None:
    for name in ("json", "safetensors", "pickles", "pictures", "tables", "texts", "tokenizers"):
        again = base_of(READERS[name])
        cases = [mutated(bases[name], 7, name, number) for number in range(9)]
        assert cases == [mutated(again, 7, name, number) for number in range(9)]
        assert cases != [mutated(again, 8, name, number) for number in range(9)]


def test_a_case_goes_into_a_file_and_comes_back(bases: dict) -> None:
    for name in ("json", "tables", "pictures"):
        for case in (mutated(bases[name], 3, name, number) for number in range(99)):
            assert case_of_entry(fuzz.as_entry(name, case, "")) == case


# ------------------------------------------------------------------------------------------- what it catches


def lack(path: Path) -> None:
    raise KeyError(path.name)


def loop(path: Path) -> None:
    while True:
        pass


def hide(path: Path) -> None:
    """Loops, and makes one line of whatever ends that."""
    try:
        loop(path)
    except BaseException:
        raise WeightsError("one line") from None


def swell(path: Path) -> None:
    bytearray(3 * 2**30)


def swell_quietly(path: Path) -> None:
    try:
        torch.zeros(3 * 2**28)
    except Exception as error:
        raise WeightsError(f"one line: {type(error).__name__}") from None


def start(path: Path) -> None:
    try:
        subprocess.run(["true"], check=False)
    except BaseException:
        raise WeightsError("one line") from None


def call(path: Path) -> None:
    socket.create_connection(("127.0.0.1", 9))


def look_outside(path: Path) -> None:
    Path("/etc/hostname").read_text()


def write_outside(path: Path) -> None:
    Path(__file__).with_suffix(".new").write_text("x")


def write_inside(path: Path) -> None:
    Path(path.parent, "new").write_text("x")


def say_much(path: Path) -> None:
    raise WeightsError("x" * 1_001)


def say_two_lines(path: Path) -> None:
    raise WeightsError("one\ntwo")


def say_one_line(path: Path) -> None:
    raise WeightsError(f"{path}: one")


def block(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    (path.parent / "pipe").read_bytes()


def block_deep(path: Path) -> None:
    """Blocks where no signal of Python's is handled."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGPROF])
    time.sleep(60)


def die(path: Path) -> None:
    os._exit(3)


@pytest.mark.parametrize("read, kind", [
    (lack, "traceback"), (loop, "hang"), (hide, "hang"), (swell, "memory"), (swell_quietly, "memory"),
    (start, "process"), (call, "socket"), (look_outside, "outside"), (write_outside, "outside"),
    (write_inside, "loaded"), (say_much, "message"), (say_two_lines, "message"), (say_one_line, "line"),
    (block, "hang"), (block_deep, "hang"), (die, "died")])
def test_what_is_caught(read, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_guard, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz_guard, "BLOCKED", 0.5)
    monkeypatch.setattr(fuzz_workers, "WATCHDOG", 2)
    reader = Reader(lambda folder: (folder / "a.txt").write_text("valid"), read)
    base = {"a.txt": {"a.txt": b"valid"}}
    began = time.monotonic()
    tally = fuzz.fuzz({"fake": reader}, each=2, bases={"fake": base})["fake"]
    assert tally.counts == {kind: 2} and kind in KINDS
    assert time.monotonic() - began < 20
    assert not Path(__file__).with_suffix(".new").exists()
    row = fuzz.table({"fake": tally}).splitlines()[2]
    assert row.startswith("| fake | 2 | ")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert fuzz.main(["--inputs", "20", "--readers", "json,strokes", "--out", str(tmp_path)]) == 0
    assert "| all | 20 |" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert fuzz.main(["--only", "texts:3"]) == 0
    assert capsys.readouterr().out.endswith("loaded\n")
