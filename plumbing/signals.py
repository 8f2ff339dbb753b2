"""What a run does when a signal asks it to stop."""

import os
import signal
import sys
import time
from contextlib import contextmanager

from plumbing.dataset import STOPS
from plumbing.processes import print0


@contextmanager
def listening(run):
    """The signals STOPS end a run after the step in progress was saved, with 128 + their number as the
    exit code; SIGUSR1 saves and goes on. Between two stages they end it at once, as a second Ctrl-C does
    anywhere. SIGHUP stays ignored where nohup has seen to it."""
    pressed = []  # when Ctrl-C was; torchrun repeats it within an instant

    def save(number, frame):
        run.request = max(run.request, 1)

    def stop(number, frame):
        if number == signal.SIGINT:
            pressed.append(time.monotonic())
            if pressed[-1] > pressed[0] + 0.3:
                os._exit(130)
        if not run.in_loop:
            sys.exit(128 + number)
        run.request = max(run.request, 128 + number)

    handlers = dict.fromkeys(STOPS, stop) | {signal.SIGUSR1: save}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        del handlers[signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except SystemExit:
        print0(f"stopped after {run.place}; the same command goes on from there")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
