"""What holds for every test: the same random numbers each time, and who runs it."""

import pytest


@pytest.fixture(autouse=True)
def seeded():
    """A test that draws without a seed of its own still sees the same weights on every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Give torch one thread a test: tiny models are fastest on it, and bits hang on it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep files whole and begin with the long ones, so that no process works on alone."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "unit" in item.path.parts)
