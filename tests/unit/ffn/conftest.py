"""Tiny models are fastest on one thread."""

import pytest


@pytest.fixture(autouse=True)
def threads(one_thread):
    """Ask for it in every test here."""
