"""What command lines share: one line for a mistake of the user, and a quiet end where the reader has gone.

Imports the standard library only. train/run/cli.py adds what scripts of several processes need.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


def run(name: str, work: Callable[[], None],
        mistakes: tuple[type[Exception], ...] = (ValueError, OSError)) -> int:
    """Runs `work`; returns the exit status. A mistake of the user is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")        # a Chinese path on a console that cannot show it
    try:
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except mistakes as error:
        if is_closed_pipe(error):                       # `| head` has read enough: nothing is wrong
            return 0
        print(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
              file=sys.stderr)
        return 2
    finally:
        flush_output()
    return 0


def is_closed_pipe(error: Exception) -> bool:
    """Whether nobody reads what is printed any more; Windows calls that an invalid argument."""
    windows = os.name == "nt" and getattr(error, "errno", 0) == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or windows


def flush_output() -> None:
    """If nobody reads any more (`| head`), the rest goes nowhere: else Python complains as it shuts down."""
    try:
        sys.stdout.flush() if sys.stdout else None
    except OSError as error:
        if is_closed_pipe(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
