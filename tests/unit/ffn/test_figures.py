"""Figures carry the numbers that they were given, at the sizes that occur."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array

from headroom import plotting
from headroom.ffn import figures
from headroom.ffn.tables import table

SETTING = "docs, evaluation split: 128 windows of 128 tokens, float32, calibration seeds 0, 1, 2"
BOOTSTRAP = {"resamples": 20, "confidence": 0.95, "seed": 0}
DAMAGE = {"drop": 4.0, "bias": 3.4, "ot_column": 5.2, "ot_mass": 3.8, "ridge": 1.2, "ot_ridge": 1.4}
DAMAGE |= {"ridge_sequential": 1.0, "ot_ridge_sequential": 1.1}
METHODS = [f"flap-{fusion}" for fusion in DAMAGE] + ["random-drop", "random-ot_mass"]
METHODS += ["abs_fo_snip-drop", "abs_fo_snip-ot_mass"]
VARIANTS = ["", "-uniform", "-weight_aware_to_uniform", "-cityblock", "-partial"]


def swept(seed, methods=METHODS, selections=("r0.10", "r0.20", "r0.30", "r0.50")):
    """A sweep's documents as they come out: damage grows with the ratio, seeds differ."""
    generator = np.random.default_rng(seed)
    tokens = np.array([120, 300, 80])
    frames = [sized("dense", 3.0 * tokens, tokens, 0.0)]
    for method in methods:
        score, fusion, *rest = method.split("-")
        for selection in selections:
            ratio = float(selection[1:])
            worse = DAMAGE[fusion] * (1.4 if score == "random" else 1) * ratio**1.7
            worse *= 0.9 if selection[0] != "r" else 1 + 0.05 * len("-".join(rest))
            loss = (3.0 + worse * generator.normal(1, 0.06)) * tokens
            step = "-".join(["prune", score, fusion, selection, *rest])
            removed = ratio * (0.96 if selection[0] == "g" else 1)
            frames.append(sized(step, loss, tokens, removed))
    return pd.concat(frames, ignore_index=True)


