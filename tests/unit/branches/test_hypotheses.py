"""Verdicts on losses made to hold, to fail or to leave it open, and effects in closed form."""

import numpy as np
import pandas as pd
import pytest

from headroom.branches import tables
from headroom.branches.hypotheses import HYPOTHESES, as_html, hypotheses
from headroom.branches.runs import Architecture, Run, branch_range, group, rotation
from headroom.statistics import seeded_loss_difference

BOOTSTRAP = {"resamples": 100, "confidence": 0.95, "seed": 0}
RATIOS, COUNTS, TRAINS = (0.0, 0.5, 1.0), (1, 4, 8), ("fixed1", "fixed4", "1-7")
HEADS = tuple(Architecture(64 * heads, heads) for heads in (4, 8))
SIZES = tuple(Architecture(512, heads) for heads in (16, 8))
TEXTS = 10


def runs(architectures=HEADS + SIZES[:1], ratios=RATIOS, trains=TRAINS, seeds=(0, 1)):
    return [
        Run(group(architecture, train, seed=seed), rotation(ratio))
        for seed in seeds
        for architecture in architectures
        for train in trains
        for ratio in ratios
    ]


def supported(run, count, sign=1.0):
    """A loss for which each hypothesis holds, or with the other sign fails."""
    architecture, ratio = run.group.architecture, run.rotation.ratio
    low, high = branch_range(run.group.train_branch)
    far = 0.0 if low < high else abs(np.log2(count / high))
    miss = (0.02 if low < high else 0.01 * far - 0.01) * (1 if low == high else 0.5)
    loss = sign * (0.1 * ratio + (count - 1) * 0.1 * (1 - ratio))  # 1 and 2
    loss += sign * (0.5 * far + miss + 0.1 * (low < high))  # 3 and 4
    loss -= sign * 0.01 * architecture.heads * (architecture.head_size == 64)  # 5
    finer = 64 / architecture.head_size  # 6: all jumps are larger in smaller heads
    return 5.0 + loss * (finer if sign > 0 else 1 / finer)


def judged(wanted_runs, loss, counts=COUNTS, diverged=()):
    """The table of runs whose texts all have this loss, and what was lost."""
    tokens = 2 + np.arange(TEXTS)
    frames = [
        pd.DataFrame(
            {
                "run": run.name,
                "branches": count,
                "text": np.arange(TEXTS),
                "document": np.arange(TEXTS) // 2,
                "nll": tokens * loss(run, count),
                "tokens": tokens,
            }
        )
        for run in wanted_runs
        for count in counts
        if run not in diverged
    ]
    wanted = [(run, count) for run in wanted_runs for count in counts]
    status = {
        run.name: {"status": "diverged" if run in diverged else "trained"} for run in wanted_runs
    }
    losses = tables.Losses(frames, BOOTSTRAP)
    return hypotheses(wanted, status, losses), losses


def overall(table):
    return table[table["where"] == "overall"].set_index("hypothesis").verdict.to_dict()


def part(table, number):
    return table[(table.hypothesis == number) & (table["where"] != "overall")]


def test_all_hold_where_losses_are_made_so_and_all_fail_where_they_are_turned():
    table, losses = judged(runs(), supported)
    assert overall(table) == dict.fromkeys(range(1, 7), "holds"), table.to_string()
    assert (part(table, 1).effect > 0).all() and table.seeds.dropna().eq(2).all()
    turned, _ = judged(runs(), lambda run, count: supported(run, count, -1.0))
    assert overall(turned) == dict.fromkeys(range(1, 7), "fails"), turned.to_string()
    setting = tables.describe(losses)
    assert setting.startswith("10 evaluation texts of 5 documents, 65 predicted tokens; 95%")
    page = as_html(table, "heads & sizes", setting)
    assert (
        "documents and 2 seeds" in page
        and page.count("<h2>") == 7
        and "heads &amp; sizes" in page
        and "nan" not in page.lower()
        and "2.0<" not in page
    )


