"""How much mass channels bring and take: formulas, floors, pushed masses, names."""

import numpy as np
import pytest
from scipy.stats import rankdata, zscore

from headroom.digest import registry_names
from headroom.errors import InputError
from headroom.ffn import marginals as module
from headroom.ffn.marginals import (
    BLENDS,
    DISTRIBUTIONS,
    GRADIENT_DISTRIBUTIONS,
    STRATEGIES,
    Evidence,
    Strategy,
    marginals,
    nearest,
    needs_gradients,
    pushforward,
    resolve,
    standardised,
)

# of the statistics
NAMES = ("channel", "mean", "max", "std", "p95", "consistency", "structural", "mutual")
NAMES += ("important_ratio",)
ALL = {**DISTRIBUTIONS, **GRADIENT_DISTRIBUTIONS}


def evidence(n, seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    statistics = {
        f"{of}.{name}": generator.normal(size=n) * scale for of in ("fo", "snip") for name in NAMES
    }
    return Evidence(generator.normal(size=n), statistics)


def permuted(given, order):
    statistics = {name: values[order] for name, values in given.statistics.items()}
    return Evidence(given.score_n[order], statistics)


def wanted_shares(name, given, blend, temperature):
    """Each formula of the specification again, by exponentials and scipy's z and ranks."""
    s = given.statistics

    def z(x):
        return zscore(x, ddof=1)

    def soft(x):
        return np.exp(x) / np.exp(x).sum()

    mix = {
        "comprehensive": lambda p: (
            0.2 * s[p + "max"]
            + 0.15 * s[p + "mean"]
            + 0.2 * s[p + "p95"]
            + 0.15 * (s[p + "consistency"] + s[p + "structural"] + s[p + "mutual"])
        ),
        "conservative": lambda p: 0.4 * s[p + "max"] + 0.3 * (s[p + "consistency"] + s[p + "p95"]),
        "balanced": lambda p: 0.4 * s[p + "max"] + 0.3 * (s[p + "mean"] + s[p + "structural"]),
    }[blend]
    score = z(mix("fo.")) + z(mix("snip."))
    ratio = s["fo.important_ratio"] + s["snip.important_ratio"]
    shifted = given.score_n - given.score_n.min()
    p0 = soft(score / temperature)
    return {
        "uniform": np.ones_like(score) / len(score),
        "importance": shifted / shifted.sum(),
        "weight_aware": soft(
            z(s["fo.max"] + 0.5 * s["fo.std"])
            + z(s["snip.max"] + 0.5 * s["snip.std"])
            + 0.3 * z(ratio)
        ),
        "max_preserving": soft(s["fo.max"] + s["snip.max"]),
        "diversity_aware": soft(s["fo.std"] + s["snip.std"] + ratio),
        "adaptive": soft(score / (temperature * (1 + np.std(score, ddof=1)))),
        "robust": soft((rankdata(score) - 1) / temperature),
        "entropy_regularized": soft((score - 0.1 * p0 * np.log(p0 + 1e-8)) / temperature),
    }[name]


@pytest.mark.parametrize("temperature", (0.5, 1.0))
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("name", ALL)
def test_distributions_are_the_formulas(name, blend, temperature):
    given = evidence(13, seed=len(name))
    found = ALL[name](given, blend, temperature)
    np.testing.assert_allclose(found, wanted_shares(name, given, blend, temperature), rtol=1e-10)
    assert found.sum() == pytest.approx(1)


def test_closed_forms():
    # two channels: z = ±1/√2 each, so weight_aware's exponents are ±(1 + 1 + .3)/√2
    up, down = np.array([1.0, 3.0]), np.array([5.0, 5.0])
    given = Evidence(
        np.array([-1.0, 3.0]), {f"{of}.{n}": up for of in ("fo", "snip") for n in NAMES}
    )
    odds = np.exp(2.3 * np.sqrt(2))
    np.testing.assert_allclose(
        module.weight_aware(given, "balanced", 1), [1 / (1 + odds), odds / (1 + odds)]
    )
    # I = ±√2, unbiased std 2
    odds = np.exp(2 * np.sqrt(2) / (0.5 * 3))
    np.testing.assert_allclose(module.adaptive(given, "balanced", 0.5)[1], odds / (1 + odds))
    np.testing.assert_allclose(module.importance(given, "balanced", 1), [0, 1])
    assert module.importance(Evidence(np.array([1.0, 3.0])), "", 1).tolist() == [0.25, 0.75]
    # equal scores carry nothing: uniform, and robust's tied ranks too
    flat = Evidence(-down, {f"{of}.{n}": 0.1 * down for of in ("fo", "snip") for n in NAMES})
    for name, function in ALL.items():
        assert function(flat, "comprehensive", 0.5).tolist() == [0.5, 0.5], name
    np.testing.assert_array_equal(standardised(np.full(7, 0.1)), np.zeros(7))
    # ties share their mean rank: .5, .5, 2, 3
    tied = np.array([7.0, 7.0, 8.0, 9.0])
    given = Evidence(tied, {f"{of}.{n}": tied for of in ("fo", "snip") for n in NAMES})
    weights = np.exp([0.5, 0.5, 2, 3])
    np.testing.assert_allclose(module.robust(given, "balanced", 1), weights / weights.sum())
    assert standardised(np.ones(1)).tolist() == [0]


@pytest.mark.parametrize("name", [*STRATEGIES, "robust_to_pushforward", "importance_to_robust"])
def test_permuting_channels_permutes_marginals(name):
    generator = np.random.default_rng(3)
    n, k = 17, 8
    given, cost = evidence(n, 4), generator.uniform(0.1, 1, (n, n))
    np.fill_diagonal(cost, 0)
    kept = np.sort(generator.permutation(n)[:k])
    order = generator.permutation(n)  # place -> old channel
    place = np.argsort(order)
    kept_after = np.sort(place[kept])
    a, b = marginals(name, given, kept, cost[:, kept])
    moved_a, moved_b = marginals(
        name, permuted(given, order), kept_after, cost[np.ix_(order, order[kept_after])]
    )
    np.testing.assert_allclose(moved_a, a[order], rtol=1e-12)
    np.testing.assert_allclose(moved_b, b[np.searchsorted(kept, order[kept_after])], rtol=1e-12)
    for shares in (a, b):
        assert shares.sum() == pytest.approx(1, abs=1e-12) and (shares > 0).all()


def test_temperatures_and_restriction_of_a_strategy():
    given, kept = evidence(12), np.array([1, 4, 7])
    a, b = marginals("balanced", given, kept, np.zeros((12, 3)))
    np.testing.assert_allclose(a, module.adaptive(given, "balanced", 0.5))
    target = module.robust(given, "balanced", 1.0)[kept]
    np.testing.assert_allclose(b, target / target.sum(), rtol=1e-4)
    a, b = marginals("uniform", given, kept, np.zeros((12, 3)))
    assert set(a) == {1 / 12} and set(b) == {1 / 3}


def test_outlier_and_ranks_stay_finite_and_floored():
    n = 14336
    outlier = np.zeros(n)
    outlier[5] = 1.0
    given = Evidence(outlier, {f"{of}.{name}": outlier for of in ("fo", "snip") for name in NAMES})
    assert standardised(outlier).max() == pytest.approx(119.7, abs=0.1)
    kept = np.arange(6, n, 2)  # without the outlier: an unfloored target would be 0 / 0
    cost = np.zeros((n, 1))
    for name in STRATEGIES:
        a, b = marginals(name, given, kept if name != "pushforward" else kept[:1], cost)
        for shares in (a, b):
            assert np.isfinite(shares).all() and shares.sum() == pytest.approx(1)
            assert shares.min() >= 1e-6 / n * (1 - 2e-6), name
    ranks = evidence(n, 1)
    raw = module.robust(ranks, "balanced", 1.0)
    assert 700 < (raw > 0).sum() < 800 and raw.max() == pytest.approx(1 - np.exp(-1))
    a, _ = marginals("conservative", ranks, kept, cost)
    assert (a == a.min()).sum() > n - 50 and a.min() == pytest.approx(1e-6 / n, rel=1e-5)


def test_pushforward_sums_and_ties():
    generator = np.random.default_rng(0)
    cost, a = generator.uniform(size=(40, 6)), generator.dirichlet(np.ones(40))
    wanted = [a[cost.argmin(1) == j].sum() for j in range(6)]
    np.testing.assert_allclose(pushforward(a, cost), wanted, atol=1e-15)
    # two kept duplicates share the third's mass, one alone keeps its own; 1e-10 is a tie, 1e-8 not
    cost = np.array([[0, 1e-10, 1], [0, 0, 1], [1e-10, 0, 1], [1, 1, 0], [0.5, 0.5 + 1e-8, 1]])
    b = pushforward(np.full(5, 0.2), cost)
    np.testing.assert_allclose(b, [0.5, 0.3, 0.2], atol=1e-15)
    rows, columns, shares = nearest(cost)
    assert rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 4]
    assert columns.tolist() == [0, 1, 0, 1, 0, 1, 2, 0]
    assert shares.tolist() == [0.5] * 6 + [1, 1]


