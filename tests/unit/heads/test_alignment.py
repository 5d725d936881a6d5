"""Gauge changes leave the function alone, and alignment finds the one that was planted."""

import math

import pytest
import torch
from small_models import (
    block,
    build,
    config_of,
    copy_group,
    inputs_of,
    logits,
    random_gauge,
    rebuilt,
    state_of,
    times_planes,
)

from headroom.checkpoints import geometry
from headroom.heads.alignment import (
    Gauge,
    gauge,
    gauge_statistics,
    medoid,
    move_group,
    scale_planes,
)
from headroom.heads.weights import Calibration, named, read

D = 12


def layer_of(model, state=None, index=0, batch=4):
    """Weights and statistics of a layer, in float64."""
    state = {k: t.double() for k, t in (state or state_of(model)).items()}
    config = config_of(model)
    inputs = inputs_of(rebuilt(config, state).double())
    calibration = Calibration(inputs[f"layer.{index}"], inputs["cos"], inputs["sin"], batch)
    weights = read(state, geometry(config), index, config)
    return weights, gauge_statistics(weights, calibration)


def even_norms(model, layers=2):
    """Make the norm weights of Qwen3 agree in m and m + d/2."""
    with torch.no_grad():
        for layer in model.model.layers[:layers]:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.weight[D // 2 :] = norm.weight[: D // 2]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_moving_a_group_changes_nothing(family):
    model = build(family)
    config, state = config_of(model), state_of(model)
    z, rotation = random_gauge(D, seed=3, modulus=family != "qwen3", signs=family == "qwen3")
    weights = read(state, geometry(config), 1, config)
    moved = move_group(weights, 1, Gauge(z, rotation))
    assert (moved.q_HdD - weights.q_HdD).abs().amax((1, 2)).gt(0.1).tolist() == [False] * 2 + [
        True
    ] * 2
    again = rebuilt(config, state | named(moved, 1))
    assert torch.allclose(logits(again), logits(model), atol=1e-4)
    # the opposite convention for queries is another function: the test can fail
    wrong = scale_planes(weights.q_HdD[2:], z, 1)
    if family == "llama":
        name = "model.layers.1.self_attn.q_proj.weight"
        bad = named(moved, 1)
        bad[name][2 * D :] = wrong.reshape(-1, wrong.shape[-1])
        assert not torch.allclose(logits(rebuilt(config, state | bad)), logits(model), atol=1e-2)


@pytest.mark.parametrize(
    ("family", "even"), [("llama", False), ("qwen2", False), ("qwen3", False), ("qwen3", True)]
)
def test_planted_gauge_is_found(family, even):
    model = build(family)
    if even:
        even_norms(model)
    state = state_of(model)
    turned = family != "qwen3" or even
    z, rotation = random_gauge(D, seed=5, modulus=family != "qwen3", signs=not turned)
    copy_group(state, 0, source=0, target=1, d=D, each=2, z=z, rotation=rotation)
    _, statistics = layer_of(model, state)
    assert statistics.free_p.all() == turned or not statistics.free_p.any()
    found = gauge(statistics, target=0, source=1)  # moves the copy back
    assert torch.allclose(found.planes_p, 1 / z, atol=1e-5)
    # v_copy = A v, so R must undo it: v_copy R = v with R = A (row convention v ↦ v Aᵀ)
    assert torch.allclose(found.values_dd, rotation, atol=1e-5)
    assert statistics.distances_GG[0, 1].abs() < 1e-9
    back = gauge(statistics, target=1, source=0)
    assert torch.allclose(back.planes_p * found.planes_p, torch.ones(D // 2).to(z), atol=1e-9)


def test_statistics_are_sums_over_tokens():
    """Against loops over tokens; batches change nothing."""
    model = build("qwen2")
    weights, statistics = layer_of(model, batch=6)
    _, other = layer_of(model, batch=1)
    assert torch.allclose(statistics.keys_GGp, other.keys_GGp, rtol=1e-12)
    x = inputs_of(model.double())["layer.0"].reshape(-1, 48)
    keys = [x @ weights.k_GdD[g].T + weights.k_bias_Gd[g] for g in range(2)]
    values = [x @ weights.v_GdD[g].T + weights.v_bias_Gd[g] for g in range(2)]
    half, m = D // 2, 2
    total = 0
    for t in range(len(x)):
        first = complex(keys[0][t, m], keys[0][t, m + half])
        second = complex(keys[1][t, m], keys[1][t, m + half])
        total += first * second.conjugate()
    assert abs(complex(statistics.keys_GGp[0, 1, m]) - total) < 1e-9 * abs(total)
    assert torch.allclose(statistics.values_GdGd[1, :, 0, :], values[1].T @ values[0])


def test_gauge_is_the_best_phase_and_rotation():
    """No nearby phase or rotation brings unlike heads closer (they are random here)."""
    model = build("llama", 4, 2)
    weights, statistics = layer_of(model)
    x = inputs_of(model.double())["layer.0"].reshape(-1, 48)
    keys, values = ([x @ rows[g].T for g in range(2)] for rows in (weights.k_GdD, weights.v_GdD))
    found = gauge(statistics, target=0, source=1)

    def distance(turn, rotation):
        moved = scale_planes(keys[1], found.planes_p * turn)
        error_k = (keys[0] - moved).square().sum()
        return float(error_k), float((values[0] - values[1] @ rotation).square().sum())

    still = torch.ones(D // 2, dtype=torch.complex128)
    best_k, best_v = distance(still, found.values_dd)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        angle = 0.3 * torch.randn(D // 2, generator=generator, dtype=torch.float64)
        skew = torch.randn(D, D, generator=generator, dtype=torch.float64) * 0.1
        turned = found.values_dd @ torch.linalg.matrix_exp(skew - skew.T)
        other_k, other_v = distance(torch.polar(torch.ones_like(angle), angle), turned)
        assert other_k > best_k and other_v > best_v


def test_zero_keys_and_values_give_no_nan():
    model = build()
    state = state_of(model)
    for kind in ("k_proj.weight", "v_proj.weight"):
        block(state, 0, kind, 1, D).zero_()
    _, statistics = layer_of(model, state)
    found = gauge(statistics, 0, 1)
    assert torch.isfinite(torch.view_as_real(found.planes_p)).all() and (found.planes_p == 1).all()
    assert torch.allclose(found.values_dd @ found.values_dd.T, torch.eye(D).double())
    assert statistics.distances_GG.isfinite().all() and medoid(statistics, (0, 1)) in (0, 1)


def test_medoid_is_the_nearest_to_the_others_in_any_order():
    model = build("llama", 4, 4)
    state = state_of(model)
    noise = torch.Generator().manual_seed(0)
    base = {k: block(state, 0, f"{k}_proj.weight", 0, D).clone() for k in "kv"}
    sizes = {1: 0.5, 2: 0.05, 3: 0.5}  # group 2 is the common origin, hardly disturbed
    for group, size in {0: 0.5, **sizes}.items():
        for kind, rows in base.items():
            other = torch.randn(rows.shape, generator=noise) * size * rows.std()
            block(state, 0, f"{kind}_proj.weight", group, D).copy_(rows + other)
    _, statistics = layer_of(model, state)
    assert medoid(statistics, (0, 1, 2, 3)) == 2
    order = [2, 3, 1, 0]
    for letter, sized in (("k", 4), ("v", 4)):
        name = f"model.layers.0.self_attn.{letter}_proj.weight"
        state[name] = state[name].view(sized, D, -1)[order].reshape(4 * D, -1)
    _, permuted = layer_of(model, state)
    assert medoid(permuted, (0, 1, 2, 3)) == 0
    # two are equally near: told apart by content, not by place
    assert order[medoid(permuted, (0, 1))] == medoid(statistics, (2, 3))
    assert order[medoid(permuted, (2, 3))] == medoid(statistics, (0, 1))  # these changed places


def test_planes_are_complex_numbers():
    rows = torch.randn(D, 5, generator=torch.Generator().manual_seed(0))
    z, _ = random_gauge(D)
    assert torch.allclose(scale_planes(rows, z, 0), times_planes(rows, z), atol=1e-6)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.tensor([math.pi / 2]).double())
    pair = scale_planes(torch.tensor([1.0, 0.0]), turn)
    assert torch.allclose(pair, torch.tensor([0.0, 1.0]), atol=1e-7)
