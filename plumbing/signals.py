"""What a run does when a signal asks it to stop."""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

from plumbing.dataset import STOPS
from plumbing.processes import print0


@contextmanager
def listening(run):
    """The signals STOPS end a run after the step in progress was saved, with 128 + their number as the
    exit code; SIGUSR1 saves and goes on. A second Ctrl-C ends it at once, and so do all signals between two
    stages, with a line that says so. SIGHUP stays ignored where nohup has seen to it."""
    if threading.current_thread() is not threading.main_thread():
        print0("note: only a main thread can handle signals: here one that ends the program loses the steps "
               "since the last save")
        yield
        return
    pressed, between = [], []  # when Ctrl-C was; torchrun repeats it within an instant

    def save(number, frame):
        run.request = max(run.request, 1)

    def stop(number, frame):
        if number == signal.SIGINT:
            pressed.append(time.monotonic())
            if pressed[-1] > pressed[0] + 0.3:
                os._exit(130)
        if not run.in_loop:
            between.append(number)
            sys.exit(128 + number)
        run.request = max(run.request, 128 + number)

    handlers = dict.fromkeys(STOPS, stop) | {signal.SIGUSR1: save}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        del handlers[signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except SystemExit:
        if between:
            print0(f"stopped after {run.place}, nothing saved is lost; the same command goes on from there")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
