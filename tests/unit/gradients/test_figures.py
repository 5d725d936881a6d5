"""Figures show the numbers of their frames, read back from what was drawn, and nothing overlaps."""

import io
import itertools
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from headroom import plotting
from headroom.gradients import curves, figures, tables
from headroom.gradients.analysis import most_divergent
from headroom.gradients.pairs import Pairs, component

CAPTIONS = sorted((Path(__file__).parents[3] / "workflow" / "report").glob("gradients_*.rst"))
SETTINGS = {"confidence": 0.95, "resamples": 50, "seed": 0}
LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"]
LLAMA += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LLAMA += ["input_layernorm", "post_attention_layernorm"]
GPT2 = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]


def llama(blocks):
    inside = [f"model.layers.{b}.{name}.weight" for b in range(blocks) for name in LLAMA]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


def gpt2(blocks):
    inside = [
        f"transformer.h.{b}.{name}.{end}"
        for b, name, end in itertools.product(range(blocks), GPT2, ("weight", "bias"))
    ]
    return ["transformer.wte.weight", "transformer.wpe.weight", *inside, "transformer.ln_f.weight"]


def made(layers, queries=20, seed=0):
    """Noisy copies; components differ in noise, tensors in size and in the norm of gradients."""
    rng, L, Q = np.random.default_rng(seed), len(layers), queries
    shift = {"k": 2.0, "q": 1.3, "norm": 1.6}
    noise_L = np.array([1.5 + shift.get(component(name), 0) for name in layers])
    sizes = rng.integers(1, 3000, L) * 10
    original = rng.normal(size=(L, Q, 12)) + 0.4
    query = original + noise_L[:, None, None] * rng.normal(size=original.shape)
    query, original = (np.sqrt(sizes)[:, None, None] * part for part in (query, original))
    ids = tuple(f"lima_{place}" for place in range(Q))
    dot_LQN = np.einsum("lqd,lnd->lqn", query, original)
    squares = [(part**2).sum(2) for part in (query, original)]
    every_QN = np.broadcast_to(np.arange(Q), (Q, Q))
    counts = tuple(int(size) for size in sizes)
    return Pairs(tuple(layers), counts, ids, ids, dot_LQN, *squares, every_QN, np.arange(Q))


def frames(pairs, states=None):
    rng, Q = np.random.default_rng(1), len(pairs.queries)
    names = ("bm25_prompt", "bm25_prompt_answer", "length", "random")
    baselines = {name: np.eye(Q) + rng.normal(size=(Q, Q)) for name in names}
    return {
        "retrieval": tables.retrieval_table(pairs, states, baselines, SETTINGS),
        "layers": tables.layers_table(pairs),
        "greedy": tables.greedy_table(pairs, 4),
        "self_similarity": tables.self_similarity_table(pairs),
    }


def all_figures(found, setting=""):
    return {
        "heatmap": figures.heatmap(found["retrieval"], setting),
        "accuracy": figures.accuracy(found["retrieval"], setting),
        "parameters": figures.parameters(found["layers"], setting),
        "layers": curves.layers(found["layers"], setting),
        "greedy": curves.greedy(found["greedy"], setting),
        "self_similarity": curves.self_similarity(found["self_similarity"], setting),
    }


def ramp(layers):
    return np.linspace(0.2, 0.9, len(layers))


@pytest.fixture(scope="module")
def pairs():
    return made(llama(3))


@pytest.fixture(scope="module")
def found(pairs):
    states = made([f"{state}.{pooling}" for state in range(4) for pooling in ("mean", "last")])
    return frames(pairs, states)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def require_nothing_covered(fig):
    """Axes with their labels, legend and title lie apart, inside the figure; so do tick labels."""
    fig.draw_without_rendering()
    boxes = [axis.get_tightbbox() for axis in fig.axes if axis.axison]
    boxes += [part.get_window_extent() for part in (*fig.legends, fig._suptitle)]
    for first, second in itertools.combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width < 1 or height < 1, (first, second)
    for box in boxes:
        assert min(box.x0, box.y0) >= -0.5
        assert box.x1 <= fig.bbox.x1 + 0.5 and box.y1 <= fig.bbox.y1 + 0.5
    for axis in (axis for axis in fig.axes if axis.axison):
        flat = [t for t in axis.get_xticklabels() if t.get_text() and not t.get_rotation()]
        ticks = [tick.get_window_extent() for tick in flat]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(ticks)), "tick labels touch"
        rows = [t.get_window_extent() for t in axis.get_yticklabels() if t.get_text()]
        rows = sorted(rows, key=lambda box: box.y0)
        assert all(a.y1 < b.y0 + 2 for a, b in itertools.pairwise(rows)), "row labels touch"


