"""Claims about faults: a run that is killed, starved, signalled or fed rubbish loses and falsifies nothing.

Every fault is a real one: a signal, a truncated file, a flipped bit, a full disk, a gradient that is not
finite, a dead worker. Runs are the tiny ones of helpers.py, in forked children where they have to die.
"""

import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import plumbing.codes
import plumbing.data
import plumbing.dataset
import plumbing.files
import plumbing.hashes
import plumbing.images
import plumbing.models
import plumbing.processes
import plumbing.parallel
import plumbing.run
import plumbing.validation
import plumbing.weights
import recipes.options
import safetensors.torch
from helpers import (
    ROOT, SCRIPTS, STEPS, call, command, contents, differing, earlier, few, fork, forked, open_run, refusal,
    refused, rows, save_from_gpu, wait_for, wait_until, write_pictures,
)
from PIL import Image

import sample
from plumbing.errors import UserError
from plumbing.files import header, intact, newest_intact, read_checkpoint, save_checkpoint

# Killed and started again ---------------------------------------------------------------------------------


def at_step(step, action, what="log"):
    """Calls `action()` in this process when a run comes to the end of `step`, before it is logged."""
    real = plumbing.run.Run.due

    def due(run, found, stage, number):
        if found == what and number + 1 == step:
            action()
        return real(run, found, stage, number)

    plumbing.run.Run.due = due


def killed_at(step, *words, **sets):
    """A child that runs a command and gets SIGKILL at the end of `step`."""

    def child():
        at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        torch.manual_seed(step)  # a new process has another random state
        call(*words, **sets)

    assert forked(child) == -signal.SIGKILL


def check_equal(straight, out, stage):
    """Both folders hold the same checkpoint, bit for bit, and the same log, each step once."""
    a, b = (read_checkpoint(folder / f"{stage}.pt", [stage]) for folder in (straight, out))
    assert a["step"] > 1 and differing(a, b) == []
    assert rows(out, stage) == rows(straight, stage)
    steps = [row["step"] for row in rows(out, stage) if "lr" in row]
    assert steps == list(range(1, a["step"] + 1))


KMEANS = dict(tokenizer__codebook="kmeans", tokenizer__kmeans_warmup=1, tokenizer__kmeans_every=2,
              tokenizer__kmeans_last=5)


@pytest.mark.parametrize("stage, sets, kills", few([  # checkpoints are of steps 2, 4 and 6
    ("phase1", {}, [5]), *((stage, {}, [1, 4, 5, 6]) for stage in ("vgg", "phase1", "phase2", "ar", "nar")),
    ("phase1", KMEANS, [1, 4, 5, 6]), ("phase1", dict(tokenizer__warm_start=3), [1, 4, 5, 6])], 0))
def test_a_stage_killed_at_many_steps_ends_as_an_unbroken_one(trained, data, tmp_path, stage, sets, kills):
    straight = trained
    if sets:
        straight = earlier(trained, tmp_path / "straight", stage)
        call(stage, straight, data, **sets)
    out = earlier(trained, tmp_path / "broken", stage)
    for step in kills:
        killed_at(step, stage, out, data, **sets)
    call(stage, out, data, **sets)
    check_equal(straight, out, stage)
    ckpt = read_checkpoint(out / f"{stage}.pt", [stage])
    if stage in ("phase1", "phase2"):
        assert ckpt["train"].keys() >= {"disc", "opt_g", "opt_d"}
        assert "loss_disc" in rows(straight, stage)[1]  # the GAN was on when the run was stopped
    if stage in ("ar", "nar", "phase1"):
        assert ckpt["ema"] is not None


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_loader_workers(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "phase1")
    killed_at(3, "phase1", out, data)
    call("phase1", out, data, "--workers", 2)
    check_equal(trained, out, "phase1")


