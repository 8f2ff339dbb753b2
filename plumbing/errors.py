"""Errors that end a command with one line."""

import contextlib
import linecache
import os
import sys
import traceback
from pathlib import Path

ROOT = str(Path(__file__).parent.parent)


class UserError(Exception):
    """One line that names cause and remedy, no traceback. `code` is 2 where the input is wrong and nothing
    was begun, 1 where a run had to stop; what was saved before stays as it was in both cases.
    shared: all processes raise it, so that the first one speaks for them"""

    def __init__(self, message, code=2, shared=None):
        super().__init__(message)
        self.code, self.shared = code, code == 2 if shared is None else shared


class InUse(UserError):
    """Another process is at work there."""


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def as_user_error():
    """Settings or weights that a network refuses are bad input, not a bug. An exception of a fork's own code
    keeps its file and line; a refusal that is meant for whoever chose the settings needs none."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (place := of_fork(error)) and not refused(error):
            raise UserError(place) from error
        if not isinstance(error, ValueError | TypeError | RuntimeError):
            raise
        raise UserError(" ".join(str(error).split())[:300]) from None


def of_fork(error):
    """'mine.py:12: ValueError: ...' of an exception that passed through a fork: the innermost of its lines.
    "" if it passed none."""
    if isinstance(error, SyntaxError) and error.filename:  # the file that could not be compiled
        return f"{Path(error.filename).name}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
              if in_fork(frame)]
    return f"{frames[-1][0].rpartition('forks/')[2]}:{frames[-1][1]}: {one_line(error)}" if frames else ""


def in_fork(frame):
    return frame.f_globals.get("__name__", "").startswith("forks.")


def refused(error):
    """Whether an exception is a ValueError that our own code raised on purpose, or a fork's `check` or
    configuration did."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    path, text = frame.f_code.co_filename, linecache.getline(frame.f_code.co_filename, line)
    if in_fork(frame):
        ours = frame.f_code.co_name in ("check", "__post_init__")
    else:
        ours = path.startswith(ROOT) and "site-packages" not in path
    return ours and isinstance(error, ValueError) and "raise " in text


def print_traceback():
    """The whole traceback of the exception at hand, for whoever set SEQGAN_TRACEBACK."""
    if os.environ.get("SEQGAN_TRACEBACK"):
        traceback.print_exc()


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