def sized(step, nll, tokens, removed):
    left = {"effective_parameters": 1000 - round(700 * removed), "ffn_parameters": 700}
    found = pd.DataFrame({"document": range(len(tokens)), "nll": nll, "tokens": tokens})
    return found.assign(step=step, correct=tokens // 3, parameters=1000, **left)


def made(methods=METHODS, selections=("r0.10", "r0.20", "r0.30", "r0.50")):
    documents = {seed: swept(seed, methods, selections) for seed in range(3)}
    setting = {"corpus": "docs", "window": 128}
    return table(documents, dict.fromkeys(documents, setting), BOOTSTRAP)


def lines(axis):
    """The error bars' containers by label, as (x, y, ends of the bars)."""
    found = {}
    for container in axis.containers:
        data, _, bars = container.lines
        ends = np.array([segment[:, 1] for segment in bars[0].get_segments()])
        found.setdefault(container.get_label(), []).append(
            (*np.array(data.get_data(), float), ends)
        )
    return found


def test_perplexity_lines_carry_means_and_ranges(tmp_path):
    rows = made()
    fig = figures.perplexity_ratio(rows, SETTING)
    axis, drawn = fig.axes[0], lines(fig.axes[0])
    assert len(drawn) == len(METHODS)
    for method in METHODS:
        part = rows[rows.step.str.startswith(f"prune-{method}-")].sort_values("ratio")
        label = method.replace("-", ", ").replace("_sequential", " sequential")
        (x, y, ends) = drawn[label][0]
        np.testing.assert_allclose(x, [10, 20, 30, 50])
        np.testing.assert_allclose(y, part.perplexity)
        np.testing.assert_allclose(ends[:, 0], part.perplexity_min, rtol=1e-12)
        np.testing.assert_allclose(ends[:, 1], part.perplexity_max, rtol=1e-12)
    assert axis.get_yscale() == "log"
    dense = [line for line in axis.lines if line.get_label() == "not pruned"]
    assert dense[0].get_ydata()[0] == pytest.approx(np.exp(3.0))
    plotting.save(fig, tmp_path / "perplexity.png")


def test_looks_tell_every_method_from_the_others():
    methods = [f"prune-{m}-r0.50" for m in METHODS]
    methods += [f"prune-flap-ot_mass-r0.50{variant}" for variant in VARIANTS[1:]]
    fields = pd.DataFrame([figures.step_fields(step) for step in methods])
    drawn, shared = figures.styles(fields)
    looks = {(s["color"], s["marker"], s["linestyle"]) for s in drawn.values()}
    assert len(looks) == len({s["label"] for s in drawn.values()}) == len(methods)
    assert shared == "unless named:\npushforward, cosine, exact"
    _, shared = figures.styles(fields[(fields.score == "flap") & (fields.cost != "cityblock")])
    assert shared == "unless named:\nflap, pushforward, cosine, exact"


def test_a_crowded_legend_names_the_best_and_counts_the_rest():
    scores = ("flap", "wanda_sp", "leverage", "magnitude", "random", "max", "std", "p95")
    fusions = ("drop", "ot_mass", "ridge", "ot_ridge")
    rows = made([f"{s}-{f}" for s in scores for f in fusions], ("r0.30",))
    fig = figures.perplexity_ratio(rows, SETTING)
    legend = fig.legends[0]
    assert len(legend.get_texts()) == figures.NAMED < len(lines(fig.axes[0]))
    assert f"{len(scores) * len(fusions) + 1 - figures.NAMED} more" in legend.get_title().get_text()


def test_widths_by_layer_are_hollow_and_named_once(tmp_path):
    rows = made(["flap-drop", "flap-ot_mass"], ("r0.20", "r0.50", "g0.50", "a0.20"))
    fig = figures.perplexity_ratio(rows, SETTING)
    drawn = lines(fig.axes[0])
    assert len(drawn["drop"]) == 1 and len(drawn["ot_mass"]) == 1
    hollow = [c for c in fig.axes[0].containers if c.get_label().startswith("_")]
    assert len(hollow) == 2
    assert hollow[0].lines[0].get_markerfacecolor() == "white"
    np.testing.assert_allclose(hollow[0].lines[0].get_xdata().astype(float), [20, 48])
    assert sorted(text.get_text() for text in fig.axes[0].texts) == ["a", "a", "g", "g"]
    only = figures.perplexity_ratio(made(["flap-drop"], ("g0.50",)), SETTING)
    assert list(lines(only.axes[0])) == ["drop"]
    plotting.save(fig, tmp_path / "hollow.png")


def rescued(seed, count=30, variants=VARIANTS):
    generator = np.random.default_rng(seed)
    layers = np.arange(count)
    frames = []
    for selection in ("r0.30", "r0.50", "r0.70"):
        for fusion in ("drop", "ot_mass", "ot_column", "ot_ridge"):
            for variant in variants if fusion == "ot_mass" else [""]:
                harm = {"ot_mass": 0.15, "ot_column": -1.6, "ot_ridge": 0.6, "drop": 0.0}[fusion]
                value = harm + 0.1 * np.sin(layers / 4) + generator.normal(0, 0.04, count)
                moved = 0.8 if variant == "-partial" else 1.0
                found = {
                    "step": f"prune-flap-{fusion}-{selection}{variant}",
                    "layer": layers,
                    "functional_rescue": value,
                    "mass_rescue": moved if fusion != "drop" else None,
                    "dilution": 0.3 + 0.05 * len(variant) / 10 + generator.normal(0, 0.01, count),
                }
                frames.append(pd.DataFrame(found))
    return pd.concat(frames, ignore_index=True)


def test_rescue_by_layer_carries_means_and_clips_harm(tmp_path):
    layers = {seed: rescued(seed) for seed in range(3)}
    fig = figures.rescue_layers(layers, SETTING)
    first = fig.axes[0]
    assert "50 % of channels removed" in first.get_title()
    drawn = lines(first)
    assert len(drawn) == 7 and "drop" not in " ".join(drawn)
    every = pd.concat(layers.values())
    means = every.groupby(["step", "layer"]).functional_rescue.mean()
    label = "ot_mass"
    x, y, _ = drawn[label][0]
    np.testing.assert_allclose(y, means["prune-flap-ot_mass-r0.50"])
    assert np.abs(np.asarray(x) - np.arange(30)).max() < 0.5
    harm = means["prune-flap-ot_column-r0.50"]
    arrows = [line for line in first.lines if line.get_marker() == "$↓$"]
    assert sum(len(line.get_xdata()) for line in arrows) == (harm < -1).sum() > 0
    assert f"{harm.min():.3g}".replace("-", "−") in first.get_title()
    assert first.get_ylim()[0] >= -1.1
    partial = [y for label, ((_, y, _),) in lines(fig.axes[1]).items() if np.allclose(y, 0.8)]
    assert len(partial) == 1
    plotting.save(fig, tmp_path / "rescue.png")


@pytest.mark.parametrize(
    ("selections", "chosen"),
    [
        (["r0.10", "r0.50", "r0.30", "r0.70"], "r0.50"),
        (["r0.70", "r0.90"], "r0.70"),
        (["g0.50", "r0.20"], "r0.20"),
        (["g0.50", "g0.30"], "g0.50"),
    ],
)
def test_the_ratio_shown_is_the_largest_up_to_a_half(selections, chosen):
    steps = ["dense", "prune-flap-drop-r0.40", *(f"prune-flap-ot_mass-{s}" for s in selections)]
    assert figures.shown_selection(steps) == chosen


def test_a_sweep_without_transport_or_harm_is_drawn_too(tmp_path):
    layers = rescued(0)
    without = {0: layers[layers.step.str.contains("drop")]}
    plotting.save(figures.rescue_layers(without, SETTING), tmp_path / "none.png")
    one = {0: layers[layers.step == "prune-flap-ot_ridge-r0.50"].assign(mass_rescue=None)}
    fig = figures.rescue_layers(one, SETTING)
    assert list(lines(fig.axes[0])) == ["ot_ridge"] and "↓" not in fig.axes[0].get_title()
    plotting.save(fig, tmp_path / "one.png")
    plotting.save(figures.perplexity_ratio(made([]), SETTING), tmp_path / "dense.png")


def exact_plan(n, k, seed=0):
    """A plan as an exact solver makes it: the kept keep theirs, the pruned go to one or two."""
    generator = np.random.default_rng(seed)
    scores = generator.lognormal(0, 1, n)
    kept = np.sort(np.argsort(-scores)[:k])
    gone = np.setdiff1d(np.arange(n), kept)
    hubs = np.minimum(k - 1, (k * generator.beta(0.6, 2.0, len(gone))).astype(int))
    split = gone[generator.random(len(gone)) < 0.2]
    rows = np.concatenate([kept, gone, split])
    columns = np.concatenate([np.arange(k), hubs, generator.integers(0, k, len(split))])
    share = np.concatenate([np.ones(n), generator.random(len(split))]) / n
    return csr_array((share, (rows, columns)), shape=(n, k)), kept, scores


@pytest.mark.parametrize(("n", "k"), [(12, 7), (1536, 768), (14336, 7168)])
def test_plan_points_stand_by_importance(n, k, tmp_path):
    plan, kept, scores = exact_plan(n, k)
    fig = figures.transport_plan(plan, kept, scores, "tiny, layer 2: flap, ot_mass, r0.50")
    places = fig.axes[0].collections[0].get_offsets()
    share = np.asarray(fig.axes[0].collections[0].get_array())
    assert len(places) == plan.nnz
    by_importance, kept_order = np.argsort(-scores), kept[np.argsort(-scores[kept])]
    column_of = {channel: column for column, channel in enumerate(kept)}
    for (x, y), value in zip(places[:: max(1, n // 100)], share[:: max(1, n // 100)], strict=True):
        source, column = by_importance[int(x)], column_of[kept_order[int(y)]]
        expected = plan[source, column] / plan[[source]].sum()
        assert value == pytest.approx(expected)
    assert {(i, i) for i in range(k)} <= {tuple(place) for place in places.astype(int)}
    bars = fig.axes[1].patches
    single = np.bincount(plan.tocoo().col, minlength=k).max() <= figures.FEW
    heights = [bar.get_height() for bar in bars] if single else bars[0].get_data().values
    assert sum(heights) == k and single == (n < 14336)
    plotting.save(fig, tmp_path / "plan.png")


def test_a_dense_plan_shows_its_largest_shares_and_says_so(monkeypatch):
    monkeypatch.setattr(figures, "POINTS", 10)
    generator = np.random.default_rng(0)
    plan = csr_array(generator.random((12, 5)) + 0.01)
    fig = figures.transport_plan(plan, np.arange(5), -np.arange(12.0), "t")
    assert len(fig.axes[0].collections[0].get_offsets()) == 10
    share = (plan.toarray() / plan.toarray().sum(1, keepdims=True)).ravel()
    shown = np.asarray(fig.axes[0].collections[0].get_array())
    np.testing.assert_allclose(shown, np.sort(share)[-10:])
    assert "the 10 largest of 60 shares" in fig.get_suptitle()


def test_import_is_light():
    code = (
        "import sys, headroom.ffn.figures; print({'torch', 'matplotlib', 'ot'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"
