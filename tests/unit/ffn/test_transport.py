"""Costs between channels, and plans: exact against linear programming, entropic, partial."""

import warnings

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

from headroom.digest import registry_names
from headroom.errors import InputError
from headroom.ffn import transport as module
from headroom.ffn.marginals import pushforward
from headroom.ffn.transport import COSTS, DEFAULTS, SOLVERS, CostView, costs, rounded, solve


def view(n, seed, width=12):
    """Unit features and correlations of random activations."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(50, n, generator=generator, dtype=torch.float64)
    correlation = torch.corrcoef(hidden.T).abs()
    return CostView(
        features / features.norm(dim=1, keepdim=True), lambda kept_k: correlation[:, kept_k]
    )


def problem(n, k, seed, kind="cosine"):
    """Random kept channels and marginals, and the cost between them."""
    generator = np.random.default_rng(seed)
    kept = torch.as_tensor(np.sort(generator.permutation(n)[:k]))
    cost = costs(kind, view(n, seed), kept)
    return generator.dirichlet(np.ones(n)), generator.dirichlet(np.ones(k)), cost


def value(plan, cost):
    return float(plan.multiply(cost).sum())


def linear_program(a, b, cost, mass=None):
    """Σ T C by scipy: equal marginals, or at most them with a given mass."""
    n, k = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))])
    both = np.concatenate([a, b])
    if mass is None:
        found = linprog(cost.ravel(), A_eq=sums, b_eq=both)
    else:
        found = linprog(cost.ravel(), A_ub=sums, b_ub=both, A_eq=np.ones((1, n * k)), b_eq=[mass])
    assert found.status == 0
    return found.fun


def assert_marginals(plan, a, b):
    assert isinstance(plan, csr_array) and plan.dtype == np.float64
    assert plan.data.min(initial=0) >= 0
    np.testing.assert_allclose(plan.sum(1), a, rtol=0, atol=1e-9)
    np.testing.assert_allclose(plan.sum(0), b, rtol=0, atol=1e-9)


# costs


@pytest.mark.parametrize("kind", ("cosine", "sqeuclidean", "cityblock"))
def test_feature_costs_match_scipy_in_any_chunks(kind, monkeypatch):
    seen, kept = view(15, 0), torch.tensor([1, 4, 11])
    features = seen.features_nF.numpy()
    found = costs(kind, seen, kept)
    np.testing.assert_allclose(found, cdist(features, features[kept], kind), atol=1e-14)
    assert found.flags.c_contiguous and found[kept, np.arange(3)].tolist() == [0, 0, 0]
    monkeypatch.setattr(module, "ELEMENTS", 30)
    np.testing.assert_allclose(costs(kind, seen, kept), found, atol=1e-14)


def test_costs_of_duplicates_opposites_and_dead_channels():
    one = torch.tensor([0.6, 0.8, 0, 0], dtype=torch.float64)
    other = torch.tensor([0, 0, 1, 0], dtype=torch.float64)
    seen = CostView(torch.stack([one, one, -one, other, 0 * one, 0 * one]), None)
    kept = torch.tensor([0, 3, 4])
    wanted = {
        "cosine": [[0, 1, 1], [0, 1, 1], [2, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 0]],
        "sqeuclidean": [[0, 2, 1], [0, 2, 1], [4, 2, 1], [2, 0, 1], [1, 1, 0], [1, 1, 0]],
        "cityblock": [
            *[[0, 2.4, 1.4]] * 2,
            [2.8, 2.4, 1.4],
            [2.4, 0, 1],
            [1.4, 1, 0],
            [1.4, 1, 0],
        ],
    }
    for kind, rows in wanted.items():
        np.testing.assert_allclose(costs(kind, seen, kept), rows, atol=1e-15)
    with pytest.raises(InputError, match=r"'activation' needs .* correlations.*cosine"):
        costs("activation", seen, kept)


def test_activation_cost_is_one_minus_the_absolute_correlation():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    hidden[:, 3] = -2 * hidden[:, 0]
    full = np.abs(np.corrcoef(hidden.T.numpy()))
    kept = torch.tensor([0, 2])
    noisy = (torch.as_tensor(full) + 3e-7).float()  # rounding above one is still one
    seen = CostView(torch.zeros(5, 2, dtype=torch.float64), lambda kept_k: noisy[:, kept_k])
    found = costs("activation", seen, kept)
    np.testing.assert_allclose(found, 1 - full[:, [0, 2]], atol=1e-6)
    assert found[0, 0] == found[2, 1] == 0 and found[3, 0] < 1e-6 and found.min() >= 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.ones(4, 4), "shape"),
        (torch.full((5, 2), torch.nan), "not finite"),
        (-torch.ones(5, 2), "negative"),
    ],
)
def test_own_cost_that_goes_wrong_is_named(monkeypatch, wrong, words):
    monkeypatch.setitem(COSTS, "mine", lambda seen, kept: wrong)
    with pytest.raises(InputError, match=f"'mine' gave .*{words}.*5 × 2"):
        costs("mine", view(5, 0), torch.arange(2))
    with pytest.raises(InputError, match=r"'euclid' is unknown .*cosine"):
        costs("euclid", view(5, 0), torch.arange(2))


# plans


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", COSTS)
def test_exact_plan_is_the_linear_programs(kind, seed):
    n, k = ((20, 9), (12, 12), (7, 1), (20, 15))[seed]
    a, b, cost = problem(n, k, seed, kind)
    plan = solve("exact", a, b, cost, DEFAULTS)
    assert_marginals(plan, a, b)
    assert plan.nnz <= n + k - 1
    assert value(plan, cost) == pytest.approx(linear_program(a, b, cost), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_plan_cost_survives_a_permutation(seed):
    a, b, cost = problem(30, 12, seed)
    rows, columns = (np.random.default_rng(seed).permutation(size) for size in cost.shape)
    for solver in SOLVERS:
        plan = solve(solver, a, b, cost, DEFAULTS)
        moved = solve(solver, a[rows], b[columns], cost[np.ix_(rows, columns)], DEFAULTS)
        assert value(moved, cost[np.ix_(rows, columns)]) == pytest.approx(
            value(plan, cost), abs=1e-12 if solver != "sinkhorn" else 1e-3
        )
        if solver != "sinkhorn":  # the optimum is unique here
            np.testing.assert_allclose(
                moved.toarray(), plan.toarray()[np.ix_(rows, columns)], atol=1e-12
            )


def test_nearest_assignment_is_the_simplexs_optimum(monkeypatch):
    a, _, cost = problem(60, 25, 5)
    b = pushforward(a, cost)
    wanted, log = ot.emd(a, b, cost, log=True)
    assert log["warning"] is None
    monkeypatch.setattr(ot, "emd", None)  # no program is run
    plan = solve("exact", a, b, cost, DEFAULTS)
    assert_marginals(plan, a, b)
    assert plan.nnz == 60
    assert value(plan, cost) == pytest.approx((wanted * cost).sum(), abs=1e-13)
    np.testing.assert_array_equal(plan.toarray().argmax(1), cost.argmin(1))


def test_tied_masses_still_have_few_nonzeros():
    # clusters of 6, 4 and 2 equal channels, of which 3, 2 and 1 are kept
    cluster = np.repeat([0, 1, 2], [6, 4, 2])
    kept = np.array([0, 1, 2, 6, 7, 10])
    cost = (cluster[:, None] != cluster[kept]).astype(float)
    a = np.full(12, 1 / 12)
    b = pushforward(a, cost)
    np.testing.assert_allclose(b, 1 / 6)
    plan = solve("exact", a, b, cost, DEFAULTS)
    assert_marginals(plan, a, b)
    assert plan.nnz <= 12 + 6 - 1 and value(plan, cost) < 1e-15


def test_early_stop_raises_and_says_nothing_else():
    a, b, cost = problem(80, 40, 0)
    for solver in ("exact", "partial"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputError, match=rf"{solver}.*ffn\.transport\.iterations = 3:"):
                solve(solver, a, b, cost, {**DEFAULTS, "iterations": 3})
    with pytest.raises(InputError, match=r"ffn\.transport\.sinkhorn_iterations = 3 "):
        solve("sinkhorn", a, b, cost, {**DEFAULTS, "sinkhorn_iterations": 3})


@pytest.mark.parametrize("pushed", (False, True))
@pytest.mark.parametrize("kind", COSTS)
def test_sinkhorn_is_near_the_optimum_and_meets_marginals(kind, pushed):
    a, b, cost = problem(60, 24, 2, kind)
    b = pushforward(a, cost) if pushed else b
    best = value(solve("exact", a, b, cost, DEFAULTS), cost)
    plan = solve("sinkhorn", a, b, cost, DEFAULTS)
    assert_marginals(plan, a, b)
    assert best - 1e-12 <= value(plan, cost) <= 1.03 * best
    blurred = solve("sinkhorn", a, b, cost, {**DEFAULTS, "epsilon": 0.2})
    assert_marginals(blurred, a, b)
    assert value(blurred, cost) > value(plan, cost) and blurred.nnz >= plan.nnz
    wanted = ot.sinkhorn(a, b, cost, 0.2 * cost.mean(), method="sinkhorn_log", stopThr=1e-10)
    np.testing.assert_allclose(blurred.toarray(), wanted, atol=2e-4)
    small = (wanted > 1e-8 * a[:, None]) & (wanted < 1e-4 * a[:, None])
    assert small.any() and (blurred.toarray()[small] > 0).all()  # only dust is swept together


def test_sinkhorn_closed_form():
    # 2 × 2, equal marginals, cost 1 off the diagonal: T_11 / T_12 = exp(1/ε), ε = 2 · mean cost = 1
    half, cost = np.full(2, 0.5), 1 - np.eye(2)
    plan = solve("sinkhorn", half, half, cost, {"epsilon": 2, "tolerance": 1e-12})
    diagonal = 0.5 * np.e / (1 + np.e)
    np.testing.assert_allclose(plan.toarray().diagonal(), diagonal, rtol=1e-9)
    # without any cost, the outer product
    a = np.array([0.2, 0.3, 0.5])
    plan = solve("sinkhorn", a, half, np.zeros((3, 2)), {})
    np.testing.assert_allclose(plan.toarray(), np.outer(a, half), rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_rounding_meets_marginals_and_moves_little(seed):
    generator = np.random.default_rng(seed)
    a, b = generator.dirichlet(np.ones(9)), generator.dirichlet(np.ones(5))
    plan = csr_array(np.outer(a, b) * generator.uniform(0.8, 1.2, (9, 5)))
    plan = plan / plan.sum()
    error = np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()
    found = rounded(plan, a, b)
    assert_marginals(found, a, b)
    assert np.abs((found - plan).toarray()).sum() <= 2 * error + 1e-12  # their lemma 7
    exact = csr_array(np.outer(a, b))
    np.testing.assert_allclose(rounded(exact, a, b).toarray(), exact.toarray(), atol=1e-15)
    assert_marginals(rounded(csr_array((9, 5)), a, b), a, b)


def test_partial_moves_its_mass_and_leaves_the_dearest_source():
    # each of four sources has a near target but the last, whose mass is what may stay
    cost = np.array([[0.1, 1], [0.1, 1], [1, 0.1], [5, 6.0]])
    a, b = np.full(4, 0.25), np.array([0.6, 0.4])
    plan = solve("partial", a, b, cost, {**DEFAULTS, "mass": 0.75})
    np.testing.assert_allclose(
        plan.toarray(), [[0.25, 0], [0.25, 0], [0, 0.25], [0, 0]], atol=1e-12
    )


@pytest.mark.parametrize("mass", (0.1, 0.5, 0.8, 1, 1 + 1e-12))
def test_partial_is_the_linear_programs(mass):
    a, b, cost = problem(16, 7, 3, "sqeuclidean")
    plan = solve("partial", a, b, cost, {**DEFAULTS, "mass": mass})
    assert plan.sum() == pytest.approx(mass, abs=1e-9) and plan.data.min() >= 0
    assert (plan.sum(1) <= a + 1e-9).all() and (plan.sum(0) <= b + 1e-9).all()
    assert value(plan, cost) == pytest.approx(
        linear_program(a, b, cost, min(mass, 1 - 1e-12)), abs=1e-11
    )
    free = solve("partial", a, b, 0 * cost, {**DEFAULTS, "mass": mass})
    assert free.sum() == pytest.approx(mass, abs=1e-9)


@pytest.mark.parametrize(
    ("solver", "key", "given"),
    [("partial", "mass", 0), ("partial", "mass", 1.2), ("sinkhorn", "epsilon", 0),
     ("sinkhorn", "tolerance", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_named(solver, key, given):
    a, b, cost = problem(6, 3, 0)
    with pytest.raises(InputError, match=rf"ffn\.transport\.{key} is {given} \(allowed: above 0"):
        solve(solver, a, b, cost, {**DEFAULTS, key: given})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((3, 6)), "shape"),
        (np.full((6, 3), np.nan), "not finite"),
        (-np.ones((6, 3)), "negative"),
        (np.ones((6, 3)), "more mass"),
    ],
)
def test_own_solver_that_goes_wrong_is_named(monkeypatch, wrong, words):
    a, b, cost = problem(6, 3, 0)
    monkeypatch.setitem(SOLVERS, "mine", lambda *_: wrong)
    with pytest.raises(InputError, match=f"'mine' gave .*{words}"):
        solve("mine", a, b, cost, {})
    with pytest.raises(InputError, match=r"'simplex' is unknown .*exact, sinkhorn, partial"):
        solve("simplex", a, b, cost, {})


def test_registries_are_read_without_import():
    assert registry_names("headroom.ffn.transport", "COSTS") == tuple(COSTS)
    assert registry_names("headroom.ffn.transport", "SOLVERS") == tuple(SOLVERS)
