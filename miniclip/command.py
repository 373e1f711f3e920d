"""What the packages' command lines share: one line for a mistake, a quiet end where the reader has gone.

Imports the standard library only. train/common.py has its own `run`, for scripts of several processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def run(name: str, work: Callable[[], None], mistakes: tuple[type[Exception], ...] = (ValueError, OSError)) -> int:
    """Runs `work`; returns the exit status. A mistake of the user is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a Chinese path on a console that cannot show it
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:                             # `| head` has read enough: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or the flush at exit would complain
    except KeyboardInterrupt:
        return 130
    except mistakes as error:
        print(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
        return 2
    return 0
