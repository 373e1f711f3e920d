"""Is one answer right? Run by __main__.py in a process of its own, with the answer that it may break.

    python docs/learn/verdict.py FOLDER ANSWER RESULT     writes [right, sentence] to RESULT, a JSON file

A check is `check(answer)` in the check.py of an exercise: it calls the functions of the answer, a module, and
compares them with the project's. It raises AssertionError with one sentence; what it returns follows "right".
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch

MOST = 400                      # characters of a sentence


def load(path: Path, name: str) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdict(folder: Path, answer: Path) -> tuple[bool, str]:
    """Whether an answer is right, and one line: why not, or what the check adds."""
    answer = answer.resolve()                       # as tracebacks name it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        said = load(folder / "check.py", "check").check(load(answer, "answer"))
    except (Exception, SystemExit) as error:  # noqa: BLE001  of the reader's program
        return False, " ".join(in_words(error, answer).split())[:MOST]
    return True, said or ""


def in_words(error: BaseException, answer: Path) -> str:
    """An error as one sentence, with the line of the answer that it comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(answer)]
    if isinstance(error, NotImplementedError) and frames:
        return f"{frames[-1].name} is still to be written"
    if isinstance(error, AssertionError) and str(error):
        return str(error)
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")


if __name__ == "__main__":
    folder, answer, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(verdict(folder, answer)), encoding="utf-8")