@pytest.mark.slow
def test_a_log_that_was_torn_in_the_middle_of_a_line_has_each_step_once_in_the_end(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "ar")
    killed_at(6, "ar", out, data)
    log = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(log[: -len(log.splitlines()[-1]) // 2])  # of step 5
    call("ar", out, data)
    check_equal(trained, out, "ar")


# Checkpoint files -----------------------------------------------------------------------------------------


def test_a_phase_goes_on_only_under_the_vgg_that_it_began_with(trained, data, tmp_path, capsys):
    out = earlier(trained, tmp_path / "out", "phase2")
    ckpt = read_checkpoint(out / "phase1.pt", ["phase1"])
    vgg, _ = plumbing.models.load_model(out / "vgg.pt", ["vgg"])
    assert ckpt["vgg_hash"] == plumbing.hashes.weights_hash(vgg)
    save_checkpoint(ckpt | dict(vgg_hash="0" * 16), out / "phase1.pt")
    assert "was trained with another VGG" in refusal(capsys, "phase1", out, data)
    assert read_checkpoint(trained / "nar.pt", ["nar"])["vgg_hash"] is None


def test_a_process_without_a_validation_image_counts_no_token(trained, data, tmp_path, monkeypatch):
    """So it is with eight processes and seven images; the others wait for its counts."""
    def usage(counts):
        seen.append(counts)
        return 0.0, 0.0

    run, seen = open_run("phase1", tmp_path, data), []
    model, _ = plumbing.models.load_model(trained / "phase1.pt", ["phase1"])
    monkeypatch.setattr(plumbing.validation, "val_batches", lambda run, limit: [])
    monkeypatch.setattr(plumbing.validation, "codebook_usage", usage)
    monkeypatch.setattr(run, "log", lambda *place, **numbers: None)
    run.warned = set()
    plumbing.validation.evaluate_tokenizer(run, "phase1", 1, model)
    assert torch.equal(seen[0], torch.zeros(32))


def some_checkpoint(step, numel=50_000):
    torch.manual_seed(step)
    return dict(format=plumbing.files.FORMAT, stage="ar", step=step, model=dict(weight=torch.randn(numel)))


def steps_on_disk(folder):
    """The steps of all intact checkpoints under one of the three names that a start looks at."""
    names = [folder / f"x{suffix}" for suffix in (".next.pt", ".pt", ".previous.pt")]
    return {torch.load(name, weights_only=True)["step"] for name in names if name.exists() and intact(name)}


@pytest.mark.parametrize("delay", few([40, 0, 80, 120], 0))
def test_a_process_killed_while_it_saves_leaves_two_intact_checkpoints(tmp_path, delay):
    """SIGKILL in a loop of saves, after some milliseconds of the third one."""

    def child():
        for step in range(1, 10_000):
            save_checkpoint(some_checkpoint(step, 3_000_000), tmp_path / "x.pt")

    victim = fork(child)
    wait_until(lambda: (tmp_path / "x.previous.pt").exists())
    time.sleep(delay / 1000)
    os.kill(victim, signal.SIGKILL)
    assert wait_for(victim) == -signal.SIGKILL
    found = steps_on_disk(tmp_path)
    assert len(found) >= 2
    assert torch.load(newest_intact(tmp_path / "x.pt"), weights_only=True)["step"] == max(found)


@pytest.mark.parametrize("renaming", [1, 2, 3])
def test_two_intact_checkpoints_exist_before_every_renaming(tmp_path, renaming):
    for step in (1, 2):
        save_checkpoint(some_checkpoint(step), tmp_path / "x.pt")

    def child():
        real, calls = os.replace, []

        def replace(*names):
            calls.append(names)
            if len(calls) == renaming:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*names)

        os.replace = replace
        save_checkpoint(some_checkpoint(3), tmp_path / "x.pt")

    assert forked(child) == -signal.SIGKILL
    found = steps_on_disk(tmp_path)
    assert len(found) >= 2
    assert torch.load(newest_intact(tmp_path / "x.pt"), weights_only=True)["step"] == max(found)
    save_checkpoint(some_checkpoint(4), tmp_path / "x.pt")
    assert {4} < steps_on_disk(tmp_path) and read_checkpoint(tmp_path / "x.pt", ["ar"])["step"] == 4


def spoil(path, how):
    """Truncates a file to a share of its bytes, cuts the last one, or fills it with zeros."""
    content = path.read_bytes()
    length = len(content) - 1 if how == "one byte" else int(how * len(content)) if how != "zeros" else 0
    path.write_bytes(bytes(len(content)) if how == "zeros" else content[:length])


@pytest.mark.parametrize("how", [0.5, 0, 0.01, "one byte", "zeros"])
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_taken(tmp_path, capsys, how):
    for step in (1, 2):
        save_checkpoint(some_checkpoint(step), tmp_path / "x.pt")
    spoil(tmp_path / "x.pt", how)
    for _ in range(2):  # whoever looks next finds it by its name
        assert newest_intact(tmp_path / "x.pt") == tmp_path / "x.pt"
        assert torch.load(tmp_path / "x.pt", weights_only=True)["step"] == 1
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and "x.pt is damaged" in warnings[0] and "x.previous.pt" in warnings[0]
    save_checkpoint(some_checkpoint(3), tmp_path / "x.pt")
    spoil(tmp_path / "x.pt", how)
    spoil(tmp_path / "x.previous.pt", how)
    before = contents(tmp_path)  # no stage starts anew because all are damaged
    with pytest.raises(UserError, match="no intact checkpoint is left"):
        newest_intact(tmp_path / "x.pt")
    assert contents(tmp_path) == before and tmp_path / "x.damaged" in before


def test_every_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    dice, content = random.Random(0), None
    for _ in range(20):
        torch.save(some_checkpoint(1), tmp_path / "x.pt")
        content = bytearray((tmp_path / "x.pt").read_bytes())
        assert intact(tmp_path / "x.pt")
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (tmp_path / "x.pt").write_bytes(content)
        assert not intact(tmp_path / "x.pt")
        with pytest.raises(UserError, match="damaged"):
            read_checkpoint(tmp_path / "x.pt", ["ar"])


def test_left_over_and_foreign_files_are_ignored_and_only_own_temporary_ones_deleted(tmp_path):
    (tmp_path / ".tmp123.ar.pt").write_text("half")
    (tmp_path / "step_x.pt").write_text("foreign")
    (tmp_path / "ar.previous.pt").symlink_to("nowhere")
    plumbing.files.claim(tmp_path).close()
    assert newest_intact(tmp_path / "ar.pt") is None
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step_x.pt", "ar.previous.pt"}


def test_damaged_codes_are_made_again(trained, data, tmp_path, capsys):
    out = earlier(trained, tmp_path / "out", "ar")
    content = bytearray((out / "codes.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (out / "codes.pt").write_bytes(content)
    run = open_run("ar", out, data)
    plumbing.codes.cached_codes(run, plumbing.models.load_model(out / "phase2.pt", ["phase2"])[0])
    assert "codes.pt is damaged" in capsys.readouterr().err
    made, expected = (torch.load(folder / "codes.pt", weights_only=True) for folder in (out, trained))
    assert intact(out / "codes.pt") and differing(made, expected) == []


@pytest.mark.slow
def test_encoding_that_is_stopped_keeps_what_is_done_and_goes_on_there(
        trained, data, tmp_path, capfd, monkeypatch):
    out = earlier(trained, tmp_path / "out", "ar")
    (out / "codes.pt").unlink()
    real, encoded = plumbing.codes.to_float, []

    def child():
        def to_float(x, *args):
            if len(x) == 20:  # the validation images, after those of training
                os.kill(os.getpid(), signal.SIGINT)
            return real(x, *args)

        plumbing.codes.to_float = to_float
        call("ar", out, data)

    assert forked(child) == 130
    assert "the same command goes on from there" in capfd.readouterr().out
    assert not (out / "codes.pt").exists()
    monkeypatch.setattr(plumbing.codes, "to_float", lambda x, *args: encoded.append(len(x)) or real(x, *args))
    call("ar", out, data)
    assert encoded == [20] and not list(out.glob(".codes.*"))
    made, expected = (torch.load(folder / "codes.pt", weights_only=True) for folder in (out, trained))
    assert differing(made, expected) == []
    check_equal(trained, out, "ar")


# Files that are not damaged -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, dict(_use_new_zipfile_serialization=False)])
def test_a_checkpoint_from_a_gpu_and_one_of_the_old_form_are_read_everywhere(trained, tmp_path, how):
    ckpt = read_checkpoint(trained / "ar.pt", ["ar"])
    save_from_gpu(ckpt, tmp_path / "ar.pt", **how)
    assert differing(read_checkpoint(tmp_path / "ar.pt", ["ar"]), ckpt) == []
    assert header(tmp_path / "ar.pt")["step"] == STEPS
    save_from_gpu(ckpt["model"], tmp_path / "x.pth", **how)
    assert not differing(plumbing.weights.read_state_dict(tmp_path / "x.pth"), ckpt["model"])


def test_only_a_wrong_checksum_is_called_damage_and_nothing_else_is_to_be_deleted(tmp_path, monkeypatch):
    path = tmp_path / "ar.pt"
    tensors = safetensors.torch.save({"a": torch.zeros(3)})
    for content, told in ((tensors, "a safetensors file; "), (b"text", "no file of torch.save"),
                          (pickle.dumps(os.system, 2), "code, or no file")):
        path.write_bytes(content)
        for read in (header, lambda path: read_checkpoint(path, ["ar"])):
            with pytest.raises(UserError, match=told) as error:
                read(path)
            assert not re.search("delete|checksum", str(error.value).removeprefix(str(path)))
    save_checkpoint(some_checkpoint(1), path)
    spoil(path, 0.5)
    with pytest.raises(UserError, match="wrong checksum"):
        header(path)

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plumbing.files.zipfile, "ZipFile", denied)
    with pytest.raises(PermissionError):
        newest_intact(path)
    assert path.exists()


# Disk, folder, lock ---------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_with_a_message_and_keeps_the_checkpoint(tmp_path, capfd):
    save_checkpoint(some_checkpoint(1), tmp_path / "x.pt")
    before = contents(tmp_path)

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with plumbing.processes.one_line_errors():
            save_checkpoint(some_checkpoint(2), tmp_path / "x.pt")

    assert forked(child) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "could not be written" in error and "is the disk full?" in error
    assert contents(tmp_path) == before


@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null/x"])
def test_an_output_folder_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    error = refusal(capsys, "vgg", tmp_path / place, "no-such-data")
    assert "--out" in error and "no-such-data" not in error


def test_a_second_run_in_a_folder_is_refused_until_the_first_one_is_gone(data, tmp_path, capsys):
    """Its loader workers, which outlive it for seconds, do not hold the lock."""
    out = tmp_path / "out"
    out.mkdir()
    first = napping(1, 60, "vgg", out, data, "--workers", 1)
    assert f"in use by process {first}" in refusal(capsys, "vgg", out, data)
    os.kill(first, signal.SIGKILL)
    wait_for(first)
    plumbing.files.claim(out).close()


# Signals --------------------------------------------------------------------------------------------------

def nap(out, seconds):
    """Sleeps, and tells of it by a file."""
    (out / "napping").touch()
    time.sleep(seconds)


def napping(step, seconds, stage, out, *words, **sets):
    """The number of a child that runs a command and sleeps at the end of `step`, which it has come to."""

    def child():
        at_step(step, lambda: nap(out, seconds))
        call(stage, out, *words, **sets)

    number = fork(child)
    wait_until((out / "napping").exists)
    return number


@pytest.mark.parametrize("number", few(
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR2, signal.SIGUSR1], 0))
def test_a_signal_saves_the_step_in_progress_and_the_command_goes_on_from_it(trained, data, tmp_path, number):
    """SIGUSR1 saves and does not stop."""
    out, stops = earlier(trained, tmp_path / "out", "nar"), number != signal.SIGUSR1
    victim = napping(3, 0.5, "nar", out, data, "--save-every", 1000)
    os.kill(victim, number)
    assert wait_for(victim) == (128 + number if stops else 0)
    assert read_checkpoint(out / ("nar.pt" if stops else "nar.previous.pt"), ["nar"])["step"] == 3
    call("nar", out, data, "--save-every", 1000)
    check_equal(trained, out, "nar")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "nar")
    victim = napping(3, 60, "nar", out, data)
    for _ in range(2):
        os.kill(victim, signal.SIGINT)
        time.sleep(0.5)
    assert wait_for(victim, patience=20) == 130
    assert read_checkpoint(out / "nar.pt", ["nar"])["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR2]])
def test_signals_to_the_whole_group_leave_the_loader_alive_until_the_save(trained, data, tmp_path, numbers):
    out = earlier(trained, tmp_path / "out", "phase1")
    victim = napping(3, 0.5, "phase1", out, data, "--workers", 2)
    for number in numbers:
        os.killpg(victim, number)
    assert wait_for(victim) > 128
    assert read_checkpoint(out / "phase1.pt", ["phase1"])["step"] == 3
    wait_until(lambda: not alive(victim))
    call("phase1", out, data)
    check_equal(trained, out, "phase1")


def alive(group=None, word=None):
    """Whether a process of the group, or with the word on its command line, is left; zombies do not count."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if state != "Z" and (its_group == str(group) or (word and str(word).encode() in line)):
            return True
    return False


def test_handlers_of_signals_are_put_back_after_a_run(data, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with open_run("nar", tmp_path, data).session():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


@pytest.mark.parametrize("how", few(["killed", "raises"], 0))
def test_a_loader_worker_that_dies_ends_the_run_with_a_hint_and_loses_nothing(
    trained, data, tmp_path, capfd, how
):
    out = earlier(trained, tmp_path / "out", "phase1")

    def child():
        real = plumbing.data.FolderData.__getitem__

        def item(images, position):
            if position == 8 * 4 and torch.utils.data.get_worker_info():
                if how == "raises":
                    raise UserError("the disk is gone")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(images, position)

        plumbing.data.FolderData.__getitem__ = item
        call("phase1", out, data, "--workers", 2)

    assert forked(child) == 1
    error = capfd.readouterr().err
    assert ("--workers 0" if how == "killed" else "error: the disk is gone") in error
    assert "Traceback" not in error
    assert how == "killed" or read_checkpoint(out / "phase1.pt", ["phase1"])["step"] == 4


# Numbers --------------------------------------------------------------------------------------------------


def not_finite_at(patch, term, steps, value=math.nan, places=("0",)):
    """The gradients of the loss that logs `term` are spoilt in some steps, in the processes `places`."""
    real = plumbing.run.Run.backward

    def backward(run, loss, share, /, **terms):
        bad = term in terms and int(run.place.split()[-1]) in steps and os.environ.get("RANK", "0") in places
        real(run, loss * value if bad else loss, share, **terms)

    patch.setattr(plumbing.run.Run, "backward", backward)


@pytest.mark.parametrize("term, name, value", few([
    ("loss_rec", "tokenizer", math.nan), ("loss_disc", "discriminator", math.inf),
    ("loss_rec", "tokenizer", math.inf), ("loss_disc", "discriminator", math.nan)], 0))
def test_a_gradient_that_is_not_finite_skips_one_update_of_one_player(
        trained, data, tmp_path, monkeypatch, term, name, value):
    out = earlier(trained, tmp_path / "out", "phase1")
    not_finite_at(monkeypatch, term, {2, 3}, value)
    call("phase1", out, data, phase1__adv_start=0.0, phase1__steps=4)
    ckpt = read_checkpoint(out / "phase1.pt", ["phase1"])
    assert ckpt["step"] == 4 and plumbing.hashes.not_finite(ckpt) == ""
    assert list(ckpt["skips"][name]) == [0, 2]
    moments = [state["step"].item() for state in ckpt["train"]["opt_g"]["state"].values()]
    assert set(moments) == {2 if name == "tokenizer" else 4}
    counts = [row.get(f"skipped_{name}") for row in rows(out, "phase1") if "lr" in row]
    assert counts == [None, 1, 2, 2]


def test_a_run_whose_gradients_stay_bad_stops_and_keeps_its_last_checkpoint(
    trained, data, tmp_path, monkeypatch, capsys
):
    out = earlier(trained, tmp_path / "out", "ar")
    not_finite_at(monkeypatch, "top1", range(3, 100))
    with pytest.raises(SystemExit) as stop:
        call("ar", out, data, "--steps", 40, "--save-every", 2)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "updates of the prior were skipped" in error and "lower lr" in error
    good = read_checkpoint(out / "ar.pt", ["ar"])
    assert good["step"] == 10 and plumbing.hashes.not_finite(good) == ""
    assert list(good["skips"]["prior"]) == [8, 8]


def test_weights_that_are_not_finite_are_never_written(data, tmp_path):
    run, model = open_run("vgg", tmp_path, data), torch.nn.Linear(2, 1)
    model.sizes = {}
    run.start("vgg", model=model)
    run.save("vgg", 0, model)
    with torch.no_grad():
        model.weight[0, 1] = math.nan
    with pytest.raises(UserError, match="model.weight is not finite, so nothing was written"):
        run.save("vgg", 1, model)
    assert read_checkpoint(tmp_path / "vgg.pt", ["vgg"])["step"] == 1


def test_lines_of_the_log_are_json_even_where_a_loss_is_not_finite(trained, data, tmp_path):
    run = open_run("ar", earlier(trained, tmp_path / "out", "ar"), data)
    run.rows, run.warned, run.skips, run.clock = [], set(), {}, 0.0
    run.log("ar", 0, lr=0.1, loss=torch.tensor(math.nan))

    def refuse(word):
        raise AssertionError(word)

    (line,) = (run.out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["loss"] is None


FINE = dict(stage="phase1", lr=1.0, loss_rec=0.2, loss_per=1.0, loss_disc=1.2, loss_entropy=0.1, usage=0.9)


@pytest.mark.parametrize("name, changes, word", [
    ("usage", [dict(usage=0.9), dict(usage=0.5)], "phase1.gamma"),
    ("disc", [dict(loss_disc=0.01)] * 5, "phase1.r1_gamma"),
    ("val", [dict(val_loss=2.0), dict(val_loss=2.5)], "dropout"),
    ("per", [dict(loss_per=1e-4)], "--vgg"),
])
def test_each_early_warning_names_its_cause_and_a_setting_and_comes_only_then(name, changes, word):
    c = recipes.options.PRESETS["imagenet"]["phase1"]
    assert plumbing.validation.early_warnings([FINE] * 9, "phase1", c) == {}
    found = plumbing.validation.early_warnings(
        [FINE, *[{**FINE, **change} for change in changes]], "phase1", c
    )
    assert list(found) == [name] and word in found[name]
    almost = [{**FINE, **change} for change in changes[:-1]]
    assert plumbing.validation.early_warnings([FINE, *almost], "phase1", c) == {}


def test_the_warning_of_dying_codes_names_gamma_only_where_there_is_an_entropy_term():
    rows = [dict(stage="phase1", usage=usage) for usage in (0.9, 0.5)]
    found = plumbing.validation.early_warnings(rows, "phase1", recipes.options.PRESETS["imagenet"]["phase1"])
    assert "lower phase1.lr" in found["usage"] and "gamma" not in found["usage"]


def test_a_warning_is_printed_once_and_between_validations_too(trained, data, tmp_path, capsys):
    run = open_run("phase1", earlier(trained, tmp_path / "out", "phase1"), data)
    run.rows, run.warned, run.skips, run.clock = [], set(), {}, 0.0
    for step, usage in enumerate((1.0, 0.5, 0.4, 0.4, 0.4)):  # a validation after every line of losses
        run.log("phase1", 2 * step, lr=0.1, loss_disc=0.01)
        run.log("phase1", 2 * step, usage=usage)
    told = capsys.readouterr().err
    assert told.count("codebook usage fell") == told.count("the discriminator wins") == 1


# Images ---------------------------------------------------------------------------------------------------


def spoilt_pictures(folder):
    """The tiny data set with five files that are no images in its training part; returns these."""
    write_pictures(folder)
    files = sorted((folder / "train").rglob("*.png"))
    bad = [files[3], files[17], files[18], files[40], files[59]]
    Image.open(bad[0]).save(bad[0].with_suffix(".jpg"), quality=95)
    bad[0].unlink()
    bad[0] = bad[0].with_suffix(".jpg")
    bad[0].write_bytes(bad[0].read_bytes()[:300])  # a truncated JPEG
    content = bytearray(bad[1].read_bytes())
    content[len(content) // 2] ^= 8
    bad[1].write_bytes(content)  # a PNG with a flipped bit
    bad[2].write_bytes(b"")
    bad[3].write_text("<html>404 not found</html>")
    Image.fromarray(np.zeros((40, 32), np.float32)).save(bad[4].with_suffix(".tif"))
    bad[4].unlink()
    bad[4] = bad[4].with_suffix(".tif")
    return bad


@pytest.mark.slow
def test_bad_images_are_replaced_by_their_position_listed_once_and_counted(tmp_path, capsys):
    bad = spoilt_pictures(tmp_path / "data")
    run = open_run("phase1", tmp_path / "out", tmp_path / "data")
    run.out.mkdir()
    with run.session():
        streams = [plumbing.dataset.batches(run.train, 20, 0, workers) for workers in (0, 2)]
        for _, (images, labels), (again, same) in zip(range(3), *streams, strict=False):
            assert torch.equal(images, again) and torch.equal(labels, same)
        streams[1].close()
    assert "5 images could not be read" in capsys.readouterr().out
    listed = [line.split("\t")[0] for line in (run.out / "bad_files.txt").read_text().splitlines()]
    assert sorted(listed) == sorted(map(str, bad))
    clean = open_run("phase1", tmp_path / "clean_out", write_pictures(tmp_path / "clean"))
    names = [Path(path).stem for path in run.train.files]
    same = [torch.equal(run.train[p][0], clean.train[p][0]) for p in range(60)]
    assert names == [Path(path).stem for path in clean.train.files] and same.count(False) == 5
    for position in range(60):
        index = run.train.shuffled(position)
        image, label = run.train[position]
        assert label == run.train.labels[run.train.readable(index)]
        assert (Path(run.train.files[index]) in bad) == (run.train.readable(index) != index)


def test_codes_carry_the_label_of_the_image_that_was_encoded(trained, tmp_path):
    bad = spoilt_pictures(tmp_path / "data")
    run = open_run("ar", tmp_path / "out", tmp_path / "data")
    run.out.mkdir()
    codes = plumbing.codes.cached_codes(run, plumbing.models.load_model(trained / "phase1.pt", ["phase1"])[0])
    last = [i for i, path in enumerate(run.train.files) if Path(path) in bad][-1]
    assert last == 59 and codes["labels"][59] == run.train.labels[0] == 0  # the first image takes its place
    assert torch.equal(codes["train"][0, 59], codes["train"][0, 0])


def test_images_that_vanish_during_training_stop_the_run(tmp_path):
    run = open_run("phase1", tmp_path / "out", write_pictures(tmp_path / "data"))
    run.out.mkdir()
    stream = plumbing.dataset.batches(run.train, 20, 0, 0)
    next(stream)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="still there") as stop:
        next(stream)
    assert stop.value.code == 1


@pytest.mark.parametrize("change", ["removed", "added", "renamed", "edited"])
def test_a_run_whose_images_changed_is_not_continued(trained, data, tmp_path, capsys, change):
    data = shutil.copytree(data, tmp_path / "data")  # a folder that was moved is taken
    out = earlier(trained, tmp_path / "out", "phase1")
    call("vgg", out, data)
    first = sorted((data / "train").rglob("*.png"))[0]
    if change == "removed":
        first.unlink()
    elif change == "added":
        shutil.copy(first, first.with_name("new.png"))
    elif change == "renamed":
        first.rename(first.with_name("zzz.png"))
    else:
        Image.new("RGB", (40, 32)).save(first)
    before = contents(out)
    assert "the images changed" in refusal(capsys, "vgg", out, data)
    assert contents(out) == before


# The first bytes of a PNG that says to have 30,000 x 30,000 pixels.
BOMB = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
BOMB += zlib.crc32(BOMB[12:29]).to_bytes(4, "big") + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


@pytest.mark.parametrize("name, make, reason", [
    ("float.tif", lambda p: Image.fromarray(np.zeros((20, 20), np.float32)).save(p), "float"),
    ("empty.png", lambda p: p.write_bytes(b""), "identify"),
    ("page.jpg", lambda p: p.write_text("<html>"), "identify"),
    ("gone.png", lambda p: None, "No such file"),
    ("small.png", lambda p: Image.new("RGB", (900, 2)).save(p), "900x2 pixels are too few"),
    ("bomb.png", lambda p: p.write_bytes(BOMB), "DecompressionBombError"),
])
def test_a_file_that_is_no_usable_image_says_why(tmp_path, name, make, reason):
    make(tmp_path / name)
    with pytest.raises(plumbing.images.BadImage, match=reason):
        plumbing.images.load_rgb(tmp_path / name, min_side=4)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        red, _, blue = plumbing.images.load_rgb(tmp_path / name).getpixel((4, 4))
        assert red > 200 and blue < 50


# Sample sets ----------------------------------------------------------------------------------------------


def draw(*words):
    sample.main(recipes.options.sample_args([*map(str, words), "--device", "cpu", "--format", "files"]))


@pytest.mark.slow
def test_interrupted_sampling_goes_on_and_a_folder_of_other_settings_is_refused(trained, tmp_path, capsys):
    words = ["--ckpt", trained / "ar.pt", "--num", 6, "--batch", 2]
    draw(*words, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "000002.png").unlink()
    draw(*words, "--out", tmp_path / "parts")
    assert [p.read_bytes() for p in sorted((tmp_path / "parts").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "whole").iterdir())]
    info = json.loads((tmp_path / "whole" / "info.json").read_text())
    assert info["tokenizer"] == read_checkpoint(trained / "ar.pt", ["ar"])["tokenizer_hash"]
    for more in (["--seed", 1], ["--tokenizer", trained / "phase1.pt"]):
        with pytest.raises(SystemExit) as stop:
            draw(*words, *more, "--out", tmp_path / "whole")
        assert stop.value.code == 2 and "other weights or settings" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    assert "holds other files" in refused(capsys, draw, *words, "--out", tmp_path / "mine")


@pytest.mark.slow
def test_a_sheet_and_an_npz_say_what_made_them(trained, tmp_path, capsys):
    for kind, name in (("sheet", "a.png"), ("npz", "a.npz")):
        words = ["--ckpt", trained / "nar.pt", "--num", 1, "--steps", 40, "--format", kind, "--out",
                 tmp_path / name]
        sample.main(recipes.options.sample_args([*map(str, words), "--device", "cpu"]))
    assert capsys.readouterr().out.count("16 tokens take 16 steps at most") == 2
    sheet = json.loads(Image.open(tmp_path / "a.png").text["info"])
    array = json.loads(str(np.load(tmp_path / "a.npz")["info"]))
    assert sheet == array and sheet["tokenizer"] == plumbing.hashes.latent_hash(
        plumbing.models.load_model(trained / "phase2.pt", ["phase2"])[0])


def test_no_steps_build_everything_and_fewer_steps_than_done_do_nothing(trained, data, tmp_path, capsys):
    out = tmp_path / "out"
    call("vgg", out, data, "--steps", 0)
    assert not (out / "vgg.pt").exists() and "nothing to do" in capsys.readouterr().out
    shutil.copy(trained / "vgg.pt", out)
    before = contents(out)
    call("vgg", out, data, "--steps", 3)
    assert "has all its steps" in capsys.readouterr().out and contents(out) == before


def test_one_image_is_enough_and_images_without_classes_are_noted(tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    run = open_run("phase1", tmp_path / "out", tmp_path)
    assert len(run.train) == len(run.val) == 1
    said = capsys.readouterr().out
    assert "carry no labels" in said


def test_a_later_stage_takes_over_the_note_of_random_vgg_weights_and_warns_of_an_unfinished_one(
        trained, data, tmp_path, capsys):
    run = open_run("phase1", tmp_path, data, "--vgg", "random")
    assert "random VGG" in run.note
    out = earlier(trained, tmp_path / "out", "phase2")
    ckpt = torch.load(out / "phase1.pt", weights_only=True)
    torch.save(dict(ckpt, note=run.note, step=4), out / "phase1.pt")
    run = open_run("phase2", out, data)
    plumbing.models.earlier_tokenizer(run, ("phase1",))
    assert "random VGG" in run.note and "stage phase1 ended at step 4 of 6" in capsys.readouterr().err


@pytest.mark.parametrize("failure, message", [
    (torch.OutOfMemoryError("CUDA"), "smaller --micro-batch"),
    (OSError(28, "No space left on device"), "No space left")])
def test_what_goes_wrong_on_the_way_ends_with_one_line(data, tmp_path, capsys, failure, message):
    with pytest.raises(SystemExit) as stop, plumbing.processes.one_line_errors():
        with open_run("ar", tmp_path, data).session():
            raise failure
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert error.startswith("error: ") and message in error


# The command --------------------------------------------------------------------------------------------


def test_every_file_of_torch_is_read_by_the_one_function_that_executes_nothing_and_asks_for_no_gpu():
    ours = [path for path in ROOT.rglob("*.py") if path.parts[len(ROOT.parts)] in
            (*(f"{name}.py" for name in SCRIPTS), "plumbing", "studies", "forks", "recipes")]
    lines = [line for path in ours for line in path.read_text().splitlines() if " torch.load(" in line]
    assert len(lines) == 1 and 'map_location="cpu", weights_only=True' in lines[0], lines


def test_any_number_of_processes_shares_out_the_same_stream(monkeypatch):
    for processes, share, step in ((1, 6, 0), (2, 3, 7), (3, 2, 1), (6, 1, 40)):
        monkeypatch.setattr(plumbing.processes, "world", lambda count=processes: count)
        batch, positions = share * processes, []
        for rank in range(processes):
            monkeypatch.setattr(plumbing.processes, "rank", lambda number=rank: number)
            positions += range(step * batch, (step + 1) * batch)[plumbing.processes.my_rows(batch)]
        assert positions == [*range(step * batch, (step + 1) * batch)]


# Several processes ----------------------------------------------------------------------------------------


def start_processes(count, function, *arguments):
    """`count` forked processes in one gloo group; returns their numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def child(number):
        os.environ.update(RANK=str(number), WORLD_SIZE=str(count), LOCAL_RANK=str(number),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        function(*arguments)

    return [fork(child, number) for number in range(count)]


def run_processes(count, function, *arguments):
    """Their exit codes."""
    return [wait_for(child, 120) for child in start_processes(count, function, *arguments)]


GAN = dict(phase1__adv_start=0.0, phase1__batch=48, phase1__steps=4)


def killed_and_resumed(trained, data, folder, count, warm_up):
    """Names of all that differs between an unbroken run and one that was killed at step 3 of 4."""

    def child(name, dies=False):
        plumbing.parallel.WARM_UP = warm_up
        if dies:
            at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        call("phase1", folder / name, data, **GAN)

    for name in ("straight", "broken"):
        earlier(trained, folder / name, "phase1")
    assert run_processes(count, child, "straight") == [0] * count
    assert 0 not in run_processes(count, child, "broken", True)
    assert run_processes(count, child, "broken") == [0] * count
    a, b = (read_checkpoint(folder / name / "phase1.pt", ["phase1"]) for name in ("straight", "broken"))
    assert a["step"] == b["step"] == 4 and a["world"] == count
    return differing(a, b)


@pytest.mark.dist
@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_processes_killed_and_started_again_end_as_unbroken_ones(trained, data, tmp_path, count):
    assert killed_and_resumed(trained, data, tmp_path, count, plumbing.parallel.WARM_UP) == []


@pytest.mark.dist
def test_without_the_warm_up_of_ddp_three_processes_would_not(trained, data, tmp_path):
    """The negative test: the one above sees what it is for."""
    assert killed_and_resumed(trained, data, tmp_path, 3, 0) != []


@pytest.mark.dist
def test_a_gradient_that_is_not_finite_in_one_process_skips_the_update_in_all(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "ar")

    def child():
        not_finite_at(pytest.MonkeyPatch(), "top1", {3}, places=("1",))
        call("ar", out, data)

    assert run_processes(2, child) == [0, 0]  # equal weights were found at every save
    ckpt = read_checkpoint(out / "ar.pt", ["ar"])
    assert list(ckpt["skips"]["prior"]) == [0, 1] and plumbing.hashes.not_finite(ckpt) == ""


@pytest.mark.dist
def test_a_signal_to_one_process_saves_and_stops_all_at_the_same_step(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "nar")

    def child():
        at_step(10, lambda: nap(out, 0.5))
        call("nar", out, data, "--save-every", 1000, nar__steps=60)

    children = start_processes(2, child)
    wait_until((out / "napping").exists)
    os.kill(children[1], signal.SIGTERM)
    assert [wait_for(number) for number in children] == [143, 143]
    assert read_checkpoint(out / "nar.pt", ["nar"])["step"] == 10


@pytest.mark.dist
def test_codes_are_shared_out_and_another_number_of_processes_goes_on(trained, data, tmp_path, capfd):
    """Two processes make the codes and train to step 4; one goes on, with nearly the same losses."""
    out = earlier(trained, tmp_path / "out", "ar")
    (out / "codes.pt").unlink()
    more = dict(prior__dropout=0.0)
    assert run_processes(2, lambda: call("ar", out, data, "--steps", 4, **more)) == [0, 0]
    made, expected = (torch.load(folder / "codes.pt", weights_only=True) for folder in (out, trained))
    assert differing(made, expected) == []
    straight = earlier(trained, tmp_path / "straight", "ar")
    call("ar", straight, data, "--steps", 4, **more)
    call("ar", straight, data, **more)
    capfd.readouterr()
    call("ar", out, data, **more)
    assert "2 processes wrote" in capfd.readouterr().out
    a, b = ([row["loss"] for row in rows(folder) if "lr" in row] for folder in (straight, out))
    assert len(a) == STEPS and a == pytest.approx(b, rel=1e-4)


@pytest.mark.dist
def test_one_refusal_ends_all_processes_with_one_line(trained, data, tmp_path, capfd):
    out = earlier(trained, tmp_path / "out", "ar")
    (out / "ar.pt").write_text("rubbish")
    assert run_processes(3, lambda: call("ar", out, data, ar__batch=9)) == [2, 2, 2]
    assert capfd.readouterr().err.count("error: ") == 1


# torchrun -------------------------------------------------------------------------------------------------

DRIVER = """
import json, os, signal, sys, time
import train
from plumbing.processes import rank
from recipes.options import train_args

fault, words = json.loads(sys.argv[1]), json.loads(sys.argv[2])
real = train.Run.due
def due(run, what, stage, step):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if what == "log" and [step + 1, rank()] == fault["at"] and first:
        print("FAULT", flush=True)
        if fault["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault["kind"] == "raise":
            raise RuntimeError("a test")
        time.sleep(fault["seconds"])
    return real(run, what, stage, step)
train.Run.due = due
train.main(*train_args(words))
"""


def torchrun(folder, fault, words, *flags):
    """A started torchrun of two processes in which a fault happens; its output goes to folder/log."""
    (folder / "driver.py").write_text(DRIVER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [*launch, folder / "driver.py", json.dumps(fault), json.dumps(words)], env=env,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.fixture(scope="module")
def two_straight(trained, data, tmp_path_factory):
    """An unbroken run of two processes, to compare with."""
    out = earlier(trained, tmp_path_factory.mktemp("straight") / "out", "phase1")
    assert run_processes(2, call, "phase1", out, data) == [0, 0]
    return out


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["kill", "raise"])
def test_torchrun_restarts_a_run_in_place_and_it_ends_as_an_unbroken_one(
    trained, data, two_straight, tmp_path, kind
):
    out = earlier(trained, tmp_path / "out", "phase1")
    job = torchrun(tmp_path, dict(kind=kind, at=[3, 1]), command("phase1", out, data), "--max-restarts=2")
    assert job.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    assert "FAULT" in (tmp_path / "log").read_text()
    check_equal(two_straight, out, "phase1")


@pytest.mark.dist
def test_a_hung_process_is_given_up_after_the_timeout_and_nobody_stays(trained, data, tmp_path):
    out = earlier(trained, tmp_path / "out", "phase1")
    fault = dict(kind="hang", at=[3, 1], seconds=600)
    job = torchrun(tmp_path, fault, command("phase1", out, data, "--timeout", 20))
    assert job.wait(240) != 0
    log = (tmp_path / "log").read_text()
    assert "phase1 step 3: another process died or hangs" in log
    wait_until(lambda: not alive(word=out))
    call("phase1", out, data)
    assert read_checkpoint(out / "phase1.pt", ["phase1"])["step"] == STEPS


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_whose_launcher_is_killed_save_and_end(trained, data, two_straight, tmp_path, number):
    out = earlier(trained, tmp_path / "out", "phase1")
    job = torchrun(tmp_path, dict(kind="sleep", at=[3, 0], seconds=3), command("phase1", out, data))
    wait_until(lambda: "FAULT" in (tmp_path / "log").read_text(), 240)
    job.send_signal(number)
    assert job.wait(240) != 0
    wait_until(lambda: not alive(word=out))
    assert read_checkpoint(out / "phase1.pt", ["phase1"])["step"] == 3
    assert run_processes(2, call, "phase1", out, data) == [0, 0]
    check_equal(two_straight, out, "phase1")


@pytest.mark.dist
def test_another_folder_another_locale_and_another_clock_change_nothing(trained, data, tmp_path):
    out = tmp_path / "a run with spaces, ümläut"
    earlier(trained, out, "phase1")
    env = dict(os.environ, OMP_NUM_THREADS="1", LC_ALL="C", TZ="Asia/Kathmandu")
    done = subprocess.run([sys.executable, ROOT / "train.py", *command("phase1", out, data)], cwd=tmp_path,
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_equal(trained, out, "phase1")
