"""Timing of two programs turn and turn about, and whether they gave the same answers.

Seconds are the process's CPU time as well as wall time: a busy machine changes the first less. A program may
run in a process of its own; it then returns its own Timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EXACT, LOOSE = 1e-5, 1e-4       # relative difference: between programs of torch; to other runtimes
SIDE = 2048                     # of the matrices whose product says what the machine can do


class Disagree(Exception):
    """Two programs answered differently: their times compare nothing."""


class Timed(NamedTuple):
    """One run: seconds of CPU and of wall time, what it answered, GB of memory if it was measured."""

    cpu: float
    wall: float
    answer: Sequence[Tensor]
    memory: float | None = None


Program = Callable[[], "Sequence[Tensor] | Timed"]


class Compared(NamedTuple):
    """All runs of two programs, in pairs, and the matrix rate (multiplications and additions a CPU second)
    measured beside each pair."""

    ours: list[Timed]
    theirs: list[Timed]
    rates: list[float]
    difference: float


def timed(program: Program) -> Timed:
    """Runs it once."""
    cpu, wall = time.process_time(), time.perf_counter()
    answer = program()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return answer if isinstance(answer, Timed) else Timed(cpu, wall, answer)


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Of two answers, relative: the norm of the difference over the norm of what was wanted."""
    if [f.shape for f in found] != [w.shape for w in wanted]:
        raise Disagree(f"answers of shapes {[tuple(f.shape) for f in found]} and "
                       f"{[tuple(w.shape) for w in wanted]}")
    off = sum(float((f.double() - w.double()).square().sum()) for f, w in zip(found, wanted))
    return (off / sum(float(w.double().square().sum()) for w in wanted)) ** 0.5 if wanted else 0.0


def alternate(ours: Program, theirs: Program, rounds: int, limit: float, warm: bool = False) -> Compared:
    """One warm-up each, unless they are warm, then pairs, every second one in the other order. Raises
    Disagree where the answers of a pair differ by more than limit, relatively; answers that are not finite
    always do."""
    if not warm:
        timed(ours), timed(theirs)
    pairs, rates, worst = [], [], 0.0
    for i in range(rounds):
        rates.append(matrix_rate())
        if i % 2:
            b, a = timed(theirs), timed(ours)
        else:
            a, b = timed(ours), timed(theirs)
        found = difference(a.answer, b.answer)
        if not found <= limit:
            raise Disagree(f"the answers differ by {found:.1e}, more than {limit:.0e}")
        worst = max(worst, found)
        pairs.append((a._replace(answer=()), b._replace(answer=())))
    return Compared([a for a, _ in pairs], [b for _, b in pairs], rates, worst)


def matrix_rate() -> float:
    """Of a product of two float32 matrices."""
    a, b = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    cpu = time.process_time()
    a @ b
    return 2 * SIDE**3 / (time.process_time() - cpu)


def row(compared: dict[str, Compared], flops: float | None) -> dict:
    """What the page needs of a row: medians, and the medians of the pairs' ratios. flops: of one run of ours,
    by the definitions of its layers."""
    all_ours = [run for c in compared.values() for run in c.ours]
    result = {"ours": medians(all_ours), "peers": [], "rounds": min(len(c.ours) for c in compared.values())}
    for name, c in compared.items():
        ratios = {f"{clock}_ratio": statistics.median(getattr(b, clock) / getattr(a, clock)
                                                      for a, b in zip(c.ours, c.theirs))
                  for clock in ("cpu", "wall")}
        result["peers"].append({"name": name, **medians(c.theirs), **ratios, "difference": c.difference})
    if flops:
        rate = statistics.median(rate for c in compared.values() for rate in c.rates)
        result |= {"flops": flops, "rate": rate, "share": flops / result["ours"]["cpu"] / rate}
    return result


def medians(runs: list[Timed]) -> dict[str, float]:
    """Of CPU and wall seconds, and the most memory."""
    found = {clock: statistics.median(getattr(run, clock) for run in runs) for clock in ("cpu", "wall")}
    return found | ({"memory": max(run.memory for run in runs)} if runs[0].memory is not None else {})


def peak() -> float:
    """GB that this process has held at most, mapped pages of files included. Linux.

    Not getrusage: its peak starts with that of the process that started this one.
    """
    return memory("VmHWM")


def memory(field: str) -> float:
    """GB of a field of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) * 1024 / 1e9
