"""Merges of planted copies lose nothing; others lose what the log says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import (
    SETTINGS,
    block,
    build,
    config_of,
    copy_group,
    copy_head,
    inputs_of,
    logits,
    naive_similarity,
    random_gauge,
    rebuilt,
    state_of,
    tokens,
)

from headroom.checkpoints import Tensors, geometry, write_derived
from headroom.errors import InputError
from headroom.heads.costs import ErrorCosts
from headroom.heads.merging import Layer, merge_layer, refit_output, relative_error
from headroom.heads.pipeline import InputFile, merge_model, plan_layers
from headroom.heads.plans import Plan, plan_cost, random_budget_plan, threshold_plan
from headroom.heads.weights import Calibration, heads_output, project, read
from headroom.recipes import Merge, Remove, parse_step

D = 12
CLOSE = {"atol": 1e-5, "rtol": 0}
FAMILIES = [("llama", {}), ("mistral", {}), ("qwen2", {}), ("qwen3", {"attention_bias": True})]


def planted(family="llama", heads=4, groups=2, copies=((0, 1), (2, 3)), scale=1.0, **more):
    """A model with exact copies of query heads in every layer."""
    model = build(family, heads, groups, **more)
    state = state_of(model)
    for layer in range(2):
        for source, target in copies:
            copy_head(state, layer, source, target, D, scale)
    return rebuilt(config_of(model), state)


def gauge_planted(family="llama", even=False, heads=None, modulus=True, groups=2, copies=(1,)):
    """A model whose key/value heads ``copies`` are gauge copies of number 0, in every layer."""
    model = build(family, 2 * groups, groups)
    state, turned = state_of(model), family != "qwen3" or even
    for layer in range(2):
        for norm in ("q_norm", "k_norm") if even else ():
            weight = state[f"model.layers.{layer}.self_attn.{norm}.weight"]
            weight[D // 2 :] = weight[: D // 2]
        for target in copies:
            z, rotation = random_gauge(
                D, 10 * layer + target, modulus and family != "qwen3", not turned
            )
            copy_group(state, layer, 0, target, D, 2, z, rotation, heads)
    return rebuilt(config_of(model), state)


def merged(model, step, similarity=None, settings=SETTINGS, inputs=True, **more):
    """The stock model after a step, its log, and the changed tensors."""
    if isinstance(step, str):
        step = parse_step(step)
    state, config = state_of(model), config_of(model)
    given = inputs_of(model) if inputs else None
    new, changed, log = merge_model(state, config, step, similarity, given, settings, **more)
    json.dumps(log, allow_nan=False)
    return rebuilt(new, state | changed), log, changed


def weights_of(model, layer=0):
    config = config_of(model)
    return read(state_of(model), geometry(config), layer, config)


def layer_of(model, index=0, ridge=1e-4):
    inputs = inputs_of(model)
    calibration = Calibration(inputs[f"layer.{index}"], inputs["cos"], inputs["sin"])
    return Layer(weights_of(model, index), calibration, ridge)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", ["average", "aligned", "refit"])
@pytest.mark.parametrize(("family", "more"), FAMILIES)
def test_exact_copies_are_deleted_without_loss(family, more, method):
    model = planted(family, **more)
    small, log, _ = merged(model, f"merge-error-{method}-b2x1")
    assert log["merged_layers"]["0"]["clusters"] == [[0, 1], [2, 3]]
    assert torch.allclose(logits(small), logits(model), **CLOSE)
    biases = D if small.model.layers[0].self_attn.q_proj.bias is not None else 0
    heads_gone = 2 * 2  # two a layer
    width = model.config.hidden_size
    assert parameters(model) - parameters(small) == heads_gone * (2 * width * D + biases)
    assert log["total_heads_live"] == 4 and log["merged_layers"]["1"]["relative_error"] < 1e-5


@pytest.mark.parametrize("method", ["average", "aligned", "refit"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (8, 4), (4, 4)])
def test_exact_copies_share_without_loss(method, heads, groups):
    """A threshold keeps the shape; copies with unlike W_O are merged without loss too."""
    model = build("llama", heads, groups, width=96)
    state = state_of(model)
    for layer in range(2):
        if groups == heads:  # a head owns its keys: all four matrices are copied
            for kind in ("k_proj.weight", "v_proj.weight"):
                block(state, layer, kind, 3, D).copy_(block(state, layer, kind, 2, D))
        copy_head(state, layer, 2, 3, D, scale_output=-0.3)
    model = rebuilt(config_of(model), state)
    similarity = naive_similarity(model)
    assert abs(similarity[:, 2, 3] - 1).max() < 1e-6
    same, log, _ = merged(model, f"merge-relu-{method}-t0.9999", similarity)
    entry = log["merged_layers"]["0"]
    assert entry["clusters"] == [[2, 3]] and entry["pairs"] == [[2, 3, similarity[0, 2, 3]]]
    assert entry["key_value_parts"] == ([[2, 3]] if groups == heads else [])
    assert log["total_merged_pairs"] == 2 and parameters(same) == parameters(model)
    assert torch.allclose(logits(same), logits(model), **CLOSE)
    assert entry["heads_live"] == (heads if method == "average" else heads - 1)
    assert entry["carriers"] == ([] if method == "average" else [2])


def test_halving():
    """Deleting one of two equal heads: W_O summed is exact, averaged halves their output."""
    model = planted()
    state, config = state_of(model), config_of(model)
    step = parse_step("merge-error-aligned-b2x1")
    new, changed, _ = merge_model(state, config, step, None, inputs_of(model), SETTINGS)
    assert torch.allclose(logits(rebuilt(new, state | changed)), logits(model), **CLOSE)
    outputs = {name for name in changed if name.endswith("o_proj.weight")}
    assert len(outputs) == 2
    halved = {n: t / 2 if n in outputs else t for n, t in changed.items()}
    assert not torch.allclose(logits(rebuilt(new, state | halved)), logits(model), atol=0.1)


@pytest.mark.parametrize(
    ("family", "even"), [("llama", False), ("qwen2", False), ("qwen3", False), ("qwen3", True)]
)
@pytest.mark.parametrize("selection", ["b1x2", "t0.9999"])
def test_gauge_copies_need_alignment(family, even, selection):
    model = gauge_planted(family, even)
    similarity = naive_similarity(model)
    assert min(similarity[:, 0, 2].min(), similarity[:, 1, 3].min()) > 1 - 1e-5
    for method in ("aligned", "refit"):
        other, log, _ = merged(model, f"merge-relu-{method}-{selection}", similarity)
        assert log["merged_layers"]["1"]["key_value_parts"] == [[0, 1]]
        assert torch.allclose(logits(other), logits(model), atol=5e-5)
        assert log["merged_layers"]["1"]["relative_error"] < 1e-5
        cache = other.model.layers[0].self_attn.k_proj.out_features
        assert cache == (D if selection == "b1x2" else 2 * D)
    other, log, _ = merged(model, f"merge-relu-average-{selection}", similarity)
    assert not torch.allclose(logits(other), logits(model), atol=0.1)
    assert log["merged_layers"]["0"]["relative_error"] > 0.1


def test_error_criterion_finds_gauge_copies():
    """Group 2 of 3 is the copy of 0: the error says so, whatever W_K and W_V look like."""
    model = gauge_planted(groups=3, copies=(2,))
    small, log, _ = merged(model, "merge-error-aligned-b2x2")
    assert log["merged_layers"]["0"]["key_value_parts"] == [[0, 2]]
    assert log["merged_layers"]["1"]["clusters"] == [[0, 4], [1, 5]]
    assert torch.allclose(logits(small), logits(model), atol=5e-5)


def test_cross_group_copy_of_one_head():
    """Only heads 0 and 2 agree: 2's work goes to 0, or 0's to 2; nothing else is touched."""
    model = gauge_planted(heads=(0,))
    similarity = naive_similarity(model)
    other, log, changed = merged(model, "merge-relu-aligned-t0.9999", similarity)
    entry = log["merged_layers"]["0"]
    assert entry["clusters"] == [[0, 2]] and entry["key_value_parts"] == []
    assert torch.allclose(logits(other), logits(model), atol=5e-5)
    assert {name.split(".")[4] for name in changed} <= {"q_proj", "o_proj"}
    before, after = weights_of(model), weights_of(other)
    assert torch.equal(before.q_HdD[[1, 3]], after.q_HdD[[1, 3]])
    assert torch.equal(before.o_HDd[[1, 3]], after.o_HDd[[1, 3]])
    follower = 2 if entry["carriers"] == [0] else 0
    assert not after.o_HDd[follower].any()
    for step, settings in [
        ("merge-relu-average-t0.9999", SETTINGS),  # no gauge, so the cluster ends at the border
        ("merge-relu-aligned-t0.9999", SETTINGS | {"cross_group": "refuse"}),
    ]:
        _, log, changed = merged(model, step, similarity, settings)
        assert not changed and log["total_merged_pairs"] == 0


@pytest.mark.parametrize("method", ["average", "aligned", "refit"])
def test_nothing_above_the_threshold_changes_nothing(method):
    model = build().bfloat16()
    similarity = naive_similarity(build())
    _, log, changed = merged(model, f"merge-relu-{method}-t1.00", similarity)
    assert changed == {} and log["total_merged_pairs"] == 0 and log["threshold"] == 1.0
    assert set(log["merged_layers"]) == {"0", "1"}
    assert log["merged_layers"]["0"] == {
        "num_pairs_merged": 0,
        "pairs": [],
        "clusters": [],
        "key_value_parts": [],
        "carriers": [],
        "heads_live": 4,
        "relative_error": 0.0,
    }


def test_dtype_stays_and_untouched_layers_are_left_out():
    model = build()
    state = state_of(model)
    copy_head(state, 1, 0, 1, D)
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    model = rebuilt(config_of(model), state).bfloat16()
    similarity = naive_similarity(
        rebuilt(config_of(model), {k: t.float() for k, t in state.items()})
    )
    _, log, changed = merged(model, "merge-relu-refit-t0.9999", similarity)
    assert {name.split(".")[2] for name in changed} == {"1"}
    assert {tensor.dtype for tensor in changed.values()} == {torch.bfloat16}
    assert not any("k_proj" in name or "v_proj" in name for name in changed)
    assert log["merged_layers"]["1"]["relative_error"] < 0.02


def test_reads_no_inputs_where_none_are_needed():
    model = planted(scale=0.5)  # equal copies would average to themselves, and nothing would change
    similarity = naive_similarity(model)
    _, log, changed = merged(model, "merge-relu-average-t0.9999", similarity, inputs=False)
    assert "relative_error" not in log["merged_layers"]["0"] and changed
    merged(model, "merge-relu-aligned-t0.9999", similarity, inputs=False)  # inside one group
    with pytest.raises(InputError, match=r"heads\.calibration"):
        merged(gauge_planted(), "merge-relu-aligned-b1x2", similarity, inputs=False)
    config = config_of(build("mistral")) | {"sliding_window": 8}
    with pytest.raises(InputError, match=r"heads\.calibration\.window is 24"):
        merge_model(
            state_of(model), config, Merge("relu", "average", "t0.9"), similarity,
            inputs_of(model), SETTINGS,
        )  # fmt: skip


@pytest.mark.parametrize("reduce", [False, True])
def test_clusters_of_three_do_not_depend_on_order(reduce):
    """Relabelling heads (inside groups, and groups) permutes the result and nothing else."""
    model = build("qwen2", 6, 3)
    layer = layer_of(model)
    groups = ((0, 1, 2),) if reduce else ((0,), (1,), (2,))
    clusters = ((0, 2, 5), (1, 3, 4)) if reduce else ((0, 2, 5), (1,), (3,), (4,))
    plan = Plan(groups, clusters, reduce)
    order = torch.tensor([4, 5, 1, 0, 3, 2])  # groups 2, 0, 1, each with its heads
    kv = torch.tensor([2, 0, 1])
    w = layer.weights
    permuted = replace(
        w,
        q_HdD=w.q_HdD[order],
        q_bias_Hd=w.q_bias_Hd[order],
        o_HDd=w.o_HDd[order],
        k_GdD=w.k_GdD[kv],
        v_GdD=w.v_GdD[kv],
        k_bias_Gd=w.k_bias_Gd[kv],
        v_bias_Gd=w.v_bias_Gd[kv],
    )
    place = {int(old): new for new, old in enumerate(order)}
    moved = Plan(groups, tuple(tuple(place[h] for h in c[::-1]) for c in clusters), reduce)
    x = inputs_of(model)["layer.0"]
    for method in ("average", "aligned", "refit"):
        one = merge_layer(w, plan, method, layer.calibration)
        two = merge_layer(permuted, moved, method, layer.calibration)
        y_one, y_two = (
            project(m, heads_output(m, x, layer.calibration.cos_Td, layer.calibration.sin_Td))
            for m in (one, two)
        )
        assert torch.allclose(y_one, y_two, atol=2e-4), method
        assert reduce or torch.allclose(one.k_GdD[kv], two.k_GdD, atol=1e-6)


def test_three_weights_sum_to_one():
    model = build("qwen2", 4, 1)
    w = weights_of(model)
    plan = Plan(((0,),), ((0, 1, 3), (2,)), reduce=False)
    mean = (w.q_HdD[0] + w.q_HdD[1] + w.q_HdD[3]) / 3
    bias = (w.q_bias_Hd[0] + w.q_bias_Hd[1] + w.q_bias_Hd[3]) / 3
    total = w.o_HDd[0] + w.o_HDd[1] + w.o_HDd[3]
    average, aligned = (merge_layer(w, plan, method) for method in ("average", "aligned"))
    for head in (0, 1, 3):
        assert torch.allclose(average.q_HdD[head], mean, atol=1e-6)
        assert torch.allclose(aligned.q_HdD[head], mean, atol=1e-6)
        assert torch.allclose(average.q_bias_Hd[head], bias, atol=1e-6)
        assert torch.allclose(aligned.q_bias_Hd[head], bias, atol=1e-6)
        assert torch.allclose(average.o_HDd[head], total / 3, atol=1e-6)
    assert torch.allclose(aligned.o_HDd[0], total, atol=1e-6)
    assert not aligned.o_HDd[[1, 3]].any() and torch.equal(aligned.o_HDd[2], w.o_HDd[2])
    small = merge_layer(w, replace(plan, reduce=True), "average")
    assert torch.allclose(small.o_HDd[0], total, atol=1e-6) and small.heads == 2
    assert torch.allclose(small.q_bias_Hd[0], bias, atol=1e-6)


def reference_refit(layer, small):
    """Ridge towards W₀ by ordinary least squares on stacked rows, in numpy."""
    x, cos, sin = layer.calibration.x_STD, layer.calibration.cos_Td, layer.calibration.sin_Td
    z = heads_output(small, x, cos, sin).flatten(2).flatten(0, 1).double().numpy()
    y = project(layer.weights, heads_output(layer.weights, x, cos, sin), bias=False)
    y = y.flatten(0, 1).double().numpy()
    start = small.o_HDd.transpose(1, 2).flatten(0, 1).double().numpy()
    weight = layer.ridge * np.square(z).sum(0).mean()
    rows = np.vstack([z, np.sqrt(weight) * np.eye(z.shape[1])])
    wanted = np.vstack([y - z @ start, np.zeros_like(start)])
    return start + np.linalg.lstsq(rows, wanted, rcond=None)[0]


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
def test_refit_is_ridge_regression_and_never_worse(ridge):
    model = build("qwen3", 8, 4, d=16, width=64, attention_bias=True)
    layer = layer_of(model, ridge=ridge)
    generator = np.random.default_rng(0)
    for budget in [(4, 1), (2, 2), (1, 3)]:
        plan = random_budget_plan(budget, 8, 4, generator)
        w, calibration = layer.weights, layer.calibration
        aligned = merge_layer(w, plan, "aligned", calibration)
        refit = refit_output(w, aligned, calibration, ridge)
        columns = refit.o_HDd.transpose(1, 2).flatten(0, 1).numpy()
        assert np.allclose(columns, reference_refit(layer, aligned), atol=1e-4)
        before, after = (relative_error(w, m, calibration) for m in (aligned, refit))
        assert after <= before and (ridge > 1e-2 or after < 0.98 * before)
        other = refit_output(w, aligned, replace(calibration, batch=1), ridge)
        assert torch.allclose(other.o_HDd, refit.o_HDd, atol=1e-5)


def test_refit_leaves_dead_heads_dead():
    model = build("llama", 4, 2)
    layer = layer_of(model)
    plan = Plan(((0,), (1,)), ((0, 1), (2,), (3,)), reduce=False)
    refit = merge_layer(layer.weights, plan, "refit", layer.calibration)
    assert not refit.o_HDd[1].any() and refit.o_HDd[[0, 2, 3]].flatten(1).any(1).all()


def test_zero_head_gives_no_nan():
    model = build("qwen2")
    state = state_of(model)
    for layer in range(2):
        for kind in ("q_proj.weight", "q_proj.bias", "o_proj.weight"):
            block(state, layer, kind, 3, D).zero_()
        for kind in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            block(state, layer, kind, 1, D).zero_()
    model = rebuilt(config_of(model), state)
    for method in ("average", "aligned", "refit"):
        for budget in ("b2x1", "b1x2", "b1x1"):
            small, _, _ = merged(model, f"merge-error-{method}-{budget}")
            assert logits(small).isfinite().all()
    for score in ("wanda_sp", "flap"):
        small, log, _ = merged(model, f"remove-{score}-refit-b2x1")
        assert logits(small).isfinite().all() and 3 in log["merged_layers"]["0"]["removed"]


@pytest.mark.parametrize("method", ["average", "aligned", "refit"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_error_costs_are_true_errors(family, method):
    """A cluster's cost is the change of its contribution in an actual merge of the weights."""
    model = build(family, 6, 3)
    layer = layer_of(model, ridge=1e-3)
    w, c = layer.weights, layer.calibration
    costs = ErrorCosts(layer, align=method != "average", refit=method == "refit")
    y = project(w, heads_output(w, c.x_STD, c.cos_Td, c.sin_Td), bias=False)
    assert costs.energy() == pytest.approx(float(y.double().square().sum()), rel=1e-5)
    for part, block_ in [((0,), (0, 1)), ((1,), (2,)), ((0, 2), (1, 4)), ((0, 1, 2), (0, 3, 5))]:
        rest = [h for g in part for h in (2 * g, 2 * g + 1) if h not in block_]
        others = [(g,) for g in range(3) if g not in part]
        clusters = (block_, *((h,) for h in range(6) if h not in block_))
        plan = Plan(tuple(sorted([part, *others])), tuple(sorted(clusters)), reduce=True)
        # only this cluster speaks, before and after
        quiet = w.o_HDd.clone()
        quiet[[h for h in range(6) if h not in block_]] = 0
        alone = replace(w, o_HDd=quiet)
        small = merge_layer_uneven(alone, plan, "average" if method == "average" else "aligned", c)
        if method == "refit":
            small = refit_output(alone, small, c, layer.ridge)
        wanted = relative_error(alone, small, c) ** 2
        whole = project(alone, heads_output(alone, c.x_STD, c.cos_Td, c.sin_Td), bias=False)
        wanted *= float(whole.double().square().sum())
        found = costs(part)([block_, *((h,) for h in rest)])
        assert found[0] == pytest.approx(wanted, rel=1e-3, abs=1e-6 * costs.energy())
        assert costs(part)([block_])[0] == pytest.approx(found[0], rel=1e-5, abs=1e-9 * wanted)


