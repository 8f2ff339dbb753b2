"""Standard output and error that cost nobody a run: what cannot be written there is left out.

Without torch, so that --help answers at once.
"""

import atexit
import contextlib
import json
import os
import sys
import time
from pathlib import Path

LOST = (OSError, ValueError, AttributeError)  # the reader is gone or the disk full; closed; None


class Steady:
    """Takes the place of sys.stdout or sys.stderr: whoever writes goes on, also where nothing can be written.

    stream: the text stream itself, or None, as a process without that descriptor has it
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(*LOST):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(*LOST):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def steady_process():
    """At the start of a command: both streams are `Steady` until it ends, which is quiet too. What their
    encoding lacks, as a name that is no UTF-8, is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)
    atexit.register(settle)


def settle():
    """What cannot be flushed goes nowhere; the interpreter would report it and end with exit code 120."""
    for number, stream in enumerate((sys.__stdout__, sys.__stderr__), 1):
        try:
            stream.flush()
        except LOST:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def print_error(message):
    """The line that a command ends with. torchrun prints thirty lines of its own after it, and at their end
    what it finds in this file: the line again."""
    print(f"error: {message}", file=sys.stderr)
    if place := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = dict(message=f"error: {message}", timestamp=int(time.time()))
        with contextlib.suppress(OSError):
            Path(place).write_text(json.dumps(about), "utf-8")
