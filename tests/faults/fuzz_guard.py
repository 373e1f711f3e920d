"""What an input may not do while it is read: start a process, open a socket or a file outside, hang, swell.

Read first of the fuzzer; then fuzz_mutate.py, fuzz_inputs.py, fuzz.py. An audit hook cannot be removed again,
so `install` is called in processes that do nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import resource
except ImportError:                     # Windows
    resource = None

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("miniclip", "minidiff", "train", "data", "tests")
SECONDS = 5                 # of processor time for one input, so that a busy machine makes no hang
BLOCKED = 10                # seconds by the clock in which an input took next to no processor time
MOST_MEMORY = 2 * 2**30     # bytes that one worker may take beside what it starts with
MOST_MESSAGE = 1_000        # characters of an error
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
          "os.startfile", "pty.spawn"}
READS = {"open", "os.listdir", "os.scandir"}
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
          "os.chmod", "os.chown", "os.utime", "os.setxattr"}
KINDS = ("loaded", "line", "traceback", "message", "hang", "memory", "process", "socket", "outside", "died")
GOOD = ("loaded", "line")


class Result(NamedTuple):
    """How the reading of one input ended."""

    number: int
    kind: str               # of KINDS
    key: str = ""           # exception and innermost function of the project: the same hole, the same key
    detail: str = ""        # what was raised, with the last lines of its traceback
    seconds: float = 0.0
    peak: int = 0           # bytes, of the worker so far


class Forbidden(BaseException):
    """Raised where the audit hook stops something; no `except Exception` may swallow it."""


class Hang(BaseException):
    """Raised where the time of an input is over."""


# -------------------------------------------------------------------------------------------- the audit hook

watching = False                        # while an input is read
caught: list[tuple[str, str]] = []      # what hook and clock saw of this input, even if the reader hides it


def install(folder: Path) -> None:
    """Forbids this process all but reading Python, the project and `folder`, and writing to `folder`."""
    places = [*sys.path, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *torch.__path__]
    places = [os.path.realpath(place) for place in places if str(place) not in ("", str(ROOT))]
    readable = tuple(f"{place}{os.sep}" for place in [*places, *(ROOT / name for name in PACKAGES)])
    inside = os.path.realpath(folder) + os.sep

    def refuse(kind: str, what: str) -> None:
        caught.append((kind, what))
        raise Forbidden(what)

    def watch(event: str, values: tuple) -> None:
        if not watching:
            return
        if event in STARTS:
            refuse("process", f"{event} {values[:2]!r:.200}")
        if event.startswith("socket."):
            refuse("socket", f"{event} {values[1:]!r:.200}")
        if event in READS or event in WRITES:
            writes = event in WRITES or event == "open" and is_writing(*values[1:3])
            for path in values[:1] if event in READS else values:
                if isinstance(path, (str, bytes, os.PathLike)):
                    real = os.path.realpath(os.fsdecode(path)) + os.sep
                    if not real.startswith(inside) and (writes or not real.startswith(readable)):
                        refuse("outside", f"{event} {real[:200]}")

    sys.addaudithook(watch)


def is_writing(mode: Any, flags: Any) -> bool:
    """Of the arguments of an `open` event."""
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


# ---------------------------------------------------------------------------------------------------- limits


peak_at_first = 0


def limit_memory() -> None:
    """From now on this process gets MOST_MEMORY more address space, where the system can say so."""
    global peak_at_first
    peak_at_first = peak_memory()
    statm = Path("/proc/self/statm")
    if resource and statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY, resource.RLIM_INFINITY))


def peak_memory() -> int:
    """Bytes of this process that were in memory at once, at most; 0 where the system does not tell."""
    if not resource:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after so much processor time, or where it waits and does nothing; and again if
    something hides it. What loops in C is ended by the parent."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def over(number: int, frame: Any) -> None:
        caught.append(("hang", f"over {seconds} s, or nothing done for {BLOCKED} s"))
        raise Hang

    def waits(number: int, frame: Any) -> None:
        nonlocal taken
        taken, before = time.process_time(), taken
        if taken - before < 0.01 * BLOCKED:
            over(number, frame)

    taken = time.process_time()
    signal.signal(signal.SIGPROF, over)
    signal.signal(signal.SIGALRM, waits)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    signal.setitimer(signal.ITIMER_REAL, BLOCKED, BLOCKED)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


# ------------------------------------------------------------------------------------------------- one input


def examine(number: int, read: Callable[[Path], Any], path: Path, errors: tuple[type, ...]) -> Result:
    """Reads an input and says how that ended. errors: those that may be raised, in one line."""
    global watching
    caught.clear()
    began, error = time.perf_counter(), None
    try:
        watching = True
        with time_limit(SECONDS):
            read(path)
    except BaseException as raised:  # noqa: BLE001  whatever a reader may raise
        error = raised
    finally:
        watching = False
    seconds, peak = time.perf_counter() - began, peak_memory()
    kind, detail = judge(error, errors) if error else ("loaded", "")
    if caught:
        kind, what = caught[0]
        detail = f"{what}\n{last_lines(error) if error else ''}"
    if kind in GOOD and peak - peak_at_first > MOST_MEMORY:
        kind, detail = "memory", f"{(peak - peak_at_first) >> 20} MiB more in memory"
    key = "" if kind in GOOD else f"{type(error).__name__} {place_of(error)}" if error else "loaded"
    return Result(number, kind, key, detail, seconds, peak)


def judge(error: BaseException, errors: tuple[type, ...]) -> tuple[str, str]:
    """Kind and detail of what a reader raised. Of Python's own errors only the very class may be."""
    chain = error
    while chain is not None:            # a reader may have made one line of it
        if isinstance(chain, MemoryError) or "allocate memory" in str(chain)[:1000]:
            return "memory", last_lines(chain)
        chain = chain.__cause__ or chain.__context__
    if not any(type(error) is kind if kind.__module__ == "builtins" else isinstance(error, kind)
               for kind in errors):
        return "traceback", last_lines(error)
    message = str(error)
    if len(message) <= MOST_MESSAGE and len(message.splitlines()) == 1:
        return "line", message
    return "message", f"{len(message)} characters\n{last_lines(error)}"


def last_lines(error: BaseException) -> str:
    """Of a traceback."""
    text = "".join(traceback.format_exception(error))
    return "\n".join(line[:300] for line in text.splitlines()[-14:])


def place_of(error: BaseException) -> str:
    """File, line and function of the innermost frame that is of the project; empty if none is."""
    frames = [(Path(frame.filename), frame) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(path.relative_to(ROOT), frame) for path, frame in frames if path.is_relative_to(ROOT)]
    own = [(path, frame) for path, frame in own if path.parts[0] in PACKAGES[:-1]]
    return f"{own[-1][0].as_posix()}:{own[-1][1].lineno} {own[-1][1].name}" if own else ""
