"""Exercises: lists them, starts one, says whether an answer is right. `make learn` calls it.

    python docs/learn              the list: number, state, minutes, title
    python docs/learn start 7      copies the stub to out/learn, unless it is there, and prints the page
    python docs/learn check 7      right, or not yet and why

An exercise is a folder here: page.md (and page.zh-Hant.md), stub.py, check.py; its solution is in solutions/.
Read before verdict.py. Imports the standard library only: what needs torch runs there, by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 60                      # seconds for a check: an endless loop ends in one line
STATES = {"en": {"none": "not begun", "no": "not yet", "yes": "right"},
          "zh": {"none": "未開始", "no": "還不對", "yes": "答對了"}}


def language() -> str:
    """zh if ZH=1 or the locale says so, else en."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if os.environ.get("ZH", "0") not in ("", "0") or locale.startswith("zh") else "en"


def exercises() -> dict[int, Path]:
    """Number -> folder, in order."""
    return {int(path.name[:2]): path for path in sorted(HERE.glob("[0-9][0-9]_*"))}


def page(folder: Path) -> str:
    """The page of an exercise in the reader's language."""
    name = "page.zh-Hant.md" if language() == "zh" else "page.md"
    return (folder / name).read_text(encoding="utf-8")


def title_and_minutes(text: str) -> tuple[str, int]:
    """Of a page: its first line, and the first number below it."""
    first, _, rest = text.partition("\n")
    return first.removeprefix("# "), int(re.search(r"\d+", rest).group())


def answer_in(out: Path, folder: Path) -> Path:
    """Where the reader's answer to an exercise lies."""
    return out / f"{folder.name}.py"


def command(verb: str, number: int | str) -> str:
    """What to type next, as this was called."""
    if "MAKELEVEL" in os.environ:
        return f"make learn {'N' if verb == 'start' else 'CHECK'}={number}"
    return f"python docs/learn {verb} {number}"


# --------------------------------------------------------------------------------------------------- checking


def judge(folder: Path, answer: Path) -> tuple[bool, str]:
    """Whether an answer is right, and what there is to say of it. Runs it in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        said = Path(scratch) / "verdict.json"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONOPTIMIZE": ""}
        try:
            subprocess.run([sys.executable, HERE / "verdict.py", folder, answer, said], env=env,
                           timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return False, f"no end after {LIMIT} seconds: is there an endless loop?"
        if not said.exists():
            return False, "the program ended before it was checked"
        right, why = json.loads(said.read_text(encoding="utf-8"))
    return right, why


def state(folder: Path, out: Path, known: dict[str, list]) -> tuple[str, str]:
    """none, no or yes, and why. known: verdicts by the answer and its check; what is not there is added."""
    answer = answer_in(out, folder)
    if not answer.exists():
        return "none", ""
    key = hashlib.sha256(answer.read_bytes() + (folder / "check.py").read_bytes()).hexdigest()
    if key not in known:
        known[key] = list(judge(folder, answer))
    right, why = known[key]
    return ("yes", "") if right else ("no", why)


def read_known(path: Path) -> dict[str, list]:
    """The verdicts of before; none if the file is not there or damaged."""
    try:
        return {key: [bool(right), str(why)] for key, (right, why)
                in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_known(path: Path, known: dict[str, list]) -> None:
    """Under a temporary name first."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known), encoding="utf-8")
    os.replace(temporary, path)


# -------------------------------------------------------------------------------------------------- the verbs


def list_all(out: Path) -> None:
    """Prints a line for each exercise. Answers are checked where they changed since they last were."""
    before = read_known(out / "progress.json")
    known, states = dict(before), STATES[language()]
    for number, folder in exercises().items():
        title, minutes = title_and_minutes(page(folder))
        found, why = state(folder, out, known)
        print(f"{number:3}  {states[found]:9}  {minutes:3} min  {title}", flush=True)
        if why:
            print(f"{'':16}{why}")
    print(f"\n{command('start', 'N')}    {command('check', 'N')}")
    if known != before:
        write_known(out / "progress.json", known)


def start(folder: Path, number: int, out: Path) -> None:
    """Copies the stub, never over a file, and prints the page."""
    answer = answer_in(out, folder)
    out.mkdir(parents=True, exist_ok=True)
    print(page(folder))
    try:
        with open(answer, "x", encoding="utf-8") as file:
            file.write((folder / "stub.py").read_text(encoding="utf-8"))
    except FileExistsError:
        print(f"{answer} is there already and stays as it is.")
    print({"en": f"Write in {answer}, then: {command('check', number)}",
           "zh": f"請寫在 {answer}，再執行：{command('check', number)}"}[language()])


def check(folder: Path, number: int, out: Path) -> None:
    """Prints right, or not yet and why."""
    answer, states = answer_in(out, folder), STATES[language()]
    if not answer.exists():
        print(f"{states['none']}: {command('start', number)}")
        return
    right, why = judge(folder, answer)
    print(": ".join(filter(None, [states["yes" if right else "no"], why])))


def main(arguments: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python docs/learn", description=__doc__.split("\n\n")[0])
    parser.add_argument("verb", nargs="?", choices=("start", "check"), help="without one: the list")
    parser.add_argument("number", nargs="?", type=int)
    parser.add_argument("--out", type=Path, help="the folder of answers",
                        default=Path("out/learn") if Path.cwd() == ROOT else ROOT / "out" / "learn")
    args = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")    # Chinese on a console that cannot show it
    if args.verb is None:
        list_all(args.out)
    elif args.number not in exercises():
        parser.error(f"{args.verb} takes a number from {min(exercises())} to {max(exercises())}")
    else:
        verb = start if args.verb == "start" else check
        verb(exercises()[args.number], args.number, args.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:                         # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
