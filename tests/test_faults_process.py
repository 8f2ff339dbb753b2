"""Claims about what surrounds a run: its exit, its signals, its output, its file system, its compiler, its
thread.

As in test_reliability.py the runs are tiny and in forked children; a process of its own is started where the
end of the interpreter, a closed descriptor or a terminal is what a claim is about.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call, command, earlier, fork, forked, refusal, rows, wait_for, wait_until
from test_reliability import LONG, alive, at_step, check_equal, nap, napping, signalled, torchrun

import console
import sample
import train
import visualize
from sample import UserError, read_checkpoint

ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))

# Exceptions that nobody foresaw ---------------------------------------------------------------------------


def bug():
    raise RuntimeError("a bug")


def caught(*words, **sets):
    """The exception that a run ends with, and its traceback with all frames."""
    try:
        call(*words, **sets)
    except BaseException as error:
        return error


@pytest.mark.parametrize("stage", ["vgg", "phase1", "phase2"])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_no_loader_worker_outlives_an_exception_even_while_its_traceback_is_held(
    trained, data, tmp_path, stage, workers
):
    def child():
        at_step(2, bug)
        error = caught(stage, earlier(trained, tmp_path / "out", stage), data, "--workers", workers)
        assert str(error) == "a bug" and error.__traceback__
        assert multiprocessing.active_children() == []

    assert forked(child) == 0


def test_no_loader_worker_outlives_a_start_that_failed_halfway(trained, data, tmp_path, capfd):
    def child():
        real, started = multiprocessing.process.BaseProcess.start, []

        def start(process):
            if len(started) == 2:
                raise OSError(errno.EMFILE, "Too many open files")
            started.append(process)
            real(process)

        multiprocessing.process.BaseProcess.start = start
        error = caught("phase1", earlier(trained, tmp_path / "out", "phase1"), data, "--workers", 4)
        assert error.code == 1 and len(started) == 2
        assert multiprocessing.active_children() == []

    assert forked(child) == 0
    assert "Too many open files" in capfd.readouterr().err


def test_a_worker_that_does_not_end_when_asked_is_killed(data):
    def child():
        def item(images, position):
            time.sleep(600 if position else 0)
            return torch.zeros(1), 0

        sample.Shapes.__getitem__ = item
        stream = sample.batches(sample.Shapes("train", 10, 32), 1, 0, 1)
        next(stream)
        stream.close()
        assert multiprocessing.active_children() == []

    begin = time.monotonic()
    assert forked(child) == 0 and time.monotonic() - begin < 30


RAISE = """
import json, sys
import train
def bug(*args):
    raise RuntimeError("a bug")
real = train.Run.due
def due(run, what, stage, step):
    return bug() if what == "log" and step == 2 else real(run, what, stage, step)
train.Run.due = due
if sys.argv[2] == "encoding":
    train.encode_all = bug
train.main(*train.parse_args(json.loads(sys.argv[1])))
"""


def ended(folder, *words, patience=60, **how):
    """(exit code, stdout, stderr) of a process of its own; nothing of it is left, whatever happened."""
    with open(folder / "stdout", "w") as out, open(folder / "stderr", "w") as err:
        how = dict(stdout=out, stderr=err) | how
        job = subprocess.Popen([sys.executable, *map(str, words)], env=ENV, start_new_session=True, **how)
        try:
            code = job.wait(patience)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    return code, (folder / "stdout").read_text(), (folder / "stderr").read_text()


@pytest.mark.parametrize("stage, where", [("vgg", "loop"), ("phase1", "loop"), ("ar", "encoding")])
def test_an_unforeseen_exception_ends_the_process_within_seconds(trained, data, tmp_path, stage, where):
    out = earlier(trained, tmp_path / "out", stage)
    (out / "codes.pt").unlink(missing_ok=True)
    words = json.dumps(command(stage, out, data, "--workers", 4))
    code, _, error = ended(tmp_path, "-c", RAISE, words, where)
    assert code == 1 and "RuntimeError: a bug" in error
    assert not alive(word=out)


@pytest.mark.dist
def test_an_unforeseen_exception_in_one_process_ends_all_with_their_workers(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "phase1")
    words = command("phase1", out, data, "--workers", 2)
    job = torchrun(tmp_path, dict(kind="raise", at=[3, 1]), words)
    assert job.wait(90) == 1
    assert "RuntimeError: a test" in (tmp_path / "log").read_text()
    wait_until(lambda: not alive(word=out), patience=10)
