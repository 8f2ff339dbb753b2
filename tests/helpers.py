"""What several test files share: a tiny run of every stage, and comparisons of what it leaves.

60 pictures of ten classes, six steps a stage, 16 tokens an image, a checkpoint every second step.
"""

import contextlib
import json
import os
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch._dynamo  # as optimizers do: here once, not in every child of `script`
from PIL import Image

import forks
import plumbing.run
import recipes.options
import studies.commands
import train
from plumbing.shapes import Shapes

ROOT = Path(__file__).parent.parent
SCRIPTS = ["tokenizer", "perceptual", "prior_ar", "prior_nar", "sample", "visualize", "train"]
STEPS = 6
TINY = {
    "tokenizer.base_width": 8, "tokenizer.channel_mult": [1, 1, 2, 2], "tokenizer.codebook_size": 32,
    "tokenizer.num_res_blocks": 1,
    "tokenizer.codebook_dim": 8, "tokenizer.warm_start": 0, "discriminator.max_width": 8,
    "classifier.width": 4, "classifier.hidden": 16, "classifier.skip_pools": 1, "classifier.scale_taps": True,
    "prior.n_layer": 1, "prior.n_head": 2, "prior.n_embd": 32, "phase1.r1_every": 2,
    "phase2.r1_every": 2, "phase1.lr": 3e-4, "ar.lr_start": 2, "nar.lr_start": 2,
    "prior.dropout": 0.1, "sample.nar_steps": 4,
    **{f"{s}.ema": 0.5 for s in ("phase1", "phase2", "ar", "nar")},
    **{f"{s}.batch": 8 for s in ("classifier", "phase1", "phase2", "ar", "nar")},
    **{f"{s}.steps": STEPS for s in ("classifier", "phase1", "phase2", "ar", "nar")},
}


def write_pictures(folder, flat=False):
    """40x32 pictures: folder/train and folder/val with ten classes each, or all in one folder."""
    for split, count in (("train", 60), ("val", 20)):
        shapes = Shapes(split, count, 40)
        for i in range(count):
            pixels = shapes.pixels(i)[:, :32].permute(1, 2, 0).contiguous().numpy()
            path = folder / (f"{split}{i}.png" if flat else f"{split}/{Shapes.NAMES[i % 10]}/{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def command(stage, out, data, *more, **sets):
    """Words of a command line of the tiny run; `sets` are written with __ for the dot."""
    sets = {**TINY, **{key.replace("__", "."): value for key, value in sets.items()}}
    words = ["--stage", stage, "--data", str(data), "--out", str(out), "--precision", "fp32"]
    words += ["--device", "cpu", "--log-every", "1", "--eval-every", "100", "--save-every", "2"]
    words += map(str, more)
    return words + [word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def call(*words, **sets):
    train.main(*recipes.options.train_args(command(*words, **sets)))


def study(*words):
    """`python -m studies` in this process."""
    studies.commands.main(studies.commands.study_args(words))


def open_run(*words, **sets):
    return plumbing.run.Run(*recipes.options.train_args(command(*words, **sets)))


def few(cases, *quick):
    """Cases of a parameter, of which all but those at the places `quick` are marked slow."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if i in quick else pytest.mark.slow) for i, case in enumerate(cases)]


def save_from_gpu(thing, path, **how):
    """torch.save as on a machine with a GPU, which no machine without one reads as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(thing, path, **how)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path, weights_only=True)


class Bomb:
    """A pickle that, if executed, creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


BEFORE = dict(vgg=[], phase1=["vgg"], phase2=["vgg", "phase1"], ar=["phase1", "phase2", "codes"])
BEFORE["nar"] = BEFORE["ar"]


def earlier(trained, out, stage):
    """A run folder that holds what `stage` builds on."""
    out.mkdir(exist_ok=True)
    for name in BEFORE[stage]:
        shutil.copy(trained / f"{name}.pt", out)
    return out


def rows(out, stage=None):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in lines if stage in (None, row["stage"])]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in kept]


def differing(a, b, name=""):
    """Names of all entries in which two checkpoints differ, by one bit or more."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = [f"{name}.{key}" for key in a.keys() ^ b.keys()]
        return found + [x for key in a.keys() & b.keys() for x in differing(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [x for i, (u, v) in enumerate(zip(a, b, strict=True)) for x in differing(u, v, f"{name}.{i}")]
    same = torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b
    return [] if same or name == ".seconds" else [name]


def contents(*folders):
    """Bytes of all files but the lock, which names the process that came last."""
    files = [p for folder in folders for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"]
    return {path: path.read_bytes() for path in files}


def refused(capsys, function, *words, **sets):
    """The one line on stderr with which `function` ends the command, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*words, **sets)
    lines = capsys.readouterr().err.splitlines(keepends=True)
    error = "".join(line for line in lines if not line.startswith("Downloading: "))  # PyTorch 2.6 begins so
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def refusal(capsys, *words, **sets):
    return refused(capsys, call, *words, **sets)


CHILDREN = set()  # of the test that runs; conftest.py ends those that it leaves behind


def forked(function, *arguments, patience=60):
    """The exit code of a child process that calls `function`; minus the signal's number if one ended it."""
    return wait_for(fork(function, *arguments), patience)


def script(*words, path=None):
    """A script, or `-m studies`, with the folder `path` on PYTHONPATH: (exit code, stdout, stderr).

    The process is forked from this one, so that it need not import PyTorch again.
    """
    def run():
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.chdir(ROOT)
        sys.argv = [str(word) for word in words if word != "-m"]
        if path:
            forks.__path__.append(f"{path}/forks")
        if words[0] == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        files = out, error
        code = forked(run, patience=240)
        return code, *(file.seek(0) or file.read() for file in files)


def fork(function, *arguments):
    """The process number of a child of its own process group that calls `function`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        CHILDREN.add(child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        function(*arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child, patience=60):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            CHILDREN.discard(child)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise AssertionError(f"a child process did not end within {patience} s")


def end_children():
    """Kills the children, and their children, that a failed test left behind."""
    while CHILDREN:
        child = CHILDREN.pop()
        os.kill(child, 9)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, 9)


def wait_until(condition, patience=60):
    """Waits until `condition()` holds."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
