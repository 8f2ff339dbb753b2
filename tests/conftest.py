"""Shared by all tests: one thread. Tiny matrices gain nothing from more, and lose much on busy cores."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