def cell_values(axis):
    """Values of a map by the labels of row and column."""
    rows = [tick.get_text() for tick in axis.get_yticklabels()]
    columns = [tick.get_text() for tick in axis.get_xticklabels()]
    values = axis.collections[0].get_array()
    assert values.shape == (len(rows), len(columns))
    drawn = np.argwhere(~np.ma.getmaskarray(values))
    return {(rows[r], columns[c]): values[r, c] for r, c in drawn}


@pytest.mark.parametrize(
    ("layer", "label"),
    [
        ("model.layers.3.mlp.down_proj.weight", "3.down"),
        ("model.layers.3.mlp.down_proj.bias", "3.down.bias"),
        ("model.layers.11.post_attention_layernorm.weight", "11.post_attention_layernorm"),
        ("transformer.h.0.attn.c_proj.weight", "0.o"),
        ("transformer.h.0.mlp.c_proj.bias", "0.down.bias"),
        ("transformer.h.0.ln_1.bias", "0.ln_1.bias"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "norm"),
        ("model.layers.0.mixer.A_log", "0.A_log"),
    ],
)
def test_short_names_of_layers(layer, label):
    assert figures.layer_labels([layer]) == [label]


def test_layers_of_one_block_never_share_a_cell():
    experts = [f"model.layers.{b}.experts.{e}.up_proj.weight" for b in (0, 1) for e in (0, 1)]
    assert figures.short_names(experts) == 2 * ["experts.0.up_proj", "experts.1.up_proj"]
    for layers in (experts, llama(2), gpt2(2)):
        places = figures.cells(layers)
        assert len({*zip(places.row_L, places.column_L, strict=True)}) == len(layers)


@pytest.mark.parametrize("layers", [llama(3), gpt2(2), llama(32)], ids=["llama", "gpt2", "deep"])
def test_maps_show_every_layer_once_and_only_them(layers):
    pairs = made(layers, queries=12)
    rows = [
        {"kind": "layer", "name": n, "top1": v} for n, v in zip(layers, ramp(layers), strict=True)
    ]
    full = {"kind": "full", "name": "full", "top1": 0.75, "top1_low": 0.5, "top1_high": 0.875}
    table = pd.DataFrame([full, *rows]).assign(queries=1200, candidates=50)
    fig = figures.heatmap(table, "a model")
    require_nothing_covered(fig)
    names = [re.search(r"\.(\d+)\.", name) for name in layers]
    columns = [number[1] if number else "–" for number in names]
    keys = list(zip(figures.short_names(layers), columns, strict=True))
    assert cell_values(fig.axes[0]) == pytest.approx(
        dict(zip(keys, 100 * ramp(layers), strict=True))
    )
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert sorted(texts) == sorted(f"{100 * v:.1f}" for v in ramp(layers) if len({*columns}) <= 17)
    title = fig.get_suptitle()
    assert "1,200 queries, 50 candidates" in title and "75.0 % [50.0, 87.5]" in title
    assert "chance 2 %" in title and title.endswith("a model")

    table = tables.layers_table(pairs)
    fig = figures.parameters(table)
    require_nothing_covered(fig)
    for axis, shares in zip(fig.axes, (table.share, table.norm_share), strict=False):
        wanted = dict(zip(keys, 100 * shares, strict=True))
        assert cell_values(axis) == pytest.approx(wanted)
        sums = [t.get_text() for t in axis.texts if t.get_text().startswith("Σ")]
        by_row = pd.Series(wanted).groupby(level=0, sort=False).sum()
        order = [tick.get_text() for tick in axis.get_yticklabels()]
        assert sums == [f"Σ {figures.percent(by_row[name])}" for name in order]


