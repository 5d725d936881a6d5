"""Figures carry the numbers that they were given, and nothing covers anything, at real sizes."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from headroom.branches import figures
from headroom.branches.runs import Architecture, Run, group, is_main, rotation
from headroom.branches.tables import architecture_fields
from headroom.plotting import save

SMALL = {"ratios": (0, 0.5, 1), "trains": ("fixed1", "1-3"), "counts": (1, 2, 4)}
FULL = {
    "ratios": (0, 0.25, 0.5, 0.75, 0.875, 1),
    "trains": ("fixed1", "fixed2", "fixed4", "fixed8", "fixed16", "1-3", "1-7", "1-15", "1-31"),
    "counts": (1, 2, 4, 8, 16, 24, 32),
}
SETTING = "32,768 evaluation texts of 3,000 documents, 7,000,000 predicted tokens; 95% intervals"
CONTROLS = ({"mask": "isolated", "coordinate": "time"}, {"coordinate": "time"}, {"stride": 64})


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def loss(ratio, train, count, heads):
    return 2.5 + (1.1 - ratio) * np.log2(count) + 0.01 * len(train) + 0.1 * heads


def means(ratios, trains, counts, architectures=((512, 8),), controls=()):
    rows = {}
    for sizes, how, train, ratio, count in itertools.product(
        architectures, ({}, *controls), trains, ratios, counts
    ):
        turned = dict(how)
        architecture = Architecture(*sizes)
        mask = turned.pop("mask", "columns")
        run = Run(group(architecture, train, mask), rotation(ratio, **turned))
        value = loss(ratio, train, count, architecture.heads) + 0.3 * (not is_main(run))
        rows[run, count] = {
            "architecture": architecture.name,
            **architecture_fields(architecture),
            "rope_ratio": float(ratio),
            "train_branch": train,
            "eval_branch": count,
            "coordinate": run.rotation.coordinate,
            "band": run.rotation.band,
            "stride": run.rotation.stride,
            "mask": run.group.mask,
            "control": not is_main(run),
            "loss": value,
            "low": value - 0.02,
            "high": value + 0.04,
            "trained": 3,
            "seeds": 3,
        }
    return pd.DataFrame(rows.values())


def lines(axis, style="-"):
    return [line for line in axis.lines if line.get_linestyle() == style]


def require_nothing_covered(fig):
    """Axes with their labels and titles, legend and title lie apart, and inside the figure."""
    fig.draw_without_rendering()
    boxes = [axis.get_tightbbox() for axis in fig.axes if axis.axison]
    boxes += [legend.get_window_extent() for legend in fig.legends]
    boxes.append(fig._suptitle.get_window_extent())
    for first, second in itertools.combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width < 1 or height < 1, (first, second)
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
    for axis in fig.axes:
        ticks = [tick.get_window_extent() for tick in axis.get_xticklabels() if axis.axison]
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(ticks)), "tick labels touch"


@pytest.mark.parametrize(("sizes", "controls"), [(SMALL, ()), (FULL, CONTROLS)])
def test_loss_has_a_panel_a_ratio_and_a_line_a_training(sizes, controls):
    table = means(**sizes, controls=controls)
    fig = figures.loss_figure(table, "512-h8", SETTING)
    require_nothing_covered(fig)
    panels = [axis for axis in fig.axes if axis.axison]
    assert [axis.get_title() for axis in panels] == [f"ratio {r:g}" for r in sizes["ratios"]]
    assert len({axis.get_ylim() for axis in panels}) == 1
    for axis, ratio in zip(panels, sizes["ratios"], strict=True):
        assert [tick.get_text() for tick in axis.get_xticklabels()] == [*map(str, sizes["counts"])]
        for line, train in zip(lines(axis), sizes["trains"], strict=True):
            assert line.get_xdata() == pytest.approx(sizes["counts"])
            expected = [loss(ratio, train, count, 8) for count in sizes["counts"]]
            assert line.get_ydata() == pytest.approx(expected)
        assert len(axis.collections) == len(axis.lines), "each line has its intervals"
    words = [text.get_text() for text in fig.legends[0].get_texts()]
    assert words[: len(sizes["trains"])] == [*sizes["trains"]]
    assert len(words) == len(sizes["trains"]) + (6 if controls else 0)
    colours = {line.get_color() for line in lines(panels[0])}
    assert len(colours) == len(sizes["trains"]), "each training has its own colour"


def test_loss_by_ratio_is_at_the_most_branches_and_controls_reach_the_ends():
    table = means(**FULL, controls=CONTROLS)
    fig = figures.ratio_figure(table, "512-h8", SETTING)
    require_nothing_covered(fig)
    own = lines(fig.axes[0])
    for line, train in zip(own, FULL["trains"], strict=True):
        assert line.get_xdata() == pytest.approx(FULL["ratios"])
        expected = [loss(ratio, train, 32, 8) for ratio in FULL["ratios"]]
        assert line.get_ydata() == pytest.approx(expected)
    dashed = [
        line for line in fig.axes[0].lines if line.get_linestyle() == "--" and len(line.get_xdata())
    ]
    # with a single branch the isolated mask is no control of its own
    assert len(dashed) == 3 * len(FULL["trains"]) - 1
    assert all([*line.get_xdata()] == [*FULL["ratios"]] for line in dashed)


@pytest.mark.parametrize(
    ("architectures", "ticks"),
    [
        (((256, 4), (512, 8), (1024, 16), (1536, 24)), ["4", "8", "16", "24"]),
        (((512, 16), (512, 8), (512, 4)), ["32", "64", "128"]),
        (((512, 16), (256, 4)), ["512\nd32\nh16", "256\nh4"]),
    ],
)
def test_architectures_are_compared_where_there_are_several(architectures, ticks):
    table = means(**FULL, architectures=architectures, controls=CONTROLS[:1])
    fig = figures.architecture_figure(table, SETTING)
    require_nothing_covered(fig)
    panels = [axis for axis in fig.axes if axis.axison]
    assert len(panels) == len(FULL["trains"])
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == ticks
    heads = {
        f"{found.head_size}": found.heads for found in (Architecture(*a) for a in architectures)
    }
    last = lines(panels[-1])[: len(FULL["ratios"])]
    if len(heads) == 3:
        expected = [loss(1, "1-31", 32, heads[tick]) for tick in ticks]
        assert [*lines(panels[-1])[-1].get_ydata()] == pytest.approx(expected)
    assert len(last) == len(FULL["ratios"])


def test_figures_are_equal_when_drawn_again_and_say_what_diverged(tmp_path):
    table = means(**SMALL, architectures=((64, 4), (128, 8)))
    table.loc[table.rope_ratio == 1, ["loss", "low", "high"]] = np.nan
    table.loc[table.rope_ratio == 1, "trained"] = 0
    table.loc[table.rope_ratio == 0.5, "trained"] = 2
    for name in ("one", "two"):
        for kind, made in (("loss", figures.loss_figure), ("ratio", figures.ratio_figure)):
            save(made(table, "64-d16-h4", SETTING), tmp_path / name / f"{kind}.png")
        save(figures.architecture_figure(table, SETTING), tmp_path / name / "all.png")
    made = sorted((tmp_path / "two").iterdir())
    assert len(made) == 6
    for path in made:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes(), path.name
    titles = [axis.get_title() for axis in figures.loss_figure(table, "64-d16-h4").axes]
    lost = ["ratio 0.5\n(2 of 6 runs diverged)", "ratio 1\n(6 of 6 runs diverged)"]
    assert titles == ["ratio 0", *lost]
