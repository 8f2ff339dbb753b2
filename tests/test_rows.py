"""Claims about the runner of rows: its order, what it waits for, what it leaves out, how it stops."""

import json
import os
import signal
import time

import pytest
import studies.rows
from helpers import fork, wait_for, wait_until
from plumbing.errors import UserError

SCRIPT = """
import os, sys, time
_, word, out, *more = sys.argv
with open(os.path.join(os.path.dirname(out), "order"), "a") as file:
    print("begin", os.path.basename(out), file=file)
if "fail" in more:
    print("many lines", file=sys.stderr)
    sys.exit("error: out of luck")
if "slow" in more:
    try:
        open(out + ".at_work", "w").close()
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)
        open(out + ".saved", "w").close()
        sys.exit(130)
if "pause" in more:
    time.sleep(2)
with open(out, "w") as file:
    print(os.environ.get("OMP_NUM_THREADS"), file=file)
with open(os.path.join(os.path.dirname(out), "order"), "a") as file:
    print("end", os.path.basename(out), file=file)
"""


@pytest.fixture
def command(tmp_path):
    """(name, *words) -> (file that it makes, words of a command that writes it)"""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def made(name, *words):
        out = tmp_path / "out" / name
        return out, [str(script), "compare", str(out), *map(str, words)]

    return made


@pytest.fixture(autouse=True)
def plain_files(monkeypatch):
    """The files of this script are finished once they are there."""
    monkeypatch.setattr(studies.rows, "finished", lambda path, words: path.exists())


def order(tmp_path):
    return (tmp_path / "out" / "order").read_text().split("\n")[:-1]


def test_rows_are_made_in_their_order_and_a_shared_file_once(command, tmp_path):
    rows = [("one", [command("a"), command("b")]), ("two", [command("a"), command("c")])]
    done = []
    assert studies.rows.run(rows, after=done.append) == [] and done == ["one", "two"]
    assert order(tmp_path) == ["begin a", "end a", "begin b", "end b", "begin c", "end c"]
    (tmp_path / "out" / "c").unlink()
    done.clear()
    assert studies.rows.run(rows, after=done.append) == [] and done == ["one", "two"]
    assert order(tmp_path)[6:] == ["begin c", "end c"]


def test_workers_run_rows_side_by_side_with_one_thread_each_and_wait_for_what_a_row_builds_on(
        command, tmp_path):
    first = command("base")
    rows = [("base", [first, command("later", "pause")]), ("other", [command("x")]),
            ("built", [command("y", "--ckpt", first[0])])]
    assert studies.rows.run(rows, workers=3, threads=1) == []
    lines = order(tmp_path)
    assert lines.index("end base") < lines.index("begin y") < lines.index("end later") and len(lines) == 8
    assert lines.index("begin x") < lines.index("begin y")
    assert (tmp_path / "out" / "x").read_text() == "1\n"


def test_a_row_that_fails_is_reported_and_the_others_go_on(command, tmp_path, capsys):
    done = []
    rows = [("bad", [command("a", "fail"), command("b")]), ("good", [command("c")])]
    (failed,) = studies.rows.run(rows, after=done.append)
    assert failed == "bad: a was not made, its command ended with 1: out of luck" and done == ["good"]
    assert not (tmp_path / "out" / "b").exists() and (tmp_path / "out" / "c").exists()
    out = capsys.readouterr().out
    assert "; the next row goes on" in out and f"\nfailed: {failed}" in out and "2 of 3" not in out
    assert "many lines\nerror: out of luck" in (tmp_path / "out" / "log.txt").read_text()


def test_a_row_whose_base_failed_is_tried_and_reported_too(command):
    rows = [("bad", [command("a", "fail")]), ("built", [command("b", "fail", command("a")[0])])]
    assert [line.split(":")[0] for line in studies.rows.run(rows, workers=2)] == ["bad", "built"]


def test_a_row_whose_end_is_refused_is_reported_and_the_others_go_on(command):
    def after(label):
        if label == "bad":
            raise UserError("two lines of bad")

    (failed,) = studies.rows.run([("bad", [command("a")]), ("good", [command("b")])], after=after)
    assert failed == "bad: two lines of bad" and command("b")[0].exists()


def test_ctrl_c_lets_the_commands_save_and_end(command, tmp_path):
    def main():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        rows = [("one", [command("a", "slow")]), ("two", [command("b", "slow")]), ("three", [command("c")])]
        try:
            studies.rows.run(rows, workers=2)
        except UserError as error:
            saved = sorted(path.name for path in (tmp_path / "out").glob("*.saved"))
            (tmp_path / "told").write_text(json.dumps([error.code, str(error), saved]))

    child = fork(main)
    wait_until(lambda: len(list((tmp_path / "out").glob("*.at_work"))) == 2)
    time.sleep(0.1)
    os.killpg(child, signal.SIGINT)
    assert wait_for(child) == 0
    code, error, saved = json.loads((tmp_path / "told").read_text())
    assert code == 130 and "goes on from there" in error and saved == ["a.saved", "b.saved"]
    assert not (tmp_path / "out" / "c").exists()
