"""Every bug of docs/bugs.md is a patch in tests/bugs/, and the test that its patch names fails under it.

A patch has a sentence, the line `test: FILE::NAME`, and at most five lines that differ. `pytest -m bugs`
applies each to a copy of this tree and runs its test there.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "tests/bugs").glob("*.patch"))
CATCHES = {path.stem: re.search(r"^test: (\S+)$", path.read_text(), re.M)[1] for path in PATCHES}
RUNNER = """
import os, sys
import torch, torch._dynamo, torchvision.models, pytest  # here once, not in every child
for test in sys.stdin:
    child = os.fork()
    if not child:
        sys.stdin.close()
        os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        words = ["-p", "no:cacheprovider", "--basetemp", "pytest", "--tb", "line", "-rfE", "-x", "-m", ""]
        os._exit(pytest.main([*words, test.strip()]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def copy_tree(folder):
    """A copy of this tree, without what git ignores. returns: its folder"""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def patch(folder, name, *options):
    """`git apply` in a folder; where it is no repository too. returns: the process, not checked"""
    words = ["git", "apply", *options, ROOT / "tests/bugs" / f"{name}.patch"]
    outside = os.environ | dict(GIT_CEILING_DIRECTORIES=str(folder.parent))
    return subprocess.run(words, cwd=folder, env=outside, capture_output=True, text=True)


def verdict(code, output, test):
    """What a bug's test did: "caught", if its own assertion failed, else the end of the output."""
    failed = rf"^FAILED {re.escape(test)}(\[.*\])? - (assert|AssertionError|Failed: DID NOT RAISE)"
    caught = code == 1 and re.search(failed, output, re.M)
    return "caught" if caught else f"exit code {code}\n{output[-2000:]}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of this tree, and a function that runs one test in it: one pytest process a test."""
    folder = copy_tree(tmp_path_factory.mktemp("bugs") / "copy")
    alone = os.environ | dict(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", COLUMNS="2000")
    runner = subprocess.Popen([sys.executable, "-c", RUNNER], cwd=folder, env=alone, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(test):
        print(test, file=runner.stdin, flush=True)
        return verdict(int(runner.stdout.readline()), (folder / "output.txt").read_text(), test)

    yield folder, run
    runner.stdin.close()
    runner.wait()


def test_every_patch_applies_changes_at_most_five_lines_and_names_a_test_that_exists():
    wrong = []
    for name, test in CATCHES.items():
        lines = (ROOT / "tests/bugs" / f"{name}.patch").read_text().splitlines()
        changed = [sum(bool(re.match(rf"{re.escape(sign)}(?!{re.escape(sign * 2)})", x)) for x in lines)
                   for sign in "+-"]
        file, function = test.split("::")
        if patch(ROOT, name, "--check").returncode or max(changed) > 5:
            wrong.append(f"{name}: does not apply, or changes {changed} lines")
        if f"def {function}(" not in (ROOT / file).read_text():
            wrong.append(f"{name}: there is no {test}")
    assert not wrong, wrong
    assert len(CATCHES) >= 20


def test_the_page_of_bugs_names_every_patch_and_the_test_that_catches_it():
    text = (ROOT / "docs/bugs.md").read_text()
    rows = dict(re.findall(r"^\| \[`(\w+)`\].*`(\w+)` *\|$", text, re.M))
    assert rows == {name: test.split("::")[1] for name, test in CATCHES.items()}


def test_only_an_assertion_of_the_named_test_counts_as_caught():
    test = "tests/test_x.py::test_y"
    assert verdict(1, f"FAILED {test}[1-a] - assert 1 == 2\n", test) == "caught"
    assert verdict(1, f"FAILED {test} - AssertionError: Tensor-likes are not close!\n", test) == "caught"
    for code, output in [
            (0, "1 passed"), (2, f"ERROR {test} - NameError"), (1, f"ERROR {test} - assert 1 == 2"),
            (1, f"FAILED {test}_too - assert 1 == 2"), (1, f"FAILED {test} - RuntimeError: shapes"),
            (4, "no such test"), (-11, "")]:
        assert verdict(code, output, test) != "caught", output


@pytest.mark.bugs
@pytest.mark.parametrize("name", CATCHES)
def test_the_named_test_catches_the_bug(copy, name):
    folder, run = copy
    applied = patch(folder, name)
    assert applied.returncode == 0, applied.stderr
    try:
        assert run(CATCHES[name]) == "caught"
    finally:
        patch(folder, name, "--reverse")
