"""Pairs, clusters, thresholds, budgets, partitions, plans and controls."""

import itertools
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from headroom.errors import InputError
from headroom.heads.budgets import merged_config, resolve_budget
from headroom.heads.clustering import (
    clusters,
    partition,
    resolve_threshold,
    similar_heads,
    similar_pairs,
)
from headroom.heads.plans import (
    Plan,
    budget_plan,
    dissimilar_control,
    has_control,
    overlap,
    pair_costs,
    plan_cost,
    random_budget_plan,
    random_control,
    relabelled,
    threshold_plan,
)


def similarity(heads, seed, close=()):
    """Random symmetric similarities below 0.9; the pairs of ``close`` near 1."""
    generator = np.random.default_rng(seed)
    upper = np.triu(generator.uniform(0, 0.9, (heads, heads)), 1)
    for a, b in close:
        upper[min(a, b), max(a, b)] = generator.uniform(0.99, 0.999)
    return upper + upper.T + np.eye(heads)


def test_pairs_are_all_and_sorted():
    matrix = similarity(7, 0)
    found = similar_pairs(matrix, 0.5)
    wanted = {(i, j) for i in range(7) for j in range(i + 1, 7) if matrix[i, j] >= 0.5}
    assert {(i, j) for i, j, _ in found} == wanted
    assert [s for *_, s in found] == sorted((s for *_, s in found), reverse=True)
    exact = similar_pairs(np.array([[1, 0.75], [0.75, 1]]), 0.75)
    assert exact == [(0, 1, 0.75)]  # at the threshold counts


def test_chain_is_no_cluster():
    matrix = np.eye(3)
    matrix[0, 1] = matrix[1, 0] = 0.97
    matrix[1, 2] = matrix[2, 1] = 0.96
    matrix[0, 2] = matrix[2, 0] = 0.5
    assert clusters(matrix, 0.95) == ((0, 1), (2,))
    matrix[0, 2] = matrix[2, 0] = 0.95
    assert clusters(matrix, 0.95) == ((0, 1, 2),)
    assert clusters(matrix, 0.951) == ((0, 1), (2,))
    assert clusters(matrix, 1.0) == ((0,), (1,), (2,))
    assert clusters(np.ones((3, 3)), 1.0) == ((0, 1, 2),)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_reach_the_threshold_and_follow_a_relabelling(seed):
    matrix, order = similarity(9, seed), np.random.default_rng(seed).permutation(9)
    found = clusters(matrix, 0.6)
    assert sorted(h for c in found for h in c) == list(range(9))
    assert any(len(c) > 1 for c in found)
    assert all(matrix[a, b] >= 0.6 for c in found for a, b in combinations(c, 2))
    # no two clusters could still be joined: linkage went as far as it may
    for a, b in combinations(found, 2):
        assert matrix[np.ix_(a, b)].min() < 0.6
    moved = clusters(matrix[np.ix_(order, order)], 0.6)
    assert {frozenset(int(order[h]) for h in c) for c in moved} == set(map(frozenset, found))


def test_labels_forbid_crossing():
    matrix = similarity(4, 0, close=[(0, 2), (0, 1)])
    assert clusters(matrix, 0.98, labels=[0, 0, 1, 1]) == ((0, 1), (2,), (3,))


def test_similar_heads_schema():
    stack = np.stack([similarity(4, 0, close=[(1, 3)]), similarity(4, 1)])
    found = similar_heads(stack, 0.95)
    assert found["num_layers"] == 2 and found["total_similar_pairs"] == 1
    layer = found["layer_analysis"]["0"]
    assert layer["num_heads"] == 4 and layer["num_similar_pairs"] == 1
    assert layer["similar_pairs"] == [[1, 3, stack[0, 1, 3]]] and layer["clusters"] == [[1, 3]]
    assert layer["similarity_matrix"] == stack[0].tolist()


def test_thresholds():
    stack = np.stack([similarity(5, 0), similarity(5, 1)])
    values = [m[i, j] for m in stack for i in range(5) for j in range(i + 1, 5)]
    assert resolve_threshold("t0.99", stack) == 0.99
    assert resolve_threshold("q0.90", stack) == pytest.approx(np.quantile(values, 0.9), abs=1e-15)
    with pytest.raises(InputError, match=r"t0\.99"):
        resolve_threshold("b4x2", stack)
    with pytest.raises(InputError, match="one head a layer"):
        resolve_threshold("q0.90", stack[:, :1, :1])


@pytest.mark.parametrize(
    ("selection", "heads", "groups", "wanted"),
    [
        ("b4x2", 12, 4, (4, 2)),
        ("b2x6", 12, 4, (2, 6)),  # 3 heads a group: two groups become one
        ("b8x4", 32, 32, (8, 4)),
        ("b0.50", 12, 4, (3, 2)),
        ("b0.50", 8, 8, (4, 1)),
        ("b0.75", 32, 8, (8, 3)),
    ],
)
def test_budgets(selection, heads, groups, wanted):
    assert resolve_budget(selection, heads, groups) == wanted


