"""torchrun itself: two processes, one of them killed; the job ends, and goes on with one.
Run by make faults alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train import train_diffusion
from train.errors import UserError
from train.run.checkpoint import load_checkpoint
from train.train_diffusion import TrainConfig

ROOT = Path(__file__).parent.parent.parent
CFG = TrainConfig(data=str(ROOT / "data" / "calligraphy"), size=16, preset="tiny", steps=40, batch=4,
                  samples=0, sample_steps=1, save_every=1, device="cpu")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by /proc")
def test_a_killed_process_ends_the_job_and_one_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--data", CFG.data, "--out", str(out), "--size", "16", "--preset", "tiny", "--steps", "40",
             "--batch", "4",
             "--samples", "0", "--sample-steps", "1", "--save-every", "1", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = subprocess.Popen([*torchrun, "-m", "train.train_diffusion", *flags], cwd=ROOT,
                           stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (out / "checkpoint.1.pt").exists() and job.poll() is None:
            time.sleep(0.05)
        assert job.poll() is None, job.communicate()[1][-2000:]
        os.kill(children(job.pid)[-1], signal.SIGKILL)
        said, errors = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in errors and "2 processes" in said
    reached = load_checkpoint(out / "checkpoint.pt")["step"]
    assert 0 < reached < 40
    train_diffusion.main(dataclasses.replace(CFG, out=str(out), resume=True))
    train_diffusion.main(dataclasses.replace(CFG, out=str(tmp_path / "one")))
    both, one = (losses(folder) for folder in (out, tmp_path / "one"))
    assert len(both) == 40 and both == pytest.approx(one, rel=0.02)
    with pytest.raises(UserError, match="batch = 4, not 8"):
        train_diffusion.main(dataclasses.replace(CFG, out=str(out), resume=True, batch=8))


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
