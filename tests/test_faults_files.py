"""File systems that cannot do all, and streams that nobody reads (issue on faults): nothing is lost."""

import errno
import fcntl
import os
import resource
import stat
import sys

import pytest
import torch

import plumbing.files
import plumbing.processes
import plumbing.compiling
from plumbing.console import Steady
from plumbing.errors import UserError


def test_a_file_is_saved_where_folders_cannot_be_synced(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file if isinstance(file, int) else file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    plumbing.files.save_atomic(lambda p: p.write_text("kept"), tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "kept"


def test_a_file_that_cannot_be_synced_itself_is_still_an_error(tmp_path, monkeypatch):
    def fsync(file):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="could not be written"):
        plumbing.files.save_atomic(lambda p: p.write_text("new"), tmp_path / "a.txt")
    assert not (tmp_path / "a.txt").exists()


def test_without_locks_a_folder_is_taken_with_a_warning(tmp_path, monkeypatch, capsys):
    def lockf(*words):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    plumbing.files.claim(tmp_path / "run").close()
    assert capsys.readouterr().err.count("has no locks") == 1


@pytest.mark.parametrize("platform, mib", [("linux", 2048.0), ("darwin", 2.0)])
def test_peak_memory_knows_the_unit_of_the_platform(monkeypatch, platform, mib):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: type("R", (), dict(ru_maxrss=2 * 2**20)))
    assert plumbing.processes.peak_memory() == mib


@pytest.mark.parametrize("stream", [None, open(os.devnull)])
def test_a_stream_that_takes_nothing_costs_the_writer_nothing(stream):
    steady = Steady(stream)
    assert steady.write("line\n") == 5 and steady.flush() is None


def test_compile_without_a_compiler_is_one_line(monkeypatch):
    def broken(function):
        raise RuntimeError("first line\nerror: no compiler\nmany more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"^--compile does not work here: error: no compiler. Install"):
        plumbing.compiling.check_compiler(torch.device("cpu"))
