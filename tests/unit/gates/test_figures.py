"""Figures, frames and pages carry the numbers that they were given, at the sizes that occur."""

import base64

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from headroom.errors import InputError
from headroom.gates import animation, figures, maps, methods, page

SETTING = "cldr test, 1,000 sentences, beam 4, 95 % bootstrap intervals over sentences"
STEPS = (0, 50, 100, 150)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def gates(layers=2, heads=4, attentions=("encoder",), steps=STEPS, closing=(0.2, 0.9)):
    """Layer l loses a share of p_open that grows with l; the last head of each layer closes."""
    rows = []
    for attention in attentions:
        for step in steps:
            for layer in range(1, layers + 1):
                done = closing[layer % 2] * step / max(steps)
                for head in range(1, heads + 1):
                    p_open = 0.97 - 0.9 * done * head / heads
                    gate = 0.0 if head == heads and step == max(steps) else p_open
                    rows.append((step, step / 40, attention, layer, head, 1.0, p_open, gate))
    columns = ["step", "epoch", "attention", "layer", "head", "log_a", "p_open", "gate"]
    return pd.DataFrame(rows, columns=columns)


def roles(table):
    """As they are measured: cross-attention has no offsets, decoders' keys are no source tokens."""
    heads = table.drop_duplicates(["attention", "layer", "head"])
    found = heads[["attention", "layer", "head"]].reset_index(drop=True)
    cross, decoder = found.attention == "cross", found.attention == "decoder"
    found["offset"] = [None if c else -1 for c in cross]
    found["positional"] = [
        None if c else 0.25 * h for c, h in zip(cross, found["head"], strict=True)
    ]
    found["is_positional"] = [
        None if c else h == 4 for c, h in zip(cross, found["head"], strict=True)
    ]
    found["confidence"] = 0.5
    found["rare"] = [None if d else 0.3 for d in decoder]
    found["rare_baseline"] = [None if d else 0.07 for d in decoder]
    return found


def runs(seeds=(0, 1, 2), strengths=(0.0, 0.05, 2.0), counts=(6,), controls=True, heads=16):
    rows = [("", "none", np.nan, 0, heads, 65.0)]
    for seed in seeds:
        for strength in strengths:
            left = heads if not strength else 12 - seed if strength < 1 else 0
            name = f"gate-l{strength:g}-s{seed}"
            rows.append((name, "lambda", strength, seed, left, 66 - 0.1 * seed - strength))
        for count in counts:
            for place, method in enumerate(("target", "michel", "random", "scratch")):
                if controls or method == "target":
                    bleu = 64 - place + 0.1 * seed
                    rows.append((f"{method}-k{count}", method, np.nan, seed, count, bleu))
    columns = ["step", "method", "strength", "seed", "open_heads", "bleu"]
    found = pd.DataFrame(rows, columns=columns).assign(heads=heads, verdict="worse", flops=2.5e7)
    found = found.assign(bleu_low=found.bleu - 1, bleu_high=found.bleu + 1, chrf=found.bleu + 9)
    found = found.assign(difference=found.bleu - 66, parameters=1000 + found.open_heads)
    return found.assign(difference_low=found.difference - 1, difference_high=found.difference + 1)


def words(axis):
    return [text.get_text() for text in axis.texts]


def test_the_legend_names_the_layer_whose_mean_the_line_is():
    table = gates(layers=3, attentions=("encoder", "cross"))
    shuffled = table.sample(frac=1, random_state=0)
    for axis, name in zip(figures.layer_opening(shuffled).axes, ("encoder", "cross"), strict=True):
        handles, labels = axis.get_legend_handles_labels()
        assert labels == [f"{name} layer {layer}" for layer in (1, 2, 3)]
        assert [t.get_text() for t in axis.get_legend().get_texts()] == labels
        for layer, line in enumerate(handles, start=1):
            own = table[(table.attention == name) & (table.layer == layer)]
            assert np.allclose(line.get_ydata(), own.groupby("step").p_open.mean())
            assert list(line.get_xdata()) == list(STEPS)
    single = figures.layer_opening(gates()).axes[0].get_legend_handles_labels()[1]
    assert single == ["layer 1", "layer 2"]


