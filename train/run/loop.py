"""Run: what a training loop asks besides its mathematics: when to evaluate, save and stop; resuming; logs.

Read after log.py, last of train/run. It holds no tensors: those are in state.py, and the loop itself in each
script.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miniclip.weights import write_json

from ..errors import UserError
from .checkpoint import Checkpoints
from .cli import START_ONLY, command
from .distributed import Ranks
from .folder import clear
from .log import Metrics, Progress, Speed, StopFlag, smoothed
from .settings import TrainSettings
from .state import TrainState

LOCAL = ("out", "data", "device", "workers", "threads")     # settings that may differ from process to process


class Run:
    """A run folder and its life.

    for step in run.steps():        # one turn more than steps: the last evaluation is no special case
        if run.is_evaluation(step): run.evaluated(step, scores, error)
        if run.is_save(step): run.save()
        if run.is_over(step): break
        ...                             # forward, backward
        loss = run.agreed(loss)
        run.log(step, loss, ...)
    run.close()
    """

    def __init__(self, script: str, cfg: TrainSettings, state: TrainState, ranks: Ranks, evaluations: int):
        """script: what goes on with the run; evaluations: how many on the way, beside the first and the last.
        """
        self.script = script
        self.cfg, self.state, self.ranks, self.out = cfg, state, ranks, Path(cfg.out)
        self.checkpoints = Checkpoints(self.out, cfg.keep)
        self.resumed_at = resume(cfg, state, self.checkpoints, ranks) if cfg.resume else None
        begin(cfg, self.out, ranks)
        self.metrics = self._open("metrics.jsonl")
        self.speed = Speed(self._open("speed.jsonl", "seconds"), ranks.device, cfg.steps, cfg.batch)
        self.evaluations = evaluation_steps(cfg.steps, evaluations)
        self.loss, self.error = math.nan, math.inf  # smoothed; of this step's evaluation
        self.stop, self.stopping = StopFlag(), False
        self.progress = Progress(cfg.steps, state.step)

    def _open(self, name: str, *needed: str) -> Metrics:
        return Metrics(self.out / name if self.ranks.main else None, self.resumed_at, ("step", *needed))

    def steps(self) -> Iterator[int]:
        """Each step from where the run stands to cfg.steps, at which nothing is trained any more."""
        for step in range(self.state.step, self.cfg.steps + 1):
            self.state.step, self.error = step, math.inf
            yield step

    # ---- what is due at a step

    def is_evaluation(self, step: int) -> bool:
        """At those of `evaluation_steps`, but for the one resumed at, which was evaluated before."""
        return step in self.evaluations and step != self.resumed_at

    def is_save(self, step: int) -> bool:
        """At evaluations, every cfg.save_every steps, and on the way out after a signal."""
        due = step % self.cfg.save_every == 0 and step != self.resumed_at
        return self.is_evaluation(step) or self.stopping or due

    def is_report(self, step: int) -> bool:
        """At evaluations and at the end, in the first process only."""
        return self.ranks.main and (self.is_evaluation(step) or step == self.cfg.steps)

    def is_over(self, step: int) -> bool:
        """When all steps are done, or a process was asked to stop."""
        return step == self.cfg.steps or self.stopping

    # ---- what happened

    def evaluated(self, step: int, scores: dict[str, float], error: float) -> None:
        """Logs an evaluation; its error, the less the better, decides about best.pt."""
        self.metrics.add(step=step, **scores)
        self.error = error

    def save(self) -> None:
        """A checkpoint of this moment, and best.pt if the evaluation of this step was the best so far."""
        save(self.state, self.checkpoints, self.ranks, self.error)

    def agreed(self, loss: float) -> float:
        """The mean loss of all processes; from then on they stop if any of them was asked to."""
        loss, asked = self.ranks.mean(loss, float(self.stop.set))
        self.stopping = asked > 0
        return loss

    def check_finite(self, loss: float, norm: float, lr: float) -> None:
        """Ends a run that has diverged before its weights are touched. (With float16 a norm may overflow.)"""
        if not math.isfinite(loss):                                     # for the report's words
            self.metrics.add(step=self.state.step, loss=loss, grad_norm=norm, lr=lr)
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.state.scaler.is_enabled()):
            raise UserError(f"step {self.state.step}: the loss is {loss} and the gradient norm {norm}; "
                            f"stopped before the weights were touched. {self.checkpoints.kept[0]} holds the "
                            "last good state: try a lower --muon-lr")

    def log(self, step: int, loss: float, **numbers: float) -> None:
        """A row of metrics.jsonl, and the progress line."""
        self.loss = smoothed(self.loss, loss)
        self.metrics.add(step=step, loss=loss, **numbers)
        self.speed.add(step)
        if self.ranks.main:
            self.progress.show(step + 1, f"loss {self.loss:.4f}")

    def close(self) -> bool:
        """Lets go of signals and the terminal. Returns whether the run is finished, not just stopped."""
        self.progress.close()
        self.stop.restore()
        if self.state.step < self.cfg.steps:
            again = "the same command and --resume"
            if self.ranks.size == 1:
                again = command(self.script, out=self.out, resume=True)
            self.ranks.print0(f"stopped at step {self.state.step}; go on with {again}")
        return self.state.step == self.cfg.steps


def begin(cfg: TrainSettings, out: Path, ranks: Ranks) -> None:
    """Writes config.json. With --overwrite the earlier run goes here: all that could still refuse the new one
    is done."""
    if ranks.main:
        if cfg.overwrite:
            clear(out)
        settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in START_ONLY}
        write_json(out / "config.json", settings)
    ranks.union([])                         # the others wait: what they leave must not be cleared away


def save(state: TrainState, checkpoints: Checkpoints, ranks: Ranks, error: float = math.inf) -> None:
    """A checkpoint of this moment, and best.pt if the error of its evaluation is the lowest so far."""
    best = error < state.best
    state.best = error if best else state.best              # not min(): the error may be NaN
    captured = state.capture()                              # of all processes, if the weights are sharded
    if ranks.main:
        checkpoints.save(captured, best)


def resume(cfg: TrainSettings, state: TrainState, checkpoints: Checkpoints, ranks: Ranks) -> int:
    """Puts the newest good checkpoint back and returns its step, the same in all processes."""
    saved, problem = None, ""
    try:
        saved = checkpoints.load(ranks.print0, lambda found: state.check(found, cfg.may_change()))
    except UserError as error:
        problem = str(error)
    if len(ranks.union([str(saved and saved["step"])])) > 1:
        raise UserError("--resume: the processes found different checkpoints; do all of them see "
                        f"{checkpoints.folder}?")
    if saved is None:
        raise UserError(problem)
    planned, now = saved["config"].get("steps", cfg.steps), cfg.steps
    if now != planned and now <= saved["step"]:
        raise UserError(f"--steps {now}: this run has done {saved['step']} already; give more, or {planned} "
                        "as before")
    state.restore(saved, cfg.may_change())
    if ranks.main:
        checkpoints.settle()
    longer = (f"; planned for {planned} steps, it now ends after {now}: "
              "the learning rate follows the new length")
    ranks.print0(f"resumed at step {state.step}" + longer * (now != planned))
    return state.step


def check_same_on_all_ranks(cfg: Any, data: dict[str, int], ranks: Ranks) -> None:
    """Refuses processes that were started with different flags, or that see different data;
    paths may differ."""
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in LOCAL}
    ranks.check_same(**settings, **data)


def evaluation_steps(steps: int, times: int) -> set[int]:
    """When to evaluate: at the start, at the end, and `times` on the way, closer together at first."""
    return {0, steps} | {round(steps * (i / (times + 1)) ** 1.3) for i in range(1, times + 1)}
