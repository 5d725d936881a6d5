"""What holds for every test: the same random numbers each time, and who runs it."""

import pytest


@pytest.fixture(autouse=True)
def seeded():
    """A test that draws without a seed of its own still sees the same weights on every run."""
    import torch

    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Let one process do the real runs, which share their results; other files stay whole too."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = nodeid.split("::")[0]
            return "workflow" if name.startswith("tests/workflow/") else name

    return ByFile(config, log)
