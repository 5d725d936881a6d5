"""What holds for every test: the same random numbers each time, and who runs it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.fixture(autouse=True)
def seeded():
    """A test that draws without a seed of its own still sees the same weights on every run."""
    import torch

    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own
def pytest_collection_modifyitems(items):
    """Let one process do the real runs, the longest work, first; files stay whole in the others."""
    real = ROOT / "workflow"
    items.sort(key=lambda item: real not in item.path.parents)
    for item in items:
        name = "workflow" if real in item.path.parents else str(item.path.relative_to(ROOT))
        item.add_marker(pytest.mark.xdist_group(name))
