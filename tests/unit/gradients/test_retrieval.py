"""Retrieval: closed forms of ranks and intervals, chance, and a null that is calibrated."""

import math

import numpy as np
import pytest

from headroom.errors import InputError
from headroom.gradients.pairs import Pairs, from_dots, similarity
from headroom.gradients.retrieval import (
    best_of_all,
    nearest,
    nearest_by_layer,
    ranks,
    summaries,
    summary,
)

from .test_pairs import dots_of, ids


def pairs_of(query, original, truth=None):
    """Pairs of random gradients; query i is called like original truth[i]."""
    Q, N = len(query[0]), len(original[0])
    names = ids("s", max(Q, N))
    layers = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(len(query))]
    queries = [names[i] for i in (range(Q) if truth is None else truth)]
    return from_dots(dots_of(query, original, queries, names[:N], layers))


def test_ranks_in_closed_form():
    similarity_QC = np.array(
        [
            [0.9, 0.5, 0.1, 0.0],  # first
            [0.9, 0.5, 0.1, 0.0],  # third
            [0.5, 0.5, 0.1, 0.0],  # a tie of two at the top: (1 + 2) / 2
            [0.2, 0.2, 0.2, 0.2],  # all four: (1 + 2 + 3 + 4) / 4
            [0.9, 0.1, 0.1, 0.1],  # the last three: (2 + 3 + 4) / 3
            [0.9, 0.5, 0.1, 0.0],  # not there
        ]
    )
    found = ranks(similarity_QC, np.array([0, 2, 1, 3, 2, -1]))
    assert found.tolist() == [1, 3, 1.5, 2.5, 3, math.inf]
    assert nearest(similarity_QC).tolist() == [0, 0, -1, -1, 0, 0]
    got = summary(found, resamples=50)
    assert got["top1"] == 1 / 6 and got["recall5"] == 5 / 6 and got["n"] == 6
    assert got["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 1.5 + 1 / 2.5 + 1 / 3) / 6)
    assert got["mrr_low"] < got["mrr"] < got["mrr_high"]
    # Wilson for 1 of 6 by hand: z² = 3.8415, centre (1 + 1.9207)/9.8415, half-width
    # 1.96 √(5/36 · 6 + 0.9604) / 9.8415.
    half = 1.959964 * math.sqrt(5 / 6 + 3.841459 / 4) / 9.841459
    centre = (1 + 3.841459 / 2) / 9.841459
    assert got["top1_low"] == pytest.approx(centre - half, abs=1e-6)
    assert got["top1_high"] == pytest.approx(centre + half, abs=1e-6)
    with pytest.raises(InputError, match="no number"):
        ranks(np.array([[np.nan, 1.0]]), np.array([0]))
    with pytest.raises(InputError, match="at least 2 queries"):
        summary(found[:1])


def test_mid_ranks_are_the_mean_over_orders_of_the_ties():
    rng = np.random.default_rng(0)
    similarity_QC, truth_Q = rng.integers(0, 4, (300, 9)), rng.integers(0, 9, 300)
    noisy = similarity_QC + rng.uniform(-0.1, 0.1, (2000, 300, 9))
    broken = np.mean([ranks(one, truth_Q) for one in noisy], axis=0)
    np.testing.assert_allclose(ranks(similarity_QC, truth_Q), broken, atol=0.3)


def test_copies_are_found_and_shuffled_labels_are_chance():
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=(200, n)) for n in (30, 60, 90)]
    copies = pairs_of(gradients, gradients)
    for layers in (None, [0], [1], [2]):
        assert (ranks(similarity(copies, layers), copies.truth_Q) == 1).all()
    shuffled = pairs_of(gradients, gradients, rng.permutation(200))
    hits = [(ranks(similarity(shuffled, [i]), shuffled.truth_Q) <= 1).sum() for i in range(3)]
    assert max(hits) <= 6  # P(Poisson(1) > 6) < 1e-4
    assert ranks(similarity(shuffled), shuffled.truth_Q).mean() == pytest.approx(100.5, abs=15)
    doubled = [np.concatenate([g[:199], g[:1]]) for g in gradients]  # the last copies the first
    found = pairs_of(gradients, doubled)
    got = ranks(np.round(similarity(found), 12), found.truth_Q)
    assert got[0] == 1.5 and (got[1:199] == 1).all() and got[199] > 1


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    base = rng.integers(1, 4, 400).astype(float)
    worse = np.where(np.arange(400) % 20 == 0, 9.0, base)
    rows = summaries(np.stack([worse, base, base]), 1, resamples=300, seed=5)
    assert [row["verdict"] for row in rows] == ["worse", "reference", "undecided"]
    assert (rows[2]["difference"], rows[2]["difference_low"], rows[2]["difference_high"]) == (
        0,
    ) * 3
    lost = ((base == 1) & (worse == 9)).mean()
    assert rows[0]["difference"] == pytest.approx(-lost)
    half = 1.96 * math.sqrt(lost * (1 - lost) / 400)
    assert rows[0]["difference_low"] == pytest.approx(-lost - half, abs=0.3 * half)
    assert rows[0]["difference_high"] == pytest.approx(-lost + half, abs=0.3 * half)
    alone = summary(worse, resamples=300, seed=5)
    for name, value in alone.items():
        assert rows[0][name] == pytest.approx(value)


