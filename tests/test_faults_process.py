"""Claims about what surrounds a run: its exit and its signals. As in test_reliability.py the runs are tiny
and in forked children."""

import contextlib
import errno
import multiprocessing
import os
import pty
import signal
import time

import pytest
import torch
from torch.distributed.run import get_args_parser
import plumbing.codes
import plumbing.dataset
import plumbing.shapes
from helpers import call, command, earlier, few, fork, forked, wait_for, wait_until
from test_reliability import alive, at_step, check_equal, nap, napping, torchrun

from plumbing.files import read_checkpoint

# Exceptions that nobody foresaw ---------------------------------------------------------------------------


def bug():
    raise RuntimeError("a bug")


def caught(*words, **sets):
    """The exception that a run ends with, and its traceback with all frames."""
    try:
        call(*words, **sets)
    except BaseException as error:
        return error


@pytest.mark.parametrize("stage, workers", few([("vgg", 4), ("phase1", 1), ("phase2", 0)], 0))
def test_no_loader_worker_outlives_an_exception_even_while_its_traceback_is_held(
    trained, data, tmp_path, stage, workers
):
    def child():
        at_step(2, bug)
        error = caught(stage, earlier(trained, tmp_path / "out", stage), data, "--workers", workers)
        assert str(error) == "a bug" and error.__traceback__
        assert multiprocessing.active_children() == []

    assert forked(child) == 0


@pytest.mark.slow
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

        plumbing.shapes.Shapes.__getitem__ = item
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # patience of torch, instead of twice 5 s
        stream = plumbing.dataset.batches(plumbing.shapes.Shapes("train", 10, 32), 1, 0, 1)
        next(stream)
        stream.close()
        assert multiprocessing.active_children() == []

    begin = time.monotonic()
    assert forked(child) == 0 and time.monotonic() - begin < 30


@pytest.mark.dist
def test_an_unforeseen_exception_in_one_process_ends_all_with_their_workers(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "phase1")
    words = command("phase1", out, data, "--workers", 2)
    job = torchrun(tmp_path, dict(kind="raise", at=[3, 1]), words)
    assert job.wait(240) == 1
    assert "RuntimeError: a test" in (tmp_path / "log").read_text()
    wait_until(lambda: not alive(word=out), patience=10)


# Signals --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sighup_stays_ignored_under_nohup(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "nar")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        victim = napping(3, 0.5, "nar", out, data)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.kill(victim, signal.SIGHUP)
    assert wait_for(victim) == 0
    check_equal(trained, out, "nar")


@pytest.mark.slow
def test_sighup_between_two_stages_ends_at_once_and_the_same_command_goes_on(trained, data, tmp_path, capfd):
    out = earlier(trained, tmp_path / "out", "ar")

    def child():
        plumbing.codes.encode_all = lambda *args: nap(out, 60)
        (out / "codes.pt").unlink()
        call("ar", out, data)

    victim = fork(child)
    wait_until((out / "napping").exists)
    os.kill(victim, signal.SIGHUP)
    assert wait_for(victim, 20) == 129
    assert "stopped after the start; the same command goes on" in capfd.readouterr().out
    call("ar", out, data)
    check_equal(trained, out, "ar")


@pytest.mark.slow
def test_a_closed_terminal_saves_the_step_in_progress(trained, data, tmp_path):
    """Nothing can be printed any more then, either."""
    out = earlier(trained, tmp_path / "out", "nar")
    child, terminal = pty.fork()
    if child == 0:
        at_step(3, lambda: nap(out, 1))
        code = 1
        with contextlib.suppress(BaseException):
            try:
                call("nar", out, data)
            except SystemExit as stop:
                code = stop.code
        os._exit(code)
    wait_until((out / "napping").exists)
    os.close(terminal)
    assert wait_for(child) == 129
    assert read_checkpoint(out / "nar.pt", ["nar"])["step"] == 3


SIGHUP_LEFT_OUT = "--signals-to-handle", "SIGTERM,SIGINT"  # which PyTorch 2.6 does not have
KNOWN = SIGHUP_LEFT_OUT[0] in get_args_parser().format_help()


@pytest.mark.dist
@pytest.mark.parametrize("flags, ends", [((), True), *[(SIGHUP_LEFT_OUT, False)] * KNOWN])
def test_sighup_to_torchrun_under_nohup_saves_or_with_its_flag_is_ignored(
    trained, data, tmp_path, flags, ends
):
    out = earlier(trained, tmp_path / "out", "phase1")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job = torchrun(tmp_path, dict(kind="sleep", at=[3, 0], seconds=2),
                       command("phase1", out, data, "--save-every", 100), *flags)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    wait_until(lambda: "FAULT" in (tmp_path / "log").read_text(), 240)
    job.send_signal(signal.SIGHUP)
    assert (job.wait(240) != 0) == ends
    assert read_checkpoint(out / "phase1.pt", ["phase1"])["step"] == (3 if ends else 6)
