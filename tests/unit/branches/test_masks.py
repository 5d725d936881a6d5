"""Who sees whom, against the definition, position by position."""

import numpy as np
import pytest
import torch

from headroom.branches.layout import columns
from headroom.branches.masks import rule, visible

from .test_layout import ragged, store


@pytest.mark.parametrize("mask", ["columns", "isolated"])
def test_visible_is_its_definition(mask):
    draw = np.random.default_rng(2)
    texts = store(draw.integers(2, 9, 12))
    batch = columns(texts, *ragged(draw, texts, 4, 5))
    assert not batch.valid_BS.all()
    tensors = (batch.time_BS, batch.branch_BS, batch.valid_BS)
    found = visible(*map(torch.from_numpy, tensors), mask)
    sees = rule(*map(torch.from_numpy, tensors), mask)
    rows, places = batch.time_BS.shape
    assert found.shape == (rows, places, places) and found.dtype == torch.bool
    for row in range(rows):
        time, branch, valid = (array[row] for array in tensors)
        for i in range(places):
            for j in range(places):
                seen = valid[i] and valid[j] and time[j] < time[i]
                seen = seen and (mask == "columns" or branch[i] == branch[j])
                assert found[row, i, j] == (seen or i == j) == sees(row, None, i, j)