def random_pairs(rng, layers, queries, candidates, originals):
    """Nearest places that know nothing, in a pool of all originals or of fewer."""
    shape = (queries, candidates)
    every = candidates == originals
    candidate_QC = (
        np.broadcast_to(np.arange(originals), shape)
        if every
        else np.stack([rng.permutation(originals)[:candidates] for _ in range(queries)])
    )
    truth_Q = (
        rng.permutation(originals)[:queries] if every else rng.integers(candidates, size=queries)
    )
    empty = np.zeros((layers, 0, 0))
    pairs = Pairs(
        tuple(ids("l", layers)),
        (1,) * layers,
        tuple(ids("q", queries)),
        tuple(ids("o", originals)),
        np.broadcast_to(empty.sum(), (layers, *shape)),
        np.ones((layers, queries)),
        np.ones((layers, originals)),
        candidate_QC,
        truth_Q,
    )
    return rng.integers(candidates, size=(layers, queries)), pairs


@pytest.mark.parametrize(("candidates", "originals"), [(60, 60), (4, 60)])
def test_permutation_null_is_calibrated(candidates, originals):
    rng = np.random.default_rng(2)
    found = []
    for seed in range(200):
        nearest_LQ, pairs = random_pairs(rng, 8, 60, candidates, originals)
        found.append(best_of_all(nearest_LQ, pairs, permutations=60, seed=seed, splits=2))
    p = np.array([best.p_value for best in found])
    for level in (0.05, 0.1, 0.2, 0.5):  # counts are discrete: p may be too large, never too small
        slack = 3 * math.sqrt(level * (1 - level) / len(p))
        assert (p <= level).mean() <= level + slack
    assert (p <= 0.5).mean() >= 0.2 and p.mean() <= 0.75
    top1 = np.array([best.top1 for best in found])
    assert (top1 > 1.15 / candidates).mean() > 0.8  # the best of eight looks better than chance
    held_out = np.mean([best.held_out.value for best in found])
    assert held_out == pytest.approx(1 / candidates, abs=0.015)  # held out, it does not


def test_a_layer_that_knows_is_found():
    rng = np.random.default_rng(3)
    nearest_LQ, pairs = random_pairs(rng, 5, 60, 60, 60)
    nearest_LQ[3] = np.where(rng.random(60) < 0.5, pairs.truth_Q, nearest_LQ[3])
    best = best_of_all(nearest_LQ, pairs, permutations=199)
    assert (best.layer, best.chosen, best.p_value) == (3, 3, 1 / 200)
    assert best.null_quantile < best.held_out.low
    assert best.held_out_mean == pytest.approx(best.top1, abs=0.02)
    with pytest.raises(InputError, match=r"gradients.permutations is 0"):
        best_of_all(nearest_LQ, pairs, permutations=0)


def test_nearest_agrees_with_ranks():
    rng = np.random.default_rng(4)
    query, original = ([rng.normal(size=(50, 3)) for _ in range(3)] for _ in range(2))
    pairs = pairs_of(query, original)
    hits = nearest_by_layer(pairs) == pairs.truth_Q
    wanted = [ranks(similarity(pairs, [i]), pairs.truth_Q) <= 1 for i in range(3)]
    np.testing.assert_array_equal(hits, wanted)
