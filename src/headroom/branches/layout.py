"""Texts side by side: the columns of a sample, sorted by (time, branch).

B samples of a batch, S positions of the longest; branches of a sample count from 0 in its order.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from headroom.branches.texts import Texts

IGNORED = -100  # label that the loss leaves out


class Batch(NamedTuple):
    """Samples padded at the end; all (B, S), int64 but for ``valid_BS``, which is bool.

    A pad has token, time and branch 0, label -100, text -1; ``flat_BS`` goes on.
    """

    tokens_BS: np.ndarray
    labels_BS: np.ndarray  # the same branch's next token; -100 at its last
    flat_BS: np.ndarray  # place in the sequence
    time_BS: np.ndarray  # offset of the text + place in it
    branch_BS: np.ndarray
    valid_BS: np.ndarray
    text_BS: np.ndarray  # which of the store's texts


def columns(
    texts: Texts, samples: Sequence[Sequence[int]], offsets: Sequence[Sequence[int]]
) -> Batch:
    """Lay the texts of each sample side by side, token t of a text at time offset + t.

    A counting sort: each token marks its cell (sample, time, branch), and the marked cells in
    their order are the tokens in theirs. Cost: O(tokens + Σ samples · last time · branches).

    Args:
        texts: the store.
        samples: the texts of each sample, in the order of its branches; at least one each.
        offsets: the time at which each of them begins, not negative.
    """
    count = len(samples)
    branches_B = np.fromiter(map(len, samples), np.int64, count)
    total = int(branches_B.sum())  # M texts in all
    text_M = np.fromiter(chain.from_iterable(samples), np.int64, total)
    offset_M = np.fromiter(chain.from_iterable(offsets), np.int64, total)
    start_M = texts.starts[text_M]
    length_M = texts.starts[text_M + 1] - start_M
    end_M = offset_M + length_M
    first_B = np.cumsum(branches_B) - branches_B
    size_B = np.add.reduceat(length_M, first_B)  # tokens
    most, times = int(branches_B.max()), int(end_M.max())

    row_T, branch_T = _sorted(branches_B, first_B, offset_M, length_M, (times, most))
    time_T = row_T - np.repeat(np.arange(count) * times, size_B)
    member_T = branch_T + np.repeat(first_B, size_B)  # which of the M texts
    source_T = (start_M - offset_M)[member_T] + time_T
    tokens_T = texts.tokens[source_T]
    # The store's last token has no next one, and is the last of its text.
    labels_T = texts.tokens.take(source_T + 1, mode="clip").astype(np.int64)
    labels_T[time_T + 1 == end_M[member_T]] = IGNORED

    place_S = np.arange(int(size_B.max()))
    valid_BS = place_S < size_B[:, None]
    return Batch(
        tokens_BS=_padded(tokens_T, valid_BS, 0),
        labels_BS=_padded(labels_T, valid_BS, IGNORED),
        flat_BS=np.tile(place_S, (count, 1)),
        time_BS=_padded(time_T, valid_BS, 0),
        branch_BS=_padded(branch_T, valid_BS, 0),
        valid_BS=valid_BS,
        text_BS=_padded(text_M[member_T], valid_BS, -1),
    )


def _sorted(
    branches_B: np.ndarray,
    first_B: np.ndarray,
    offset_M: np.ndarray,
    length_M: np.ndarray,
    shape: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return sample · times + time and branch of all tokens, sorted by (sample, time, branch).

    Args:
        shape: times and branches of the table that every sample gets.
    """
    times, most = shape
    sample_M = np.repeat(np.arange(len(branches_B)), branches_B)
    branch_M = np.arange(len(length_M)) - first_B[sample_M]
    before_M = np.cumsum(length_M) - length_M
    cell_M = sample_M * (times * most) + most * (offset_M - before_M) + branch_M
    cell_T = np.repeat(cell_M, length_M) + np.arange(0, most * int(length_M.sum()), most)
    marked = np.zeros(len(branches_B) * times * most, dtype=bool)
    marked[cell_T] = True
    cell_T = np.flatnonzero(marked)
    row_T = cell_T // most
    return row_T, cell_T - row_T * most


def _padded(values_T: np.ndarray, valid_BS: np.ndarray, pad: int) -> np.ndarray:
    values_BS = np.full(valid_BS.shape, pad, dtype=np.int64)
    values_BS[valid_BS] = values_T
    return values_BS
