"""Intervals against closed forms, SciPy and their own coverage."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from headroom.errors import InputError
from headroom.statistics import (
    bootstrap_ratio,
    normal_quantile,
    paired_bootstrap_ratio_difference,
    seeded_loss_difference,
    wilson,
)


def sample(n, seed=0):
    """Documents of unequal lengths whose mean losses scatter about 2 nats a token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 200, n).astype(float)
    return tokens * rng.normal(2.0, 0.5, n), tokens


def test_point_estimate_is_weighted_by_tokens():
    interval = bootstrap_ratio(np.array([10.0, 1.0]), np.array([90.0, 10.0]), transform=np.exp)
    assert interval.value == pytest.approx(np.exp(0.11))
    assert interval.low <= interval.value <= interval.high


def test_interval_is_the_delta_method_for_many_documents():
    losses, tokens = sample(2000)
    ratio = losses.sum() / tokens.sum()
    error = np.sqrt(np.sum((losses - ratio * tokens) ** 2)) / tokens.sum()
    found = bootstrap_ratio(losses, tokens, resamples=4000, seed=3)
    for bound, sign in ((found.low, -1), (found.high, 1)):
        assert bound == pytest.approx(ratio + sign * 1.96 * error, abs=0.1 * error)
    narrower = bootstrap_ratio(losses, tokens, resamples=4000, seed=3, confidence=0.5)
    assert narrower.high - narrower.low == pytest.approx(2 * 0.6745 * error, rel=0.06)


def test_interval_equals_scipy_percentile_bootstrap():
    losses, tokens = sample(60)
    reference = scipy.stats.bootstrap(
        (losses, tokens),
        lambda a, b, axis: np.exp(a.sum(axis) / b.sum(axis)),
        paired=True,
        vectorized=True,
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = bootstrap_ratio(losses, tokens, resamples=20000, transform=np.exp)
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.02 * width)
    assert found.high == pytest.approx(reference.high, abs=0.02 * width)


def test_interval_covers_the_truth_as_often_as_it_says():
    hits, trials = 0, 300
    for seed in range(trials):
        losses, tokens = sample(80, seed=seed)
        low, high = bootstrap_ratio(losses, tokens, resamples=300, seed=seed, confidence=0.9)[1:]
        hits += low <= 2.0 <= high
    assert 0.83 < hits / trials < 0.95


def test_transform_moves_the_bounds_with_the_value():
    losses, tokens = sample(50)
    plain, raised = (bootstrap_ratio(losses, tokens, transform=f) for f in (None, np.exp))
    np.testing.assert_allclose(np.exp(plain), raised, rtol=1e-3)


def test_documents_without_tokens_and_scale_change_nothing():
    losses, tokens = sample(30)
    padded = bootstrap_ratio(np.append(losses, 0.0), np.append(tokens, 0.0))
    assert padded == bootstrap_ratio(losses, tokens)
    np.testing.assert_allclose(bootstrap_ratio(7 * losses, 7 * tokens), padded, rtol=1e-12)


def test_seed_decides():
    losses, tokens = sample(30)
    assert bootstrap_ratio(losses, tokens, seed=1) == bootstrap_ratio(losses, tokens, seed=1)
    assert bootstrap_ratio(losses, tokens, seed=1) != bootstrap_ratio(losses, tokens, seed=2)


def test_pairing_removes_what_documents_share():
    before, tokens = sample(100)
    after = before + 0.01 * tokens  # each token costs the same more
    change = paired_bootstrap_ratio_difference(before, after, tokens)
    np.testing.assert_allclose(change, 0.01, rtol=1e-9)
    alone = bootstrap_ratio(before, tokens)
    assert alone.high - alone.low > 0.05


def test_relative_change_is_the_ratio_of_both():
    before, tokens = sample(100)
    after = 1.25 * before
    relative = paired_bootstrap_ratio_difference(before, after, tokens, relative=True)
    np.testing.assert_allclose(relative, 0.25, rtol=1e-9)
    raised = paired_bootstrap_ratio_difference(
        before, before + 0.1 * tokens, tokens, transform=np.exp, relative=True
    )
    np.testing.assert_allclose(raised, np.exp(0.1) - 1, rtol=1e-9)


