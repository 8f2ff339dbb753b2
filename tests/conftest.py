"""Shared by all tests: one thread (tiny matrices gain nothing from more), and one tiny run of every stage."""

import os
import signal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are for a CPU, and some of them fork

import pytest
import torch
from helpers import call, end_children, write_pictures

import plumbing.validation


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def short_sheets():
    plumbing.validation.ROWS, before = 1, plumbing.validation.ROWS  # of samples, instead of ten
    yield
    plumbing.validation.ROWS = before


@pytest.fixture(autouse=True, scope="session")
def hangups_are_heard():
    """Also where these tests run under nohup, whose children ignore SIGHUP, as runs are meant to."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def no_child_stays():
    yield
    end_children()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def flat(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("flat"), flat=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """A run folder as --stage all leaves it."""
    out = tmp_path_factory.mktemp("trained")
    call("all", out, data)
    return out