def test_colours_of_a_map_don_t_blow_up_noise(found):
    table = found["retrieval"].copy()
    for value, limits in ((1.0, (90, 100)), (0.02, (0, 10)), (0.5, (45, 55))):
        table["top1"] = value
        assert figures.heatmap(table).axes[0].collections[0].get_clim() == pytest.approx(limits)


@pytest.mark.parametrize("states", [True, False])
def test_accuracy_shows_each_measure_with_its_interval(found, states):
    table = found["retrieval"]
    table = table if states else table[table.kind != "state"]
    fig = figures.accuracy(table)
    require_nothing_covered(fig)
    axis = fig.axes[0]
    labels = dict(
        zip(axis.get_yticks(), [t.get_text() for t in axis.get_yticklabels()], strict=True)
    )
    drawn, hollow = {}, set()
    for box in axis.containers:
        line, _, (bars,) = box
        for x, y, segment in zip(*line.get_data(), bars.get_segments(), strict=True):
            drawn[y] = labels[y], x, *segment[:, 0]
            hollow |= {y} if line.get_markerfacecolor() == "white" else set()
    layers = table[table.kind == "layer"].assign(label=figures.layer_labels(llama(3)))
    layers = layers.sort_values(["top1", "parameters"], ascending=[False, True], kind="stable")
    parts = [table[table.kind == "full"].assign(label="full gradient")]
    parts += [table[table.kind == "component"].assign(label=lambda rows: rows.name)]
    parts += [layers.iloc[:5], layers.iloc[-3:]]
    if states:
        own = table[table.kind == "state"].sort_values("top1", ascending=False, kind="stable")
        best = [own[own.component == name].iloc[[0]] for name in dict.fromkeys(own.component)]
        words = {"mean": "mean of state", "last": "last token of state"}
        parts += [
            row.assign(label=f"{words[row.component.iloc[0]]} {row.block.iloc[0]}") for row in best
        ]
    parts += [table[table.kind == "baseline"].assign(label=lambda rows: rows.name.map(tables.SAID))]
    wanted = pd.concat(parts)
    assert [drawn[y][0] for y in sorted(drawn)] == list(wanted.label)
    numbers = 100 * wanted[["top1", "top1_low", "top1_high"]].to_numpy(float)
    np.testing.assert_allclose([drawn[y][1:] for y in sorted(drawn)], numbers, atol=1e-9)
    undecided = [
        y
        for y, verdict in zip(sorted(drawn), wanted.verdict, strict=True)
        if verdict == "undecided"
    ]
    assert sorted(hollow) == undecided
    assert [text.get_text() for text in axis.texts] == [f"{value:.1f}" for value in numbers[:, 0]]
    upright = [
        line.get_xdata()[0]
        for line in axis.lines
        if len({*line.get_xdata()}) == 1 and len(line.get_xdata()) == 2
    ]
    full = 100 * table[table.kind == "full"].top1.iloc[0]
    assert upright == pytest.approx([100 / 20, full])
    headings = {text for y, text in labels.items() if y not in drawn}
    assert ("best of 8 hidden states" in headings) == states
    assert "best of 30 layers" in headings


def test_greedy_has_both_halves_the_names_and_the_shares(found):
    table = found["greedy"]
    fig = curves.greedy(table)
    require_nothing_covered(fig)
    for axis, (criterion, part) in zip(
        fig.axes, table.groupby("criterion", sort=False), strict=True
    ):
        scale = 100 if criterion == "accuracy" else 1
        for line, half in zip(axis.lines, ("chosen", "held_out"), strict=True):
            assert list(line.get_xdata()) == list(part.step)
            np.testing.assert_allclose(line.get_ydata(), scale * part[half])
        named = [tick.get_text() for tick in axis.get_xticklabels()]
        assert named == figures.layer_labels(list(part.layer))
        above = [tick.get_text() for tick in axis.child_axes[0].get_xticklabels()]
        assert above == [figures.percent(100 * share) for share in part.parameters_share]
        low, high = axis.get_ylim()
        assert low <= min(part.chosen.min(), part.held_out.min()) * scale and high <= 1.01 * scale