def test_a_change_relative_to_nothing_is_none_and_resamples_of_nothing_are_left_out():
    tokens, zero = np.ones(4), np.zeros(4)
    assert paired_bootstrap_ratio_difference(zero, tokens, tokens, relative=True) is None
    once = np.array([1.0, 0, 0, 0])  # in about 1 of 3 resamples the base is 0
    found = paired_bootstrap_ratio_difference(once, 3 * once, tokens, relative=True)
    np.testing.assert_allclose(found, 2.0)


def test_paired_difference_equals_the_delta_method():
    before, tokens = sample(2000)
    after = before + tokens * np.random.default_rng(5).normal(0.05, 0.1, 2000)
    found = paired_bootstrap_ratio_difference(before, after, tokens, resamples=4000)
    gain = after - before
    ratio = gain.sum() / tokens.sum()
    error = np.sqrt(np.sum((gain - ratio * tokens) ** 2)) / tokens.sum()
    assert found.value == pytest.approx(ratio)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def seeded(seeds=3, count=30, spread=0.02):
    """Losses of two systems: documents and calibration seeds both move the second."""
    before, tokens = sample(count)
    rng = np.random.default_rng(7)
    first = before + tokens * rng.normal(0, spread, (seeds, 1))
    gain = 0.1 + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.1, (seeds, count))
    return first, first + tokens * gain, tokens


def test_seeded_difference_equals_a_naive_loop():
    first, second, tokens = seeded()
    found = seeded_loss_difference(first, second, tokens, resamples=4000, seed=1)
    rng, means = np.random.default_rng(99), []
    for _ in range(4000):
        documents = rng.integers(0, len(tokens), len(tokens))
        total = tokens[documents].sum()
        drawn = [
            (second[s, documents].sum() - first[s, documents].sum()) / total
            for s in rng.integers(0, 3, 3)
        ]
        means.append(np.mean(drawn))
    low, high = np.quantile(means, [0.025, 0.975])
    exact = np.mean([(b - a).sum() / tokens.sum() for a, b in zip(first, second, strict=True)])
    assert found.value == pytest.approx(exact)
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


def test_seeded_difference_of_one_seed_is_the_paired_one():
    first, second, tokens = seeded(seeds=1)
    found = seeded_loss_difference(first, second, tokens, seed=4)
    paired = paired_bootstrap_ratio_difference(first[0], second[0], tokens, seed=4)
    np.testing.assert_allclose(found, paired, rtol=1e-9)


def test_seeded_difference_pairs_seeds_and_documents():
    first, _, tokens = seeded(spread=1.0)
    same = seeded_loss_difference(first, first + 0.01 * tokens, tokens)
    np.testing.assert_allclose(same, 0.01, rtol=1e-9)


def test_seeded_difference_swaps_sign_and_ignores_empty_documents():
    first, second, tokens = seeded()
    found = seeded_loss_difference(first, second, tokens)
    back = seeded_loss_difference(second, first, tokens)
    np.testing.assert_allclose(back, (-found.value, -found.high, -found.low), rtol=1e-9)
    padded = (np.pad(losses, ((0, 0), (0, 1))) for losses in (first, second))
    assert seeded_loss_difference(*padded, np.append(tokens, 0)) == found


def test_seeds_that_disagree_widen_the_interval():
    tokens = np.ones(50)
    first, shift = np.zeros((3, 50)), np.array([[-1.0], [0.0], [1.0]])
    value, low, high = seeded_loss_difference(first, first + shift, tokens, resamples=4000)
    assert value == pytest.approx(0)  # the 27 equally likely draws: P(mean of -1) = 1/27 > .025
    assert (low, high) == pytest.approx((-1, 1))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (988, 1000)])
def test_wilson_equals_scipy(k, n):
    reference = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson(k, n), (k / n, *reference), atol=1e-12)


def test_normal_quantile_equals_scipy():
    assert normal_quantile(0.95) == pytest.approx(scipy.stats.norm.ppf(0.975), abs=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_ratio(np.ones(1), np.ones(1)),
        lambda: bootstrap_ratio(np.ones(5), np.zeros(5)),
        lambda: bootstrap_ratio(np.ones(5), np.ones(5), confidence=95),
        lambda: bootstrap_ratio(np.ones(5), np.ones(5), resamples=0),
        lambda: seeded_loss_difference(np.ones((3, 1)), np.ones((3, 1)), np.ones(1)),
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
    ],
)
def test_impossible_wishes_are_refused(call):
    with pytest.raises(InputError):
        call()


def test_import_is_light():
    code = "import sys, headroom.statistics; print({'torch', 'scipy', 'pandas'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"
