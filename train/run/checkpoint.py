"""Files that a kill cannot halve: checkpoints that are whole or not there,
and the one that --resume goes on from.

Read after state.py. Knows of a checkpoint only that it is a dict of tensors and plain values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniclip.files import WeightsError, atomic_write, open_zip, read_pickle, shown

from ..errors import UserError

PARTS = {"model": dict, "optimizers": list, "ema": list, "step": int, "config": dict, "dice": Tensor,
         "rng": Tensor}                                         # what a checkpoint has at least
OTHERS = {"data": dict, "best": (int, float), "scaler": dict, "cuda_rng": (Tensor, type(None))}
OLDER = re.compile(r"checkpoint\.\d{1,9}\.pt", re.ASCII)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Written beside its place, synced, and then moved there: a kill never leaves half a file under the good
    name."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except RuntimeError as error:           # what torch makes of a disk that is full
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values only; a pickle that would run code is refused,
    and so are one with a changed byte and parts of the wrong type. Raises WeightsError.

    What the parts hold is for `TrainState.check`, which knows the model.
    """
    state = read_pickle(path)
    with open_zip(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise WeightsError(f"{path}: damaged, its checksums are wrong ({shown(damaged)})")
    missing = [name for name in PARTS if not isinstance(state, dict) or name not in state]
    if missing:
        raise WeightsError(f"{path}: not a checkpoint of a training run (no {', '.join(missing)})")
    for name, kind in {**PARTS, **OTHERS}.items():
        if name in state and (not isinstance(state[name], kind) or isinstance(state[name], bool)):
            raise WeightsError(f"{path}: {name} is a {type(state[name]).__name__}, not what a run saves")
    for name, value in {**state["config"], **state.get("data", {})}.items():
        if not isinstance(name, str) or not isinstance(value, (str, int, float, type(None))):
            raise WeightsError(f"{path}: {shown(name)} is a {type(value).__name__}, not what a run saves")
    return state


class Checkpoints:
    """The last `keep` checkpoints of a run (checkpoint.pt, the one before checkpoint.1.pt,
    ...) and best.pt."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.arriving, self.best = folder / "checkpoint.new.pt", folder / "best.pt"
        self.kept = [folder / (f"checkpoint.{i}.pt" if i else "checkpoint.pt") for i in range(keep)]

    def save(self, state: dict[str, Any], best: bool) -> None:
        """The older ones move only when the new one is whole and on the disk, so a kill never costs one."""
        self.settle()
        if best:
            save_checkpoint(self.best, state)
        save_checkpoint(self.arriving, state)
        self.settle()

    def settle(self) -> None:
        """Moves every checkpoint one place on, if a new one has arrived: perhaps in an earlier life of the
        run."""
        if self.arriving.exists():
            for younger, older in reversed(list(zip(self.kept, self.kept[1:]))):
                if younger.exists():
                    os.replace(younger, older)
            os.replace(self.arriving, self.kept[0])

    def load(self, say: Callable[[str], None],
             check: Callable[[dict[str, Any]], None] = lambda state: None) -> dict[str, Any]:
        """The newest that is whole and has nothing that `check` calls damaged; any other costs a line."""
        older = [path for path in self.folder.glob("checkpoint.*.pt") if OLDER.fullmatch(path.name)]
        older.sort(key=lambda path: int(path.name.split(".")[1]))
        problem = f"there is no {self.kept[0]}"
        for path in (self.arriving, self.kept[0], *older, self.best):
            if path.exists():
                try:
                    state = load_checkpoint(path)
                    check(state)
                    return state
                except WeightsError as error:
                    problem = str(error) if str(path) in str(error) else f"{path}: {error}"
                    say(f"warning: {problem}; trying the checkpoint before it")
        raise UserError(f"--resume: {problem}")