def test_layers_has_a_line_a_component_and_a_point_a_layer(found):
    table = found["layers"]
    fig = curves.layers(table)
    require_nothing_covered(fig)
    over, against = fig.axes
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    columns = [tick.get_text() for tick in over.get_xticklabels()]
    assert columns == ["–", "0", "1", "2"]
    short = np.array(figures.short_names(list(table.layer)))
    assert words == list(dict.fromkeys(short[[0, *range(1, 10), -2, -1]]))
    looks = set()
    for name, line, points in zip(words, over.lines, against.lines, strict=False):
        own = table[short == name]
        drawn = np.array(line.get_data())[:, ~np.isnan(line.get_ydata())]
        np.testing.assert_array_equal(drawn[1], own.cosine_to_full)
        assert list(drawn[0]) == ([1, 2, 3] if len(own) > 1 else [0])
        np.testing.assert_array_equal(points.get_data(), [own.others, own.matching])
        looks.add((line.get_color(), line.get_marker()))
        assert points.get_marker() == line.get_marker()
    assert len(looks) == len(words)


def test_self_similarity_has_quantiles_and_the_most_divergent_queries(pairs, found):
    table = found["self_similarity"]
    fig = curves.self_similarity(table)
    require_nothing_covered(fig)
    cosine_QL = table.cosine.to_numpy().reshape(20, -1)
    short, layers = np.array(figures.short_names(pairs.layers)), np.array(pairs.layers)
    places = most_divergent(cosine_QL, 3)
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert words == ["median", "10 to 90 %", *(f"query {pairs.queries[p]}" for p in places)]
    panels = [axis for axis in fig.axes if axis.axison]
    assert panels[-1].get_title() == "outside of blocks"
    for axis in panels:
        own = np.flatnonzero(short == axis.get_title())
        if axis is panels[-1]:
            own = [p for p, name in enumerate(layers) if ".layers." not in name]
            assert [t.get_text() for t in axis.get_xticklabels()] == ["embed", "norm", "head"]
        drawn = [line.get_ydata() for line in axis.lines]
        part_QP = cosine_QL[:, own]
        np.testing.assert_allclose(drawn, [np.median(part_QP, axis=0), *part_QP[places]])
        path = axis.collections[0].get_paths()[0].vertices[:, 1]
        if axis is not panels[-1]:
            low, high = np.quantile(part_QP, (0.1, 0.9), axis=0)
            assert {*np.round(path, 9)} == {*np.round([*low, *high], 9)}
    assert len(panels) == 10


def test_self_similarity_without_originals_and_with_ids_that_look_like_formulas(found):
    table = found["self_similarity"]
    fig = curves.self_similarity(table.iloc[:0])
    assert "no query has its original" in fig.get_suptitle()
    odd = table.assign(query="$_^{$" + table["query"] + 40 * "x")
    fig = curves.self_similarity(odd)
    require_nothing_covered(fig)
    assert len(fig.legends[0].get_texts()) == 5


def test_figures_of_gpt2_without_states_are_not_covered():
    for fig in all_figures(frames(made(gpt2(1))), "a model, some instructions").values():
        require_nothing_covered(fig)


def test_equal_frames_give_equal_bytes_also_from_csv(tmp_path, monkeypatch):
    monkeypatch.setitem(plotting.STYLE, "savefig.dpi", 40)  # for speed
    found = frames(made(llama(1)[:3]))
    read = {
        name: pd.read_csv(io.StringIO(frame.to_csv(index=False))) for name, frame in found.items()
    }
    for folder, frames_of in (("made", found), ("read", read)):
        for name, fig in all_figures(frames_of, "a model").items():
            plotting.save(fig, tmp_path / folder / name)
            require_nothing_covered(fig)  # after: drawing twice moves the layout by a hair
    written = sorted((tmp_path / "made").iterdir())
    assert len(written) == 12
    for path in written:
        assert path.read_bytes() == (tmp_path / "read" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("path", CAPTIONS, ids=lambda path: path.stem)
def test_captions_are_clean_text(path):
    docutils = pytest.importorskip("docutils.core")
    nodes = pytest.importorskip("docutils.nodes")
    text = re.sub(r"\{\{ (.*?) \}\}", r"\1", path.read_text())
    options = {"report_level": 1, "halt_level": 5, "warning_stream": io.StringIO()}
    tree = docutils.publish_doctree(text, settings_overrides=options)
    assert not [found.astext() for found in tree.findall(nodes.system_message)]
    assert not [*tree.findall(nodes.substitution_reference), *tree.findall(nodes.reference)]
