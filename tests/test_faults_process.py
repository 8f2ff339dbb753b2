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
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.distributed.run import get_args_parser
import plumbing.codes
import plumbing.dataset
import plumbing.shapes
import plumbing.validation
import studies.summary
from helpers import ROOT, call, command, earlier, few, fork, forked, wait_for, wait_until
from test_reliability import alive, at_step, check_equal, nap, napping, torchrun

import train
from plumbing.files import read_checkpoint

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


@pytest.mark.parametrize("stage, workers", few([
    ("phase1", 4), *((stage, n) for stage in ("vgg", "phase2") for n in (0, 1, 4)), ("phase1", 0)], 0))
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


RAISE = """
import json, sys
import plumbing.codes, train
from recipes.options import train_args
def bug(*args):
    raise RuntimeError("a bug")
real = train.Run.due
def due(run, what, stage, step):
    return bug() if what == "log" and step == 2 else real(run, what, stage, step)
train.Run.due = due
if sys.argv[2] == "encoding":
    plumbing.codes.encode_all = bug
train.main(*train_args(json.loads(sys.argv[1])))
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


@pytest.mark.slow
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
def test_sighup_while_a_run_validates_saves_that_step(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "nar")

    def child():
        train.evaluate_prior = lambda *args: nap(out, 0.5)
        call("nar", out, data, "--eval-every", 3, "--save-every", 100)

    victim = fork(child)
    wait_until((out / "napping").exists)
    os.kill(victim, signal.SIGHUP)
    assert wait_for(victim) == 129
    assert read_checkpoint(out / "nar.pt", ["nar"])["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("module, name, stage", [
    (plumbing.codes, "encode_all", "ar"), (studies.summary, "summarize", "all")])
def test_sighup_between_two_stages_ends_at_once_and_the_same_command_goes_on(
    trained, data, tmp_path, capfd, module, name, stage
):
    out = tmp_path / "out"
    out.mkdir()
    for path in (*trained.glob("*.pt"), trained / "metrics.jsonl"):
        if stage == "all" or path.name in ("vgg.pt", "phase1.pt", "phase2.pt"):
            (out / path.name).write_bytes(path.read_bytes())

    def child():
        setattr(module, name, lambda *args: nap(out, 60))
        call(stage, out, data)

    victim = fork(child)
    wait_until((out / "napping").exists)
    os.kill(victim, signal.SIGHUP)
    assert wait_for(victim, 20) == 129
    assert "stopped after the start, nothing saved is lost; the same command goes" in capfd.readouterr().out
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
    wait_until(lambda: "FAULT" in (tmp_path / "log").read_text())
    job.send_signal(signal.SIGHUP)
    assert (job.wait(60) != 0) == ends
    assert read_checkpoint(out / "phase1.pt", ["phase1"])["step"] == (3 if ends else 6)


# Threads --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_in_a_thread_trains_the_same_without_handlers_and_says_so(
    trained, data, tmp_path, capfd, workers
):
    out = earlier(trained, tmp_path / "out", "phase1")

    def child():
        thread = threading.Thread(target=call, args=("phase1", out, data, "--workers", workers))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    assert forked(child) == 0
    assert capfd.readouterr().out.count("note: only a main thread can handle signals") == 1
    check_equal(trained, out, "phase1")
