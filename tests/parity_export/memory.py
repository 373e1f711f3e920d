"""How much memory a runner needs: python -m tests.parity_export.memory [--steps N] DIR ...

DIR is what minidiff.export or miniclip.export wrote. A row a folder, as a table in Markdown: the most memory
that was resident; the least address space (`ulimit -v`) in which it still answers, to a thirty-second of
itself; CPU seconds of the whole process, from its start to the first answer or picture (of --steps; by
default of as many as pipeline.json says). Standard library only, so that this process is small: what it holds
would count for the children too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

LEAST, MOST = 64, 32_768        # MB: where the search begins
EXACT = 1 / 32
PICTURE = Path(__file__).parents[2] / "data" / "herbs" / "garlic_twitter.png"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Needs(NamedTuple):
    """Of one run: whether it passed, MB resident at most, CPU seconds."""

    passed: bool
    resident: float
    seconds: float


def command(folder: Path, out: Path, steps: int | None = None) -> list[str]:
    """The runner, asked for a picture or for the names of one."""
    rules = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    runner = [sys.executable, str(folder.resolve() / "runner.py")]
    if "schedule" not in rules:
        return [*runner, "--image", str(PICTURE), *(w for text in rules["golden"]["texts"]
                                                    for w in ("--text", text))]
    return [*runner, "--prompt", rules["golden"]["prompt"], "--out", str(out),
            *([] if steps is None else ["--steps", str(steps)])]


def run(argv: list[str], limit: int | None = None) -> Needs:
    """Runs it, within `limit` MB of address space."""
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit * 2**20, limit * 2**20))

    child = subprocess.Popen(argv, env=ONE_THREAD, preexec_fn=limited, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = status
    return Needs(status == 0, used.ru_maxrss / 1024, used.ru_utime + used.ru_stime)


def least(argv: list[str]) -> int:
    """The least MB of address space in which it passes."""
    low, high = LEAST, MOST                             # fails, passes
    while high - low > max(16, EXACT * high):
        middle = round((low * high) ** 0.5)
        low, high = (low, middle) if run(argv, middle).passed else (middle, high)
    return high


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, help="of a picture's walk")
    a = parser.parse_args()
    print("| export | resident at most | least `ulimit -v` | CPU seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "picture.png"
        for folder in a.folders:
            whole = run(command(folder, out, a.steps))
            if not whole.passed:
                sys.exit(f"{folder}: its runner.py fails")
            print(f"| {folder.name} | {whole.resident:.0f} MB | {least(command(folder, out, 1))} MB "
                  f"| {whole.seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