def merge_layer_uneven(w, plan, method, calibration):
    """Merge a part and keep only its first cluster's head, so that head counts come out even."""
    order = [c for part in plan.groups for c in plan.clusters if set(plan.span(c)) <= set(part)]
    small = merge_layer(w, plan, method, calibration)
    head = next(i for i, c in enumerate(order) if small.o_HDd[i].any())
    part = plan.part(order[head][0] // plan.heads_per_group)
    group = plan.groups.index(part)

    def pick(tensor, index):
        return None if tensor is None else tensor[[index]]

    return replace(
        small,
        q_HdD=small.q_HdD[[head]],
        o_HDd=small.o_HDd[[head]],
        k_GdD=small.k_GdD[[group]],
        v_GdD=small.v_GdD[[group]],
        q_bias_Hd=pick(small.q_bias_Hd, head),
        k_bias_Gd=pick(small.k_bias_Gd, group),
        v_bias_Gd=pick(small.v_bias_Gd, group),
    )


def test_controls_have_equal_parameters_and_cost_more():
    model = planted(heads=8, groups=4, copies=((0, 1), (2, 3), (4, 5), (6, 7)), width=96)
    names = ["", "-random0", "-random1", "-dissimilar"]
    similarity = naive_similarity(model)
    for start, given in [("error-aligned-b2x2", None), ("relu-aligned-t0.9999", similarity)]:
        found = {name: merged(model, f"merge-{start}{name}", given) for name in names}
        assert len({parameters(small) for small, *_ in found.values()}) == 1
        assert len({log["total_heads_live"] for _, log, _ in found.values()}) == 1
    step = parse_step("merge-error-aligned-b2x2")
    state, config, inputs = state_of(model), config_of(model), inputs_of(model)
    chosen = plan_layers(state, config, step, None, inputs, SETTINGS)
    costs = ErrorCosts(layer_of(model))
    draws = [random_budget_plan((2, 2), 8, 4, np.random.default_rng(s)) for s in range(8)]
    errors = [plan_cost(plan, costs) for plan in draws]
    new = merge_model(
        state, config, replace(step, control="dissimilar"), None, inputs, SETTINGS, chosen=chosen
    )
    worst = new[2]["merged_layers"]["0"]
    assert plan_cost(chosen[0], costs) < np.mean(errors)
    parts = tuple(tuple(p) for p in worst["key_value_parts"])
    clusters = [tuple(c) for c in worst["clusters"]]
    single = [(h,) for h in range(8) if not any(h in c for c in clusters)]
    parts += tuple((g,) for g in range(4) if not any(g in p for p in parts))
    assert plan_cost(Plan(parts, (*clusters, *single), True), costs) >= max(errors) * 0.999
    assert worst["control"]["kind"] == "dissimilar" and worst["control"]["overlap"] < 1


def test_controls_are_reproducible_and_said():
    model = planted(heads=8, groups=4, copies=((0, 1), (2, 3)), width=96)
    similarity = naive_similarity(model)
    step = "merge-relu-refit-t0.9999-random"
    (_, one, first), (_, same, second), (_, other, _) = (
        merged(model, f"{step}{seed}", similarity) for seed in (3, 3, 4)
    )
    assert one == same and all(torch.equal(first[name], second[name]) for name in first)
    clusters = [log["merged_layers"][str(i)]["clusters"] for log in (one, other) for i in (0, 1)]
    assert all(c != [[0, 1], [2, 3]] for c in clusters) and clusters[:2] != clusters[2:]
    assert one["step"]["control"] == "random3"
    whole = np.ones((2, 8, 8))
    _, log, _ = merged(model, f"{step}0", whole)
    assert "no control exists" in log["merged_layers"]["0"]["control"]["note"]


def test_infeasible_budgets_are_refused():
    model = build("llama", 4, 2)
    with pytest.raises(InputError, match="recipe part 'b2x3'"):
        merged(model, "merge-error-aligned-b2x3")
    with pytest.raises(InputError, match="n at most 2"):
        merged(model, Remove("flap", "drop", "b1x4"))
    biased = build("llama", 4, 4, attention_bias=True, width=52)
    with pytest.raises(InputError, match="attention_bias is true"):
        merged(biased, "merge-error-aligned-b3x1")


@pytest.mark.parametrize("method", ["drop", "refit"])
def test_removing_a_silent_head_loses_nothing(method):
    model = planted("qwen2", scale=0.0)  # copies with W_O = 0
    small, log, _ = merged(model, Remove("wanda_sp", method, "b2x1"))
    assert [e["removed"] for e in log["merged_layers"].values()] == [[1, 3]] * 2
    assert torch.allclose(logits(small), logits(model), **CLOSE)


def test_full_budget_keeps_all():
    model = build()
    same, log, changed = merged(model, "merge-error-aligned-b2x2")
    assert not changed and torch.equal(logits(same), logits(model))
    assert log["budget"] == {"key_value_heads": 2, "each": 2}


def test_stock_transformers_reads_it_in_a_fresh_process(tmp_path):
    """A Llama whose width isn't a multiple of its heads any more becomes a Mistral."""
    model = build("llama", 4, 4, width=64, d=D)
    state = state_of(model)
    for layer in range(2):
        still = torch.ones(D // 2, dtype=torch.complex128)
        copy_group(state, layer, 0, 2, D, 1, still, torch.eye(D, dtype=torch.float64))
    model = rebuilt(config_of(model), state)
    model.save_pretrained(tmp_path / "parent")
    config = json.loads((tmp_path / "parent" / "config.json").read_text())
    step = parse_step("merge-error-average-b3x1")
    save_file(inputs_of(model), tmp_path / "inputs.safetensors")
    inputs = InputFile(tmp_path / "inputs.safetensors")
    assert set(inputs) == {"layer.0", "layer.1", "cos", "sin"} and "sin" in inputs
    parent = Tensors(tmp_path / "parent")
    new, changed, _ = merge_model(parent, config, step, None, inputs, SETTINGS)
    (tmp_path / "child").mkdir()
    write_derived(
        tmp_path / "parent", tmp_path / "child", new, lambda name, old: changed.get(name, old)
    )
    torch.save(tokens(seed=2), tmp_path / "tokens.pt")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
child = {str(tmp_path / "child")!r}
model, info = AutoModelForCausalLM.from_pretrained(child, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    found = model.eval()(torch.load({str(tmp_path / "tokens.pt")!r})).logits
torch.save((found, model.config.model_type, model.config.num_attention_heads,
            sum(p.numel() for p in model.parameters())), {str(tmp_path / "found.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path("/"))
    found, kind, heads, count = torch.load(tmp_path / "found.pt")
    assert (kind, heads) == ("mistral", 3)
    assert torch.allclose(found, logits(model), **CLOSE)
    assert count == parameters(model) - 2 * 4 * 64 * D  # q, k, v and o of a head, two layers


def test_average_conserves_the_sum_of_outputs():
    """Σ W_O stays what it was while copies stay."""
    model = build("llama", 4, 2)
    plan = threshold_plan(np.ones((4, 4)), 0.9, 2)
    w = weights_of(model)
    merged_ = merge_layer(w, plan.within_parts(), "average")
    assert torch.allclose(merged_.o_HDd.sum(0), w.o_HDd.sum(0), atol=1e-5)