def test_effects_are_sums_of_losses_against_the_closest_rival():
    by_cell = {}
    rng = np.random.default_rng(5)
    architectures = [Architecture(256, 4), Architecture(512, 8), Architecture(512, 16)]

    def loss(run, count):
        cell = (run.group.architecture, run.rotation.ratio, run.group.train_branch, count)
        return by_cell.setdefault(cell, rng.uniform(2, 4))

    table, _ = judged(runs(architectures), loss)

    def at(heads, ratio, train, count):
        return by_cell[next(a for a in architectures if a.heads == heads), ratio, train, count]

    def mean(*cell):
        return np.mean([at(*cell, count) for count in COUNTS])

    def jump(heads, train):
        found = [at(heads, ratio, train, 8) for ratio in RATIOS]
        return np.abs(np.diff(found)).max()

    def rise(ratio):
        return at(8, ratio, "1-7", 8) - at(8, ratio, "1-7", 1)

    expected = {
        (1, "512-h8, trained on 1-7"): min(at(8, r, "1-7", 1) for r in (0.5, 1.0))
        - at(8, 0.0, "1-7", 1),
        (2, "512-h8, trained on 1-7"): min(rise(0.0), rise(0.5)) - rise(1.0),
        (3, "512-h8, ratio 0.5, at 4 branches"): min(
            at(8, 0.5, train, 4) for train in ("fixed1", "1-7")
        )
        - at(8, 0.5, "fixed4", 4),
        (4, "512-h8, ratio 0.5"): min(mean(8, 0.5, train) for train in ("fixed1", "fixed4"))
        - mean(8, 0.5, "1-7"),
        (5, "head size 64, ratio 0.5, trained on 1-7"): mean(4, 0.5, "1-7") - mean(8, 0.5, "1-7"),
        (6, "hidden 512, trained on 1-7"): jump(16, "1-7") - jump(8, "1-7"),
    }
    rows = table.set_index(["hypothesis", "where"])
    for key, effect in expected.items():
        row = rows.loc[key]
        assert row.effect == pytest.approx(effect, rel=1e-9), key
        assert (row.low, row.high) == pytest.approx((effect, effect)), "texts agree on all"
        assert row.verdict == ("holds" if effect > 0 else "fails")
    sizes = [len(part(table, number)) for number in range(1, 7)]
    assert sizes == [9, 9, 18, 9, 9, 3]


def test_only_seeds_at_which_all_compared_runs_trained_are_counted():
    every = runs(HEADS[:1], ratios=(0.0, 1.0), trains=("fixed1", "1-7"), seeds=(0, 1, 2))
    lost = [run for run in every if run.group.seed == 1 and run.name.endswith("r10-b1-7-s1")]

    def loss(run, count):
        return supported(run, count) + (5.0 * run.group.seed * (run.rotation.ratio == 0))

    table, losses = judged(every, loss, diverged=lost)
    row = part(table, 1).set_index("where").loc["256-h4, trained on 1-7"]
    assert row.seeds == 2 and row.candidate == "ratio 0" and row.rival == "ratio 1"
    assert row.verdict == "undecided", "seed 0 says one thing, seed 2 the other"
    sums = {
        ratio: np.stack([losses.of(f"256-h4-r{ratio}-b1-7{s}", 1)[0] for s in ("", "-s2")])
        for ratio in ("00", "10")
    }
    assert row.effect == pytest.approx((sums["10"] - sums["00"]).mean())

    none, _ = judged(every, loss, diverged=[r for r in every if r.rotation.ratio == 1])
    assert set(part(none, 1).verdict) == {"not tested"}
    assert set(part(none, 1).reason) == {"no seed at which all compared runs trained"}
    assert overall(none)[1] == "not tested"


def test_what_the_grid_lacks_is_said_and_controls_do_not_count():
    own = runs(HEADS[:1], ratios=(0.5,), trains=("fixed4",))
    controls = [
        Run(group(HEADS[0], train, mask), rotation(ratio, coordinate="time"))
        for ratio in (0.0, 0.5)
        for train in ("fixed4", "1-7")
        for mask in ("columns", "isolated")
    ]
    table, _ = judged(own + controls, supported)
    assert overall(table) == dict.fromkeys(range(1, 7), "not tested")
    assert table.reason.tolist() == [f"the grid lacks {found.needs}" for found in HYPOTHESES]
    with_controls, _ = judged(runs() + controls, supported)
    without, _ = judged(runs(), supported)
    pd.testing.assert_frame_equal(with_controls, without)


def test_intervals_are_those_of_a_paired_difference():
    rng = np.random.default_rng(1)
    noise = {ratio: rng.normal(0, 0.5, (2, TEXTS)) for ratio in (0.0, 1.0)}

    def loss(run, count):
        return 3 + noise[run.rotation.ratio][run.group.seed]

    every = runs(HEADS[:1], ratios=(0.0, 1.0), trains=("fixed1",))
    row = part(judged(every, loss, counts=(1,))[0], 1).iloc[0]
    tokens = 2 + np.arange(TEXTS)
    sums = {
        ratio: (tokens * (3 + found)).reshape(2, -1, 2).sum(2) for ratio, found in noise.items()
    }
    documents = tokens.reshape(-1, 2).sum(1)
    expected = seeded_loss_difference(sums[0.0], sums[1.0], documents, **BOOTSTRAP)
    assert (row.effect, row.low, row.high) == pytest.approx(tuple(expected))
