"""torchrun on two hosts: network namespaces of this machine, joined by a pair of virtual cards.
Run by make faults alone.

Takes root on Linux and the command `ip`; where they are missing the tests are skipped.
Each host has its own addresses and its own loopback, so what does not go over the cable does not arrive. They
share files, as machines with a network disk do.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed.fsdp

from tests.faults.torchrun_job import losses
from train import train_clip, train_diffusion
from train.run.checkpoint import load_checkpoint
from train.run.cli import parse_flags

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = {"diffusion": train_diffusion, "clip": train_clip}
FLAGS = {
    "diffusion": ["--data", str(ROOT / "data" / "calligraphy"), "--size", "16", "--preset", "tiny", "--batch",
                  "4",
                  "--samples", "0", "--sample-steps", "1", "--optimizer", "adamw", "--device", "cpu"],
    "clip": ["--data", str(ROOT / "data" / "herbs"), "--size", "32", "--preset", "vit-tiny", "--batch", "8",
             "--checks", "0",
             "--optimizer", "adamw", "--device", "cpu"],
}
PORT = "29500"
# the other host
LOST = re.compile("Connection (closed|reset) by peer|Connection timed out|No route to host|lost")
# seen so by this host alone
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


class Host(NamedTuple):
    space: str          # name of its network namespace
    address: str        # of its card, eth0

    def start(self, *command: str, log: Path, locked: Path | None = None) -> subprocess.Popen:
        """`locked`: a folder that this host may read but not write."""
        guard = ["sh", "-c", READ_ONLY, str(locked)] if locked else []
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        with log.open("w") as file:
            return subprocess.Popen(["ip", "netns", "exec", self.space, *guard, *command], cwd=ROOT, env=env,
                                    stdout=file, stderr=subprocess.STDOUT)

    def run(self, *command: str) -> str:
        return sh("ip", "netns", "exec", self.space, *command)

    def sent(self) -> int:
        """Bytes that have left by the cable."""
        return int(self.run("cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def unplug(self) -> None:
        self.run("ip", "link", "set", "eth0", "down")

    def crash(self) -> None:
        """Every process of this host ends at once."""
        for pid in sh("ip", "netns", "pids", self.space).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass


def sh(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("two hosts on one machine: takes root on Linux and the command ip")
    name = f"minidiff-{uuid.uuid4().hex[:8]}"
    pair = [Host(f"{name}-{i}", f"10.77.0.{i}") for i in (1, 2)]
    try:
        join_by_cable(*pair)
        yield pair
    # of the cable: a test's own errors do not come here
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts on one machine: {' '.join(error.cmd)}: {error.stderr.strip()}")
    finally:
        for host in pair:
            remove(host)


def join_by_cable(one: Host, other: Host) -> None:
    for host in (one, other):
        sh("ip", "netns", "add", host.space)
    sh("ip", "link", "add", "eth0", "netns", one.space, "type", "veth", "peer", "name", "eth0", "netns",
       other.space)
    for host in (one, other):
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "link", "set", "eth0", "up")


def remove(host: Host) -> None:
    if host.space in sh("ip", "netns", "list").split():
        host.crash()
        sh("ip", "netns", "delete", host.space)


class Job(NamedTuple):
    """A script under torchrun on both hosts; the first one holds the rendezvous and,
    its address being less, process 0."""

    torchruns: list[subprocess.Popen]
    logs: list[Path]

    def said(self, host: int) -> str:
        return self.logs[host].read_text(encoding="utf-8", errors="replace")

    def codes(self, within: float) -> list[int]:
        """Exit statuses of both; raises TimeoutExpired if one goes on for longer."""
        end = time.monotonic() + within
        return [torchrun.wait(max(0.1, end - time.monotonic())) for torchrun in self.torchruns]


def start(hosts: list[Host], script: str, outs: list[Path], *flags: str, each: int = 1,
          locked: Path | None = None) -> Job:
    """The script with `each` processes on either host, each of which writes to its own --out of `outs`."""
    torchruns, logs = [], []
    for i, (host, out) in enumerate(zip(hosts, outs)):
        logs.append(out.with_name(f"host{i}.log"))
        torchruns.append(host.start(
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(each),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{PORT}", "--local-addr",
            host.address,
            "--rdzv-conf", f"is_host={int(i == 0)}", "-m", f"train.train_{script}", *FLAGS[script], *flags,
            "--out", str(out), log=logs[-1], locked=locked if i else None))
    return Job(torchruns, logs)


def alone(script: str, out: Path, *flags: str) -> list[float]:
    """The losses of one process without torchrun."""
    config = parse_flags(SCRIPTS[script].TrainConfig, "", [*FLAGS[script], *flags, "--out", str(out)])
    SCRIPTS[script].main(config)
    return losses(out)


@pytest.mark.parametrize(("script", "each", "flags"), [
    ("diffusion", 1, []), ("diffusion", 2, []), ("diffusion", 1, ["--shard"]), ("clip", 1, []),
    ("clip", 1, ["--shard"])])
def test_two_hosts_do_what_one_process_does(hosts: list[Host], tmp_path: Path, script: str, each: int,
                                            flags: list) -> None:
    """The losses are those of the whole batch, the gradients cross the cable,
    and the second host only reads --out."""
    if flags and not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("--shard needs PyTorch 2.6")
    steps, out = 8, tmp_path / "two"
    out.mkdir()
    before = [host.sent() for host in hosts]
    job = start(hosts, script, [out, out], "--steps", str(steps), *flags, each=each, locked=out)
    assert job.codes(within=240) == [0, 0], job.said(0)[-3000:] + job.said(1)[-3000:]
    assert f"{2 * each} processes" in job.said(0) and "done in" in job.said(0)
    assert "done in" not in job.said(1)
    whole = alone(script, tmp_path / "one", "--steps", str(steps))
    assert len(whole) == steps and losses(out) == pytest.approx(whole, rel=1e-4)
    weights = sum(path.stat().st_size for path in (out / "model").rglob("*.safetensors"))
    sent = [host.sent() - old for host, old in zip(hosts, before)]
    assert min(sent) > 0.8 * weights * steps, (sent, weights)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return alone("diffusion", tmp_path_factory.mktemp("undisturbed") / "run", "--steps", "40")


@pytest.mark.parametrize(("mishap", "victim"), [("crash", 1), ("crash", 0), ("unplug", 1)])
def test_a_host_that_is_lost_ends_the_other(hosts: list[Host], tmp_path: Path, undisturbed: list[float],
                                            mishap: str, victim: int) -> None:
    """The survivor ends with an error, and one process goes on from what it has.

    A cable that was cut looks like silence. Linux waits about 15 minutes before it takes that for the end of
    a connection (the sysctl net.ipv4.tcp_retries2, 15 trials ever further apart);
    these hosts wait for 5 trials, a quarter of a minute.
    """
    out = tmp_path / "run"
    for host in hosts:
        host.run("sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
    job = start(hosts, "diffusion", [out, out], "--steps", "40", "--save-every", "1")
    wait_for(out / "checkpoint.1.pt", job)
    getattr(hosts[victim], mishap)()
    codes = job.codes(within=180)
    survivors = [0, 1] if mishap == "unplug" else [1 - victim]
    assert 0 not in codes and all(LOST.search(job.said(host))
                                  for host in survivors), job.said(survivors[0])[-3000:]
    assert 0 < load_checkpoint(out / "checkpoint.pt")["step"] < 40
    assert alone("diffusion", out, "--steps", "40", "--resume") == pytest.approx(undisturbed, rel=0.02)


def wait_for(path: Path, job: Job) -> None:
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end and job.torchruns[0].poll() is None:
        time.sleep(0.05)
    assert path.exists() and job.torchruns[0].poll() is None, job.said(0)[-3000:]


@pytest.mark.parametrize("other", ["empty", "older"])
def test_hosts_that_see_different_folders_do_not_go_on(hosts: list[Host], tmp_path: Path, other: str) -> None:
    run, outs = tmp_path / "run", [tmp_path / "first", tmp_path / "second"]
    alone("diffusion", run, "--steps", "4", "--save-every", "1", "--keep", "4")
    # the first host is left with step 3, the second with step 2
    for out, newest in zip(outs, (1, 2)):
        shutil.copytree(run, out)
        for name in ("best.pt", "checkpoint.pt", "checkpoint.1.pt")[:newest + 1]:
            (out / name).unlink()
    if other == "empty":
        shutil.rmtree(outs[1])
    seen = contents(outs[0])
    job = start(hosts, "diffusion", outs, "--steps", "4", "--save-every", "1", "--keep", "4", "--resume")
    assert 0 not in job.codes(within=180)
    said = job.said(0) + job.said(1)
    assert re.search(r"error \(process \d\): --resume: the processes found different checkpoints",
                     said), said[-3000:]
    assert contents(outs[0]) == seen


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
