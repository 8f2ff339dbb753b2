"""Claims about commands whose output cannot be written, and about what stands in the environment: real
processes, as descriptors, pipes and PATH are theirs.

A shell starts them, so that `| head`, `>/dev/full` and `>&-` are those that users write.
"""

import os
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, call, command, differing, earlier, few, rows

from plumbing.files import read_checkpoint
from plumbing.hashes import latent_hash
from plumbing.models import load_model

ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
ENV.pop("PYTHONUNBUFFERED", None)  # buffers as users have them: what is left is flushed at the end
PYTHON = sys.executable


def shell(line, **env):
    """bash with the exit code of the first command of a pipe"""
    return subprocess.run(
        ["/bin/bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env={**ENV, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", ["| head -3", ">/dev/full 2>&1"])
def test_a_run_whose_output_cannot_be_written_trains_to_its_end(trained, data, tmp_path, end):
    out = earlier(trained, tmp_path / "out", "nar")
    done = shell(shlex.join([PYTHON, "train.py", *command("nar", out, data)]) + f" {end}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "Errno" not in done.stdout + done.stderr
    ours, unbroken = (read_checkpoint(folder / "nar.pt", ["nar"]) for folder in (out, trained))
    assert not differing(ours["model"], unbroken["model"]) and not differing(ours["train"], unbroken["train"])
    assert rows(out, "nar") == rows(trained, "nar")


@pytest.mark.parametrize("words, end", few([
    ("train.py --help", ">/dev/full"), ("train.py --help", "| head -1"), ("sample.py --help", ">&- 2>&-"),
    ("train.py --explain --preset demo --set prior.n_layer=1", "| head -1")], 0))
def test_short_commands_end_quietly(words, end):
    done = shell(f"{PYTHON} {words} {end}")
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_what_an_encoding_lacks_is_printed_with_escapes():
    code = r"from plumbing.console import steady_process; steady_process(); print('caf\udce9 \u2192')"
    done = shell(shlex.join([PYTHON, "-c", code]), PYTHONIOENCODING="latin-1")
    assert done.stdout == "caf\\udce9 \\u2192\n" and not done.stderr


@pytest.mark.slow
def test_compile_without_a_compiler_is_refused_in_one_line_before_anything_is_made(data, tmp_path):
    words = command("phase1", tmp_path / "out", data, "--compile", "--vgg", "random")
    done = shell(shlex.join([PYTHON, "train.py", *words]), PATH="/usr/bin/nowhere", CXX="",
                 TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    refused = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and len(refused) == 1, done.stderr
    assert refused[0].startswith("error: --compile does not work here: ") and "compiler" in refused[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_stages_after_phase_1_build_on_it_and_not_on_the_tokenizer_it_started_from(trained, data, tmp_path):
    """As preset lsun-cat runs: --stage all --tokenizer FILE (Table 9: from an ImageNet phase 1)."""
    out = earlier(trained, tmp_path / "out", "phase1")
    given = tmp_path / "given.pt"
    given.write_bytes((trained / "phase1.pt").read_bytes())
    call("all", out, data, "--tokenizer", given)
    hashes = {path.stem: latent_hash(load_model(path, ("phase1", "phase2"))[0])
              for path in (given, out / "phase1.pt", out / "phase2.pt")}
    assert hashes["given"] != hashes["phase1"] == hashes["phase2"]
    assert read_checkpoint(out / "ar.pt", ["ar"])["tokenizer_hash"] == hashes["phase1"]
