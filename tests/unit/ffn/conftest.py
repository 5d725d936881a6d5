"""Tiny models are fastest on one thread."""

import pytest


@pytest.fixture(autouse=True)
def one_thread():
    """Give torch one thread a test."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