def test_chunks_change_nothing(monkeypatch):
    cost = np.random.default_rng(1).integers(0, 3, (50, 7)).astype(float)
    whole = nearest(cost)
    monkeypatch.setattr(module, "CHUNK", 30)
    for found, wanted in zip(nearest(cost), whole, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_names():
    assert resolve("pushforward") == Strategy("uniform", "pushforward")
    assert resolve("conservative") == Strategy("robust", "adaptive", "conservative")
    assert resolve("weight_aware_to_uniform") == Strategy("weight_aware", "uniform")
    assert resolve("importance_to_pushforward").target == "pushforward"
    for name in ("pushforward_to_uniform", "unifrom", "uniform_to_", "_to_uniform"):
        with pytest.raises(InputError, match=r"unknown.*allowed.*comprehensive.*SOURCE_to_TARGET"):
            resolve(name)
    assert resolve("importance") == Strategy("importance", "importance")  # a bare distribution
    free = {name for name in (*STRATEGIES, *DISTRIBUTIONS) if not needs_gradients(name)}
    assert free == {"pushforward", "uniform", "importance"}
    assert needs_gradients("uniform_to_robust") and needs_gradients("robust_to_pushforward")
    # the grammar reads registries without importing them
    for variable in ("DISTRIBUTIONS", "GRADIENT_DISTRIBUTIONS", "BLENDS", "STRATEGIES"):
        names = registry_names("headroom.ffn.marginals", variable)
        assert names == tuple(getattr(module, variable))
    for blend in BLENDS.values():
        assert sum(blend.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        (np.ones(4), "shape"),
        (np.array([1, np.nan, 1, 1, 1]), "not finite"),
        (np.array([1, -1e-3, 1, 1, 1]), "negative"),
        (np.zeros(5), "sum of 0"),
    ],
)
def test_own_distribution_that_goes_wrong_is_named(monkeypatch, values, wrong):
    monkeypatch.setitem(DISTRIBUTIONS, "mine", lambda *_: values)
    with pytest.raises(InputError, match=f"mine_to_uniform.*'mine' gave .*{wrong}"):
        marginals("mine_to_uniform", Evidence(np.ones(5)), np.arange(2), np.zeros((5, 2)))


def test_own_distribution_needs_no_more_than_its_entry(monkeypatch):
    monkeypatch.setitem(DISTRIBUTIONS, "mine", lambda given, *_: given.score_n**2)
    a, b = marginals("mine_to_mine", Evidence(np.array([1.0, 2, 2])), np.array([0, 2]), None)
    np.testing.assert_allclose(a, [1 / 9, 4 / 9, 4 / 9])
    np.testing.assert_allclose(b, [0.2, 0.8])


def test_missing_and_broken_statistics_are_named():
    with pytest.raises(InputError, match=r"'fo\.max' was not measured"):
        marginals("weight_aware", Evidence(np.ones(3)), np.arange(2), np.zeros((3, 2)))
    given = evidence(5)
    given.statistics["snip.max"][2] = np.inf
    with pytest.raises(InputError, match=r"'balanced'.*'adaptive' gave .*not finite"):
        marginals("balanced", given, np.arange(2), np.zeros((5, 2)))
