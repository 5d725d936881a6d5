"""Columns against their definition, token by token."""

import numpy as np
import pytest

from headroom.branches.layout import Batch, columns
from headroom.branches.texts import Texts


def store(lengths, seed=0):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(seed).integers(0, 6400, starts[-1]).astype(np.uint16)
    return Texts(tokens, starts, np.arange(len(lengths)))


def ragged(draw, texts, most_samples=5, most_branches=6):
    """Samples of random sizes; texts may recur, the store's last one among them."""
    lengths = texts.lengths
    samples = [
        draw.integers(len(lengths), size=draw.integers(1, most_branches + 1)).tolist()
        for _ in range(draw.integers(1, most_samples + 1))
    ]
    samples[0][0] = len(lengths) - 1
    offsets = [draw.integers(lengths[sample] + 1).tolist() for sample in samples]
    return samples, offsets


def reference(texts, samples, offsets):
    """Sort what each branch holds by (time, branch), then pad."""
    rows = []
    for sample, begun in zip(samples, offsets, strict=True):
        row = []
        for branch, (text, offset) in enumerate(zip(sample, begun, strict=True)):
            ids = texts.tokens[texts.starts[text] : texts.starts[text + 1]].tolist()
            for place, (token, label) in enumerate(zip(ids, [*ids[1:], -100], strict=True)):
                row.append((offset + place, branch, token, label, text))
        rows.append(sorted(row))
    longest = max(map(len, rows))
    filled = np.array([row + [(0, 0, 0, -100, -1)] * (longest - len(row)) for row in rows])
    time, branch, tokens, labels, text = np.moveaxis(filled, 2, 0)
    valid = np.array([[i < len(row) for i in range(longest)] for row in rows])
    flat = np.array([range(longest)] * len(rows))
    return Batch(tokens, labels, flat, time, branch, valid, text)


@pytest.mark.parametrize("seed", range(12))
def test_columns_equal_a_sort_of_all_tokens(seed):
    draw = np.random.default_rng(seed)
    texts = store(draw.integers(2, 14, 9), seed)
    chosen = ragged(draw, texts)
    found, expected = columns(texts, *chosen), reference(texts, *chosen)
    for name, array in found._asdict().items():
        assert array.dtype == (bool if name == "valid_BS" else np.int64)
        np.testing.assert_array_equal(array, getattr(expected, name), err_msg=name)


def test_labels_are_the_same_branchs_next_token_and_nothing_is_lost():
    draw = np.random.default_rng(5)
    texts = store(draw.integers(2, 40, 60))
    samples, offsets = ragged(draw, texts, 8, 16)
    batch = columns(texts, samples, offsets)
    for row, sample in enumerate(samples):
        for branch, text in enumerate(sample):
            own = batch.valid_BS[row] & (batch.branch_BS[row] == branch)
            ids = texts.tokens[texts.starts[text] : texts.starts[text + 1]].tolist()
            assert batch.tokens_BS[row, own].tolist() == ids
            assert batch.labels_BS[row, own].tolist() == [*ids[1:], -100]
            assert set(batch.text_BS[row, own].tolist()) == {text}
    lengths = texts.lengths[[text for sample in samples for text in sample]]
    assert (batch.labels_BS >= 0).sum() == (lengths - 1).sum()
    assert batch.valid_BS.sum() == lengths.sum()


def test_one_branch_is_the_text_itself_and_far_offsets_change_the_time_alone():
    texts = store([7])
    near, far = (columns(texts, [[0]], [[offset]]) for offset in (0, 3000))
    np.testing.assert_array_equal(near.tokens_BS[0], texts.tokens)
    np.testing.assert_array_equal(near.time_BS, near.flat_BS)
    np.testing.assert_array_equal(far.time_BS, near.time_BS + 3000)
    for name in set(Batch._fields) - {"time_BS"}:
        np.testing.assert_array_equal(getattr(far, name), getattr(near, name))
