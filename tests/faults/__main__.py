"""The long form: python -m tests.faults --kills 60 (make faults). Ends with status 1 if anything was lost."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.faults.harness import FORK, SCRIPTS, torment


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills training runs and sees what is lost.")
    parser.add_argument("--kills", type=int, default=30, help="kills of each script")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="another seed, other moments")
    args = parser.parse_args()
    if FORK is None:
        sys.exit("error: the harness forks, which this system cannot")
    failed = 0
    for name, script in SCRIPTS.items():
        with tempfile.TemporaryDirectory() as folder:
            tally = torment(script, Path(folder), args.kills, args.seed)
        failed += tally.lost + len(tally.differing)
        print(f"{name}: {tally.kills} kills ({tally.in_saves} inside a save) of {tally.runs} runs, "
              f"{tally.lost} checkpoints "
              f"lost, {len(tally.differing)} files that differ {tally.differing[:5]} (seed {args.seed})",
              flush=True)
    others = [str(Path(__file__).with_name(name))
              for name in ("test_faults.py", "torchrun_job.py", "two_hosts.py")]
    return int(failed > 0) or pytest.main(["-q", "-rs", *others])


if __name__ == "__main__":
    sys.exit(main())