def test_impossible_budgets_say_what_is_allowed():
    for selection in ("b5x1", "b3x4", "b1x13", "b0x2"):
        with pytest.raises(InputError, match=r"recipe part 'b.*not possible with 12 query heads"):
            resolve_budget(selection, 12, 4)
    with pytest.raises(InputError, match="n at most 3"):
        resolve_budget("b2x6", 12, 4, unite=False)
    for selection in ("b0.00", "t0.99", "b1.00"):
        with pytest.raises(InputError, match=r"b4x2 .* or b0.50"):
            resolve_budget(selection, 12, 4)


def test_configuration_of_fewer_heads():
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_hidden_layers": 1,
        "vocab_size": 9,
        "attention_bias": False,
        "mlp_bias": False,
    }
    same = merged_config(llama, 4, 2)
    assert same["model_type"] == "llama"
    assert (same["num_attention_heads"], same["num_key_value_heads"], same["head_dim"]) == (4, 2, 8)
    other = merged_config(llama, 6, 2)
    assert other["model_type"] == "mistral" and other["architectures"] == ["MistralForCausalLM"]
    assert other["sliding_window"] is None and "attention_bias" not in other
    assert merged_config({**llama, "model_type": "qwen3"}, 6, 2)["model_type"] == "qwen3"
    for key in ("attention_bias", "mlp_bias"):
        with pytest.raises(InputError, match=f"config key {key} is true"):
            merged_config({**llama, key: True}, 6, 2)
    with pytest.raises(InputError, match="don't divide"):
        merged_config(llama, 6, 4)


def all_partitions(items, parts):
    """Every partition into that many blocks, another way: by labelling the items."""
    marked = itertools.product(range(parts), repeat=len(items))
    found = {
        frozenset(
            frozenset(i for i, m in zip(items, marks, strict=True) if m == part)
            for part in range(parts)
        )
        for marks in marked
    }
    return [[tuple(sorted(block)) for block in p] for p in found if all(p) and len(p) == parts]


@pytest.mark.parametrize(("parts", "least"), [(1, 1), (2, 1), (2, 3), (3, 1), (3, 2), (6, 1)])
def test_small_partitions_are_the_best(parts, least):
    table = {}

    def cost(blocks):
        generator = np.random.default_rng(0)
        for size in range(1, 7):
            for b in combinations(range(6), size):
                table[b] = generator.uniform()
        return np.array([table[b] for b in blocks])

    found = partition(range(6), parts, cost, least)
    allowed = [p for p in all_partitions(range(6), parts) if min(map(len, p)) >= least]
    best = min(sum(table[b] for b in p) for p in allowed)
    assert sum(table[b] for b in found) == pytest.approx(best)


@pytest.mark.parametrize(
    ("items", "parts", "least"), [(8, 2, 4), (9, 2, 4), (16, 4, 4), (12, 5, 2), (7, 7, 1)]
)
def test_large_partitions_keep_the_least_size(items, parts, least):
    matrix = similarity(items, 3)
    asked = []

    def cost(blocks):
        asked.extend(blocks)
        return np.array([np.triu(1 - matrix[np.ix_(b, b)], 1).sum() for b in blocks])

    found = partition(range(items), parts, cost, least)
    assert len(found) == parts and min(map(len, found)) >= least
    assert sorted(h for b in found for h in b) == list(range(items))
    assert len(asked) == len(set(asked))  # costs are dear: none is asked for twice


def test_large_partition_finds_planted_blocks():
    planted = [(0, 5, 9), (1, 2), (3, 7, 8, 10), (4, 6)]
    matrix = similarity(11, 4, close=[p for b in planted for p in combinations(b, 2)])
    costs = pair_costs(matrix, 11)(tuple(range(11)))
    assert partition(range(11), 4, costs) == tuple(sorted(planted))


def test_threshold_plan_unites_groups_only_when_whole():
    # 3 groups of 2; groups 0 and 2 are one another's copies
    both = threshold_plan(similarity(6, 0, close=[(0, 4), (1, 5)]), 0.98, groups=3)
    assert both.groups == ((0, 2), (1,)) and both.clusters == ((0, 4), (1, 5), (2,), (3,))
    # swapped inside works as well, and so does a cluster of all four
    assert threshold_plan(similarity(6, 0, close=[(0, 5), (1, 4)]), 0.98, 3).groups == (
        (0, 2),
        (1,),
    )
    one = threshold_plan(similarity(6, 0, close=[(0, 4)]), 0.98, groups=3)
    assert one.groups == ((0,), (1,), (2,)) and (0, 4) in one.clusters
    assert one.within_parts().clusters == tuple((h,) for h in range(6))
    assert threshold_plan(similarity(6, 0, close=[(0, 4)]), 0.98, 3, "refuse").changes is False
    own = threshold_plan(similarity(6, 0, close=[(0, 4)]), 0.98, groups=6, cross_group="refuse")
    assert own.groups == ((0, 4), (1,), (2,), (3,), (5,))  # G = H: a head owns its keys


