"""What holds for every test: the same random numbers each time."""

import pytest


@pytest.fixture(autouse=True)
def seeded():
    """A test that draws without a seed of its own still sees the same weights on every run."""
    import torch

    torch.manual_seed(0)
