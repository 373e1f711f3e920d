"""What the packages' command lines share: one line for a mistake, a quiet end where the reader has gone.

Imports the standard library only. train/common.py has its own `run`, for scripts of several processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def run(name: str, work: Callable[[], None], mistakes: tuple = (ValueError, OSError)) -> int:
    """Runs `work`; returns the exit status. An exception among `mistakes` is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a Chinese path on a console that cannot show it
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:                             # `| head` has read enough: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or the flush at exit complains
    except KeyboardInterrupt:
        return 130
    except mistakes as error:
        said = str(error).splitlines() or [type(error).__name__]
        print(f"{name}: {said[0]}", file=sys.stderr)
        return 2
    return 0
