"""Errors that end a command with one line."""

import contextlib
import sys


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
    """Settings or weights that a network refuses are bad input, not a bug."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())[:300]) from None


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