@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize("attentions", [("encoder",), ("encoder", "decoder", "cross")])
def test_the_map_has_layer_1_on_top_fixed_colours_and_words_for_them(heads, attentions, tmp_path):
    table = gates(heads=heads, attentions=attentions)
    fig = figures.heat_map(table.sample(frac=1, random_state=1), roles(table), "cldr, gate-l0.05")
    grids = [axis for axis in fig.axes if axis.images and axis.get_yticklabels()]
    grids = [axis for axis in grids if "layer 1" in axis.get_yticklabels()[0].get_text()]
    assert len(grids) == 2 * len(attentions)
    for axis in grids:
        assert [t.get_text() for t in axis.get_yticklabels()] == ["layer 1", "layer 2"]
        assert [t.get_text() for t in axis.get_xticklabels()] == [str(h + 1) for h in range(heads)]
        assert axis.images[0].get_clim() == (0, 1)
        assert axis.yaxis_inverted()
    final = table[(table.step == max(STEPS)) & (table.attention == "encoder")]
    assert np.allclose(grids[0].images[0].get_array().ravel(), final.p_open)
    assert words(grids[0])[heads - 1] == "closed"
    assert words(grids[0])[0] == f"{final.gate.iloc[0]:.2f}"
    assert words(grids[1])[1].splitlines() == ["−1: 50%", "c .50", "r .30"]
    if len(attentions) == 3:
        assert words(grids[3])[1].splitlines() == ["−1: 50%", "c .50"]
        assert words(grids[5])[1].splitlines() == ["c .50", "r .30"]
    bars = [t.get_text() for axis in fig.axes for t in axis.get_yticklabels()]
    assert "1: open\n(yellow)" in bars and "0: closed\n(dark blue)" in bars
    fig.canvas.draw()
    figures.heat_map(table, None, "alone").canvas.draw()


def test_a_frame_a_report_all_distinct_even_if_nothing_moves(tmp_path):
    still = gates(closing=(0, 0)).assign(p_open=0.9, gate=0.9)
    for number, table in enumerate((gates(attentions=("encoder", "cross")), still)):
        path, again = tmp_path / f"{number}.gif", tmp_path / f"{number}-again.gif"
        animation.p_open_gif(table.sample(frac=1, random_state=2), path, 0.25)
        animation.p_open_gif(table, again, 0.25)
        assert path.read_bytes() == again.read_bytes()
        frames = []
        with Image.open(path) as film:
            assert film.n_frames == len(STEPS) and film.info["loop"] == 0
            for place in range(film.n_frames):
                film.seek(place)
                assert film.info["duration"] == 250
                frames.append(film.convert("RGB").tobytes())
        assert len(set(frames)) == len(STEPS)


def test_a_cell_of_a_frame_has_the_colour_of_its_p_open(tmp_path):
    """The scale doesn't stretch to what occurs: .4 everywhere is the map's colour at .4."""
    from matplotlib import colormaps

    path = tmp_path / "p.gif"
    animation.p_open_gif(gates(layers=1, heads=1).assign(p_open=0.4, gate=0.4), path)
    with Image.open(path) as film:
        pixels = np.asarray(film.convert("RGB")).reshape(-1, 3)
    near = np.abs(pixels - 255 * np.array(colormaps[maps.MAP](0.4)[:3])).max(1) <= 3
    assert near.mean() > 0.2


def test_frames_need_a_report_and_time():
    with pytest.raises(InputError, match="at least one report"):
        animation.p_open_gif(gates().head(0), "x.gif")
    with pytest.raises(InputError, match="seconds_per_frame"):
        animation.p_open_gif(gates(), "x.gif", 0.001)


def test_curves_have_a_panel_for_what_there_is_and_epochs_above():
    steps = np.arange(10, 160, 10)
    log = pd.DataFrame({"step": steps, "loss": 2.0, "nll": 1.5, "penalty": 0.1})
    log = log.assign(learning_rate=1e-3, gate_learning_rate=0.05, tokens=700 * steps)
    reports = pd.DataFrame({"step": STEPS, "epoch": np.array(STEPS) / 40})
    reports = reports.assign(bleu=[60, np.nan, 62, 63], chrf=70.0, open_heads=8, heads=8)
    fig = figures.curves(log, reports.assign(sentences=1000), "cldr, gate-l0.05")
    labels = [axis.get_ylabel() for axis in fig.axes]
    assert "BLEU (n = 1,000 sentences)" in labels and "open heads (of 8)" in labels
    bleu = fig.axes[labels.index("BLEU (n = 1,000 sentences)")]
    assert list(bleu.lines[0].get_ydata()) == [60, 62, 63]
    fig.canvas.draw()
    above = bleu.child_axes[0]
    assert np.allclose(above.get_xlim(), np.array(bleu.get_xlim()) / 40)
    bare = log.drop(columns=["penalty", "gate_learning_rate"])
    fig = figures.curves(bare, reports.drop(columns=["open_heads"]), "cldr")
    assert len([axis for axis in fig.axes if axis.lines]) == 4
    figures.curves(log.assign(penalty=0.0), reports.head(1), "λ = 0").canvas.draw()


