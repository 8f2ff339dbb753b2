"""Errors that end a command with one line."""

import contextlib
import os
import sys
import traceback
from pathlib import Path


ROOT = str(Path(__file__).parent.parent)


class UserError(Exception):
    """One line that names cause and remedy, no traceback. `code` is 2 where the input is wrong and nothing
    was begun, 1 where a run had to stop; what was saved before stays as it was in both cases."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


class InUse(UserError):
    """Another process is at work there."""


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def as_user_error():
    """Settings or weights that a network refuses are bad input, not a bug. An exception that passed through a
    fork's code keeps its file and line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if place := of_fork(error):
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
              if frame.f_globals.get("__name__", "").startswith("forks.")]
    return f"{frames[-1][0].rpartition('forks/')[2]}:{frames[-1][1]}: {one_line(error)}" if frames else ""


def print_traceback():
    """The whole traceback of the exception at hand, for whoever set SEQGAN_TRACEBACK."""
    if os.environ.get("SEQGAN_TRACEBACK"):
        traceback.print_exc()


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
