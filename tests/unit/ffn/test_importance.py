"""Scores, keep sets and widths against naive formulas, closed forms and invariances."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headroom.errors import InputError
from headroom.ffn.importance import (
    GRADIENT_SCORES,
    SCORES,
    Channels,
    kept_channels,
    score_channels,
    standardised,
    widths,
)
from headroom.ffn.layers import canonical_scale, live_channels, named, read
from headroom.ffn.observe import angular_distance, leverage, observe

from .small_ffns import build, pruned, rebuilt, selection, source_of, state_of, tokens


def seen_by(model, index):
    """H, and the states before and after a layer, by plain hooks."""
    found = {}
    layer = model.model.layers[index]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, a: found.update(h=a[0])),
        layer.register_forward_hook(lambda _, a, y: found.update(before=a[0], after=y)),
    ]
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    return {name: value.flatten(0, 1).double().numpy() for name, value in found.items()}


def z(x):
    return (x - x.mean()) / x.std(ddof=1)


@pytest.mark.parametrize("biases", [False, True])
def test_scores_are_their_formulas(biases):
    """From raw weights and activations: each formula says how the scale cancels."""
    model = build(mlp_bias=biases)
    source = source_of(model, gradients=True)
    for index, layer in enumerate(model.model.layers):
        gate, up, down = (
            getattr(layer.mlp, f"{part}_proj").weight.detach().numpy()
            for part in ("gate", "up", "down")
        )
        seen = seen_by(model, index)
        h, u, d = seen["h"], np.linalg.norm(up, axis=1), np.linalg.norm(down, axis=0)
        own = h * np.sqrt(d / u)
        gram = own.T @ own
        weight = 1e-3 * np.trace(gram) / len(gram)
        wanted = {
            "magnitude": np.sqrt(np.square(gate).sum(1) + 2 * u * d),
            "wanda_sp": np.linalg.norm(h, axis=0) * np.abs(down).sum(0),
            "flap": z(h.var(0, ddof=1) * d**2),
            "leverage": np.diag(gram @ np.linalg.inv(gram + weight * np.eye(len(gram)))),
        }
        channels = channels_of(source, index)
        for name, score in wanted.items():
            np.testing.assert_allclose(score_channels(name, channels), score, rtol=1e-9, atol=1e-9)
        statistics = {n: v.numpy() for n, v in source.gradients[index].items()}
        for name in GRADIENT_SCORES:
            key = {"fo_snip": "channel", "abs_fo_snip": "channel_abs"}.get(name, name)
            score = z(statistics[f"fo.{key}"]) + z(statistics[f"snip.{key}"])
            np.testing.assert_allclose(score_channels(name, channels), score, rtol=1e-9)
        found = source.activations[index]
        assert float(found["count"]) == len(h)
        cosine = (seen["before"] * seen["after"]).sum(1)
        cosine /= np.linalg.norm(seen["before"], axis=1) * np.linalg.norm(seen["after"], axis=1)
        np.testing.assert_allclose(found["angle"], np.arccos(cosine).mean() / np.pi, rtol=1e-9)


def channels_of(source, index, seed=0):
    ffn, _ = source.dense(index)
    ffn = ffn.scaled(canonical_scale(ffn))
    return Channels(ffn, source.activations[index], source.gradients[index], seed, index)


def test_measurements_do_not_depend_on_batches():
    model = build("qwen2")
    state, config = state_of(model), model.config.to_dict()
    one, two = (observe(model, state, config, tokens(), 1e-3, batch=b) for b in (1, 5))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() == {"count", "mean", "squares", "leverage", "angle"}
        for name in a:
            assert a[name].dtype == torch.float64
            torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)


def test_leverage_in_closed_form():
    """g / (g + λ) of orthogonal channels, g / (2g + λ) of two equal ones, 1 − λ Σ v² / (e + λ)."""
    diagonal = torch.tensor([5.0, 1, 0, 2], dtype=torch.float64)
    weight = 0.1 * 2
    found = leverage(diagonal.diag(), 0.1)
    torch.testing.assert_close(found, diagonal / (diagonal + weight))
    twins = torch.block_diag(torch.full((2, 2), 4.0), torch.tensor([[4.0]])).double()
    torch.testing.assert_close(
        leverage(twins, 0.1), torch.tensor([4 / 8.4, 4 / 8.4, 4 / 4.4], dtype=torch.float64)
    )
    torch.testing.assert_close(leverage(1e9 * twins, 0.1), leverage(twins, 0.1))
    assert not leverage(torch.zeros(3, 3).double(), 0.1).any()
    rank = torch.randn(5, 12, dtype=torch.float64)
    total = leverage(rank.T @ rank, 1e-9).sum()
    assert abs(float(total) - 5) < 1e-6


def test_angles_in_closed_form():
    x = torch.randn(2, 5, 8)
    y = torch.stack([-x[..., 1], x[..., 0], -x[..., 3], x[..., 2], *x[..., 4:].unbind(-1)], -1)
    y[..., 4:], x[..., 4:] = 0, 0
    assert angular_distance([x], [3 * x]) < 1e-4
    assert abs(angular_distance([x, x], [-x, y]) - 0.75) < 1e-6


def test_random_is_drawn_by_seed_and_layer():
    source = source_of(build(layers=3))
    source = replace(source, gradients=[{}] * 3)
    draws = [score_channels("random", channels_of(source, i, s)) for i in (0, 1) for s in (0, 1)]
    assert torch.equal(draws[0], score_channels("random", channels_of(source, 0, 0)))
    assert all(not torch.equal(a, b) for n, a in enumerate(draws) for b in draws[:n])
    sets = [
        pruned(source, f"prune-random-drop-r0.50{s}")[0].selection.kept for s in ("", "", "-s7")
    ]
    assert all(torch.equal(a, b) for a, b in zip(sets[0], sets[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(sets[0], sets[2], strict=True))


@pytest.mark.parametrize("bad", [lambda c: torch.full((24,), torch.nan), lambda c: torch.ones(23)])
def test_bad_scores_are_named(monkeypatch, bad):
    monkeypatch.setitem(SCORES, "mine", bad)
    with pytest.raises(InputError, match=r"^score mine: layer 0 .*allowed: 24 finite numbers"):
        score_channels("mine", replace(channels_of(source_of(build(), True), 0)))


def test_standardised_has_no_noise():
    for size in (1, 3, 24):
        assert not standardised(torch.full((size,), 0.1, dtype=torch.float64)).any()
    x = torch.randn(50, dtype=torch.float64)
    np.testing.assert_allclose(standardised(x), z(x.numpy()), rtol=1e-12)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_the_highest_stay_the_first_of_equal_ones(scores, data):
    width = data.draw(st.integers(1, len(scores)))
    naive = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:width])
    assert kept_channels(torch.tensor(scores).double(), width).tolist() == naive


# widths


def uniform_scores(layers, channels):
    generator = torch.Generator().manual_seed(0)
    return list(torch.rand(layers, channels, generator=generator, dtype=torch.float64))


def test_ratios_are_exact():
    """floor(0.29 · 100) is 29, though 0.29 * 100 is below it."""
    assert int(0.29 * 100) == 28
    for n, percent in [(100, p) for p in range(100)] + [(14336, 7), (24, 99), (1, 50)]:
        kept = widths(f"r0.{percent:02d}", uniform_scores(2, n), [0.1, 0.2], 1, n)
        assert kept == [n - n * percent // 100] * 2 and kept[0] >= 1


@pytest.mark.parametrize("kind", "rga")
def test_widths_round_up_to_a_multiple(kind):
    scores, angles = uniform_scores(5, 50), [0.1, 0.5, 0.2, 0.3, 0.9]
    raw = widths(f"{kind}0.30", scores, angles, 1, 50)
    eight = widths(f"{kind}0.30", scores, angles, 8, 50)
    assert sum(raw) == 5 * 35
    assert eight == [min(50, (w + 7) // 8 * 8) for w in raw]
    with pytest.raises(InputError, match=r"ffn\.multiple is 128: at ratio .0\.30 every layer"):
        widths(f"{kind}0.30", scores, angles, 128, 50)
    assert widths(f"{kind}0.00", scores, angles, 1, 50) == [50] * 5


def test_global_widths_are_a_naive_ranking():
    scores = [s * (i + 1) + i for i, s in enumerate(uniform_scores(4, 30))]
    scores[2] = scores[2] ** 9  # few channels matter: most of them go
    flat = np.concatenate([z(s.numpy()) for s in scores])
    chosen = np.argsort(-flat)[: 4 * 21]
    wanted = np.bincount(chosen // 30, minlength=4).tolist()
    found = widths("g0.30", scores, [0.0] * 4, 1, 30)
    assert found == wanted and len(set(found)) > 1
    assert widths("g0.30", [5 - 3 * s for s in scores], [0.0] * 4, 1, 30) != found
    assert widths("g0.30", [5 + 3 * s for s in scores], [0.0] * 4, 1, 30) == found


angles_of = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(angles_of, st.integers(1, 99), st.integers(1, 60))
def test_angular_widths_share_the_total(angles, percent, n):
    try:
        kept = widths(f"a0.{percent:02d}", uniform_scores(len(angles), n), angles, 1, n)
    except InputError as error:  # a few channels and most of them gone
        assert "would keep no channel" in str(error) and n * (100 - percent) < 500
        return
    total = len(angles) * (n - int(n * Fraction(percent, 100)))
    assert sum(kept) == total
    assert all(1 <= width <= n for width in kept)
    order = np.argsort(angles, kind="stable")
    assert all(kept[a] <= kept[b] + 1 for a, b in pairwise(order))


def test_angular_widths_follow_a_sigmoid():
    """No layer is full: keep_l / total = σ(z_l) / Σ σ(z)."""
    angles = np.array([0.1, 0.15, 0.3, 0.25])
    share = 1 / (1 + np.exp(-z(angles)))
    kept = widths("a0.50", uniform_scores(4, 1000), angles.tolist(), 1, 1000)
    np.testing.assert_allclose(kept, 2000 * share / share.sum(), atol=1)
    full = widths("a0.10", uniform_scores(4, 1000), angles.tolist(), 1, 1000)
    rest = 3600 - 1000 * full.count(1000)
    small = [i for i in range(4) if full[i] < 1000]
    np.testing.assert_allclose(
        [full[i] for i in small], rest * share[small] / share[small].sum(), atol=1
    )
    assert 1000 in full and sum(full) == 3600
    assert widths("a0.50", uniform_scores(3, 9), [0.2] * 3, 1, 9) == [5] * 3


# free scales and order


def turned(model, seed, permute=True, scale=True):
    """The same function with channels in another order and scale; and the order by layer."""
    state, orders = state_of(model), []
    generator = torch.Generator().manual_seed(seed)
    for index in range(model.config.num_hidden_layers):
        ffn = read(state, index, model.config.to_dict())
        order = torch.randperm(ffn.channels, generator=generator)
        c = torch.randn(ffn.channels, generator=generator, dtype=torch.float64)
        ffn = ffn.pick(order) if permute else ffn
        ffn = ffn.scaled(c.sign() * (0.2 + c.abs())) if scale else ffn
        state |= dict(named(ffn, index))
        orders.append(order if permute else torch.arange(ffn.channels))
    return rebuilt(model.config.to_dict(), state), orders


@pytest.mark.parametrize("ratio", ["r0.30", "g0.30", "a0.30"])
@pytest.mark.parametrize("biases", [False, True])
def test_selection_knows_no_order_and_no_scale(ratio, biases):
    model = build(mlp_bias=biases, layers=3)
    other, orders = turned(model, 4)
    sources = [source_of(m, gradients=True) for m in (model, other)]
    for score in (*SCORES, *GRADIENT_SCORES):
        if score == "random":
            continue
        one, two = (selection(s, f"prune-{score}-drop-{ratio}") for s in sources)
        for a, b, order in zip(one.kept, two.kept, orders, strict=True):
            assert set(a.tolist()) == set(order[b].tolist()), score
        for a, b, order in zip(one.scores, two.scores, orders, strict=True):
            torch.testing.assert_close(a[order], b, rtol=1e-7, atol=1e-7)


def test_padded_layers_lose_no_live_channel_for_a_dead_one():
    """Zeros take part in no score, mean or choice."""
    model = build(channels=20)
    state, config = state_of(model), model.config.to_dict()
    generator = torch.Generator().manual_seed(1)
    places = []
    for index in range(2):
        wide = read(state, index, config).padded(27 + index)
        order = torch.randperm(wide.channels, generator=generator)
        state |= dict(named(wide.pick(order).padded(28), index))
        places.append({int((order == c).nonzero()) for c in range(20)})
    padded = rebuilt(config | {"intermediate_size": 28}, state)
    sources = [source_of(m, gradients=True) for m in (model, padded)]
    for index, place in enumerate(places):
        assert set(sources[1].dense(index)[1].tolist()) == place
        assert len(live_channels(read(state, index, config))) == 20
    for score in ("flap", "magnitude", "wanda_sp", "fo_snip", "max"):
        # 28 − floor(28 · 0.5) = 14 stay, as 20 − floor(20 · 0.3)
        one, two = (
            selection(source, f"prune-{score}-drop-{ratio}")
            for source, ratio in zip(sources, ("r0.30", "r0.50"), strict=True)
        )
        for index in range(2):
            ffns = [
                s.dense(index)[0].pick(c.kept[index])
                for s, c in zip(sources, (one, two), strict=True)
            ]
            rows = [sorted(map(tuple, ffn.up_nD.tolist())) for ffn in ffns]
            assert rows[0] == rows[1], score