def test_the_trade_off_shows_every_run_and_keeps_names_apart():
    table = runs()
    fig = figures.trade_off(table, SETTING)
    left, right = fig.axes
    blue = [t for t in left.texts if t.get_text().startswith("λ")]
    assert [t.get_text() for t in blue] == ["λ = 2", "λ = 0.05", "λ = 0"]
    fig.canvas.draw()
    boxes = [t.get_window_extent() for t in blue]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    marks = {line.get_label(): line.get_xydata() for line in left.lines}
    for method, (label, _, _) in methods.METHODS.items():
        own = table[table.method == method]
        points = marks[f"{label} (3 seeds)"]
        assert np.allclose(np.sort(points[:, 1]), np.sort(own.bleu))
        assert (np.abs(points[:, 0] - own.open_heads) < 0.5).all()
    places = np.vstack([points for label, points in marks.items() if "seeds)" in label])
    assert len(np.unique(places[:, 0].round(6))) == len(table) - 1
    assert any("untouched translator: 65.0 [64.0, 66.0]" in label for label in marks)
    assert any("λ = 0 control" in label and "65.9 [64.8, 67.0]" in label for label in marks)
    dashes = [line.get_ydata()[0] for line in right.lines if line.get_linewidth() == 2]
    assert np.allclose(dashes, [64.1, 63.1, 62.1, 61.1])


@pytest.mark.parametrize(
    "table",
    [
        runs(seeds=(0,), controls=False),
        runs(seeds=(1,), strengths=(0.0,), counts=()),
        runs(seeds=(0,), strengths=()),
        runs().head(1),
        runs(seeds=(0,)).assign(bleu_low=np.nan, bleu_high=np.nan, difference_low=np.nan),
        runs(counts=(20, 40, 72), heads=144),
    ],
)
def test_few_runs_and_missing_intervals_are_drawn_too(table):
    with np.errstate(all="raise"):
        figures.trade_off(table, SETTING).canvas.draw()
        figures.open_against_lambda(table).canvas.draw()
        assert "nan" not in page.runs_page(table, SETTING, None).lower()


def test_open_heads_against_lambda_seed_by_seed():
    axis = figures.open_against_lambda(runs().sample(frac=1, random_state=0)).axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["0", "0.05", "2"]
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines["mean over seeds"].get_ydata()) == [16, 11, 0]
    for seed in range(3):
        assert sorted(lines[f"seed {seed}"].get_ydata()) == [0, 12 - seed, 16]


def test_a_run_page_stands_alone():
    data = [b"GIF89a\x00\x02\x00\x01", *(bytes([n]) * 30 for n in range(3))]
    text = page.run_page("a < b", *data, "facts & figures")
    assert "<h2>a &lt; b</h2>" in text and "facts &amp; figures" in text
    assert text.count("<img") == 4 and "http" not in text
    assert all(base64.b64encode(one).decode() in text for one in data)
    assert text.index("image/gif") < text.index("image/png")


def test_translations_are_escaped_spread_and_joined():
    sources = [f"s{n} <script>" for n in range(9)]
    truths = [f"t{n} & co" for n in range(9)]
    wrong = ["<b>no</b>"] * 9
    reports = {"step 0": wrong, "step 50": wrong, "step 100": truths}
    text = page.translations_page("x", sources, truths, reports, {"beam 4": truths}, 3)
    assert "<script>" not in text and "<b>no" not in text
    assert [n for n in range(9) if f"s{n} " in text] == [0, 4, 8]
    assert text.count("step 0 to step 50") == 3 and text.count("= reference</span>") == 6
    assert "&lt;b&gt;no&lt;/b&gt;" in text and "t4 &amp; co" in text
    every = page.translations_page("x", sources, truths, reports, {}, 50)
    assert all(f"s{n} " in every for n in range(9))


def test_the_page_of_runs_has_intervals_in_figures_and_overlaps_in_words():
    cost = pd.DataFrame({"name": ["base", "base", "gate-k6", "gate-k6"], "batch": [1, 16] * 2})
    cost = cost.assign(median=[20.0, 90, 19, 80], low=[19.0, 88, 18, 79], high=[21.0, 92, 20, 81])
    text = page.runs_page(runs(), "a <setting>", cost)
    assert "65.95 [64.95, 66.95]" in text
    assert "−0.10 [−1.10, +0.90]" in text and "a &lt;setting&gt;" in text
    assert "At batch size 1 the middle halves of the runs overlap with those of base" in text
    assert "does not promise large gains" in text
    assert "Claims need three seeds" in page.runs_page(runs(seeds=(0,)), "s", None)
    apart = cost.assign(high=cost.low)
    assert "does not promise" not in page.runs_page(runs(), "s", apart)
