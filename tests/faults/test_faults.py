"""A short form of `make faults`: a few kills of each script, and every other mishap once."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from miniclip.weights import WeightsError
from tests.faults.harness import DIFFUSION, FORK, SCRIPTS, differences, live, step_of, torment
from train.errors import UserError
from train.run.checkpoint import Checkpoints, load_checkpoint

pytestmark = pytest.mark.skipif(FORK is None, reason="the harness forks")


def one_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), error
    return lines[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_kills(tmp_path: Path, name: str) -> None:
    tally = torment(SCRIPTS[name], tmp_path, kills=4, seed=1)
    assert tally.kills == 4 and tally.lost == 0 and tally.differing == []


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_full_disk(tmp_path: Path, share: float) -> None:
    """From step 2 on no file may grow beyond a share of a checkpoint: the write fails as on a full disk."""
    def fill_later() -> None:
        save = Checkpoints.save

        def fills(self, state, best):
            save(self, state, best)
            if state["step"] == 2:
                size = self.kept[0].stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), resource.RLIM_INFINITY))

        Checkpoints.save = fills

    end = live(DIFFUSION, before=fill_later, out=str(tmp_path))
    assert end.code == 2 and "cannot be written" in one_line(end.error) and step_of(tmp_path) == (2, False)
    assert not list(tmp_path.rglob("*.tmp"))
    assert live(DIFFUSION, out=str(tmp_path), resume=True).code == 0 and step_of(tmp_path) == (12, False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB; only root of a Linux may mount one, and not in every container."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk],
                                    capture_output=True, text=True)
    if not done or done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip() if done else 'no mount'}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_disk_that_is_truly_full(small_disk: Path, tmp_path: Path, name: str) -> None:
    """Something else takes all space but half a checkpoint;
    when it is gone the run goes on to the very same files."""
    script, run = SCRIPTS[name], small_disk / "run"

    def fill_later() -> None:
        save = Checkpoints.save

        def fills(self, state, best):
            save(self, state, best)
            if state["step"] == 2:
                space = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
                half = self.kept[0].stat().st_size // 2
                (small_disk / "other").write_bytes(bytes(max(0, space - half)))

        Checkpoints.save = fills

    size = {"keep": 1}
    end = live(script, before=fill_later, out=str(run), **size)
    assert end.code == 2 and "run" in one_line(end.error) and (small_disk / "other").exists()
    assert step_of(run) == (2, False) and not list(run.rglob("*.tmp"))
    end = live(script, out=str(run), resume=True, **size)
    assert end.code == 2 and step_of(run) == (2, False) and one_line(end.error)                 # still full
    (small_disk / "other").unlink()
    assert live(script, out=str(run), resume=True, **size).code == 0 and step_of(run) == (12, False)
    assert live(script, out=str(tmp_path / "whole"), **size).code == 0
    assert differences(tmp_path / "whole", run) == []


def lose_privileges() -> None:
    """Root may write everywhere; without its capabilities (Linux) it obeys permissions like anyone."""
    if os.getuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    end = live(DIFFUSION, before=lose_privileges, out=str(tmp_path / "locked"))
    assert end.code == 2 and "locked" in one_line(end.error)
    end = live(DIFFUSION, before=lose_privileges, out=str(tmp_path / "locked" / "run"))
    assert end.code == 2 and "locked" in one_line(end.error)


def test_a_folder_that_becomes_read_only(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def lock_later() -> None:
        save = Checkpoints.save

        def locks(self, state, best):
            save(self, state, best)
            if state["step"] == 2:
                run.chmod(0o555)

        Checkpoints.save = locks
        lose_privileges()

    end = live(DIFFUSION, before=lock_later, out=str(run))
    assert end.code == 2 and "cannot be written" in one_line(end.error) and step_of(run) == (2, False)
    run.chmod(0o755)
    assert live(DIFFUSION, out=str(run), resume=True).code == 0


def test_a_picture_that_vanishes(tmp_path: Path) -> None:
    data = tmp_path / "data" / "春"
    data.mkdir(parents=True)
    for i in range(4):
        Image.new("L", (20, 20), 60 * i).save(data / f"{i}.png")

    def vanish() -> None:
        save = Checkpoints.save

        def deletes(self, state, best):
            save(self, state, best)
            (data / "2.png").unlink(missing_ok=True)

        Checkpoints.save = deletes

    # it is in memory
    assert live(DIFFUSION, before=vanish, data=str(data.parent), out=str(tmp_path / "run")).code == 0
    end = live(DIFFUSION, data=str(data.parent), out=str(tmp_path / "run"), resume=True)
    assert end.code == 2 and re.search("data is not .* 4, .* 3", one_line(end.error))


def test_a_checkpoint_cut_at_every_kilobyte(tmp_path: Path) -> None:
    assert live(DIFFUSION, out=str(tmp_path), steps=2).code == 0
    checkpoints = Checkpoints(tmp_path, 2)
    whole = checkpoints.kept[0].read_bytes()
    assert step_of(tmp_path) == (2, False)
    for end in range(0, len(whole), 1024):
        checkpoints.kept[0].write_bytes(whole[:end])
        with pytest.raises((UserError, WeightsError), match="checkpoint.pt"):
            load_checkpoint(checkpoints.kept[0])
        if end % (len(whole) // 4096 * 1024) == 0:          # a good one takes time to read: now and then
            assert step_of(tmp_path) == (1, True)