def sizes(plan):
    """What fixes the parameters: per part its size and its clusters' number."""
    inner = [sum(set(plan.span(c)) <= set(p) for c in plan.clusters) for p in plan.groups]
    return len(plan.groups), sorted(inner)


@pytest.mark.parametrize("budget", [(4, 2), (2, 6), (2, 3), (1, 1), (4, 3)])
def test_budget_plans_have_the_budget(budget):
    generator = np.random.default_rng(0)
    costs = pair_costs(similarity(12, 5), 4)
    found = budget_plan(costs, budget, 12, 4)
    worst = budget_plan(costs, budget, 12, 4, worst=True)
    draws = [random_budget_plan(budget, 12, 4, generator) for _ in range(40)]
    for plan in [found, worst, *draws]:
        assert plan.reduce and sizes(plan) == (budget[0], [budget[1]] * budget[0])
        assert sorted(h for c in plan.clusters for h in c) == list(range(12))
    values = [plan_cost(plan, costs) for plan in draws]
    assert plan_cost(found, costs) <= min(values) + 1e-9
    assert plan_cost(worst, costs) >= max(values) - 1e-9
    assert budget in ((1, 1), (4, 3)) or plan_cost(found, costs) < np.mean(values)


def test_budget_plan_unites_alike_groups_where_all_heads_stay():
    matrix = similarity(12, 6)
    for a, b in [(0, 2), (1, 3)]:  # groups 0 and 2, 1 and 3 are alike
        matrix[a * 3 : a * 3 + 3, b * 3 : b * 3 + 3] = 0.95
        matrix[b * 3 : b * 3 + 3, a * 3 : a * 3 + 3] = 0.95
    plan = budget_plan(pair_costs(matrix, 4), (2, 6), 12, 4)
    assert plan.groups == ((0, 2), (1, 3)) and len(plan.clusters) == 12


@pytest.mark.parametrize("groups", [2, 4, 12])
def test_threshold_controls(groups):
    close = [(0, 1), (0, 2), (1, 2), (6, 9)] if groups < 12 else [(0, 5), (1, 7), (1, 9), (7, 9)]
    matrix = similarity(12, 7, close=close)
    costs = pair_costs(matrix, groups)(tuple(range(groups)))
    plan = threshold_plan(matrix, 0.98, groups)

    def cost(some):
        return float(costs(some.clusters).sum())

    def shape(some):
        return sorted((len(c), len(some.span(c))) for c in some.clusters), sorted(
            map(len, some.groups)
        )

    draws = [random_control(plan, np.random.default_rng(seed)) for seed in range(20)]
    worst = dissimilar_control(plan, matrix, np.random.default_rng(0))
    assert all(draw != plan and shape(draw) == shape(plan) for draw in [*draws, worst])
    assert cost(plan) < np.mean([cost(draw) for draw in draws]) < cost(worst)
    assert cost(worst) >= max(cost(draw) for draw in draws) - 1e-12
    assert draws[3] == random_control(plan, np.random.default_rng(3))
    assert len(set(draws)) > 1
    assert overlap(plan, plan) == 1 and overlap(draws[0], plan) < 1


def test_relabelling_moves_groups_with_their_heads():
    plan = Plan(((0, 2), (1,)), ((0, 4), (1, 5), (2,), (3,)), reduce=False)
    image = relabelled(plan, np.array([3, 2, 0, 1, 5, 4]))  # groups 0→1, 1→0, 2→2
    assert image == Plan(((0,), (1, 2)), ((0,), (1,), (2, 4), (3, 5)), reduce=False)


def test_no_control_where_all_is_merged():
    plan = threshold_plan(np.ones((4, 4)), 0.9, groups=2)
    assert plan.clusters == ((0, 1, 2, 3),) and not has_control(plan)
    assert random_control(plan, np.random.default_rng(0)) == plan
    assert dissimilar_control(plan, np.ones((4, 4)), np.random.default_rng(0)) == plan
    assert overlap(plan, threshold_plan(np.eye(4), 0.9, 2)) is None


def test_light_modules_stay_light():
    code = (
        "import sys, headroom.heads.plans, headroom.heads.budgets;"
        "assert not {'torch', 'scipy', 'transformers'} & set(sys.modules), 'heavy'"
    )
    source = Path(__file__).parents[3] / "src"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(source)})
