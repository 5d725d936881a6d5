"""Which texts a step reads: uniform branch counts, epochs, and seed and step alone."""

import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from scipy import stats

from headroom.branches.batches import Draws, micro_batch
from headroom.branches.judge import evaluation_packs
from headroom.errors import InputError

LENGTHS = np.random.default_rng(0).integers(2, 60, 500)


def draws(low=1, high=7, texts_a_step=16, seed=0, offsets=True, lengths=LENGTHS):
    return Draws(lengths, (low, high), texts_a_step, seed, offsets)


def sizes(drawn, steps):
    return [len(sample) for step in steps for sample in drawn.step(step)[0]]


@pytest.mark.parametrize("high", [3, 7, 15, 31])
def test_branch_counts_are_uniform(high):
    found = Counter(sizes(draws(high=high, texts_a_step=64), range(2000)))
    assert sorted(found) == list(range(1, high + 1))
    assert stats.chisquare(list(found.values())).pvalue > 1e-3


@pytest.mark.parametrize(("low", "high"), [(1, 1), (4, 4), (16, 16), (1, 31), (3, 5)])
def test_a_step_ends_with_the_sample_that_reaches_its_texts(low, high):
    drawn = draws(low, high)
    for step in (0, 1, 1023, 1024, 5000):
        samples, offsets = drawn.step(step)
        counts = [len(sample) for sample in samples]
        assert low <= min(counts) and max(counts) <= high
        assert sum(counts[:-1]) < 16 <= sum(counts)
        assert [len(begun) for begun in offsets] == counts


@pytest.mark.parametrize("texts", [500, 28])
def test_each_epoch_takes_each_text_once_in_a_new_order(texts):
    drawn = draws(lengths=LENGTHS[:texts])
    taken = list(chain.from_iterable(chain.from_iterable(drawn.step(n)[0] for n in range(200))))
    epochs = [taken[i : i + texts] for i in range(0, len(taken) - texts + 1, texts)]
    assert len(epochs) > 3
    assert all(sorted(epoch) == list(range(texts)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("seed", range(5))
def test_no_sample_meets_a_text_again(seed):
    drawn = draws(7, 7, seed=seed, lengths=LENGTHS[:30])
    samples = list(chain.from_iterable(drawn.step(n)[0] for n in range(300)))
    assert all(len(set(sample)) == len(sample) for sample in samples)


def test_too_few_texts_are_refused():
    with pytest.raises(InputError, match="at least 28 texts"):
        draws(lengths=LENGTHS[:27])


def test_a_step_depends_on_seed_and_number_alone():
    one, steps = draws(), [3, 0, 1100, 1100, 2, 5000, 4]
    found = [one.step(step) for step in steps]
    assert found == [draws().step(step) for step in steps]
    assert found[0] != draws(seed=1).step(3)


def test_of_one_seed_the_texts_come_in_one_order_whatever_the_branches():
    streams = []
    for low, high in ((1, 1), (4, 4), (1, 15)):
        drawn = draws(low, high)
        streams.append([text for n in range(60) for sample in drawn.step(n)[0] for text in sample])
    first = len(LENGTHS)  # later epochs differ at their borders
    assert streams[0][:first] == streams[1][:first] == streams[2][:first]


def test_offsets_are_uniform_up_to_the_length_and_change_with_the_step():
    drawn = draws(lengths=np.full(50, 4))
    found = Counter(chain.from_iterable(chain.from_iterable(drawn.step(n)[1] for n in range(500))))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert stats.chisquare(list(found.values())).pvalue > 1e-3
    ragged = draws()
    for n in range(20):
        for sample, begun in zip(*ragged.step(n), strict=True):
            assert all(0 <= o <= LENGTHS[text] for text, o in zip(sample, begun, strict=True))
    plain = draws(offsets=False)
    assert not any(chain.from_iterable(plain.step(0)[1]))
    assert plain.step(9)[0] == draws().step(9)[0]  # without offsets the same texts


def test_a_late_step_is_found_at_once():
    started = time.process_time()
    draws(1, 31, 64).step(30_000)
    assert time.process_time() - started < 0.5


def test_micro_batches_hold_about_as_many_texts():
    fixed = {n: micro_batch(8, n, n) for n in (1, 2, 4, 8, 16)}
    assert fixed == {1: 8, 2: 4, 4: 2, 8: 1, 16: 1}
    assert [micro_batch(8, 1, n) for n in (3, 7, 15, 31)] == [4, 2, 1, 1]


def test_evaluation_packs_are_full_and_hold_each_text_once():
    packs = evaluation_packs(96, 24)
    assert [len(pack) for pack in packs] == [24] * 4
    assert list(chain.from_iterable(packs)) == list(range(96))
    message = r"branches\.texts\.evaluation is 96, which leaves 1 texts over at 5 branches"
    with pytest.raises(InputError, match=message):
        evaluation_packs(96, 5)
