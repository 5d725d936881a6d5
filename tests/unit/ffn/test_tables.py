"""Numbers of the table and verdicts on planted damage, against a naive recomputation."""

import numpy as np
import pandas as pd
import pytest

from headroom.errors import InputError
from headroom.ffn import tables
from headroom.ffn.tables import as_html, baseline, describe, one_setting, summary, table, verdicts
from headroom.statistics import Interval, verdict

BOOTSTRAP = {"resamples": 300, "confidence": 0.95, "seed": 0}
TOKENS = np.random.default_rng(1).integers(50, 200, 40)
SETTING = {
    "documents": 40,
    "heldout": [16, 128],
    "choice": "first",
    "corpus": "docs",
    "split": "evaluation",
    "window": 128,
    "windows": 64,
    "boundary": "bos",
    "dtype": "float32",
}
SETTINGS = dict.fromkeys(range(3), SETTING)
DROP, MASS, COLUMN = (f"prune-flap-{name}-r0.30" for name in ("drop", "ot_mass", "ot_column"))
REFIT, BOTH = "prune-flap-ridge-r0.30", "prune-flap-ot_ridge-r0.30"
GLOBAL = "prune-flap-drop-g0.50"
SHIFTS = {DROP: 0.4, MASS: 0.3, COLUMN: 0.9, REFIT: 0.1, BOTH: 0.1, GLOBAL: 0.5}


def swept(shifts=SHIFTS, seeds=3, noise=0.01, only=None):
    """Sweeps in which a step costs a known shift a token, with noise by seed and document."""
    base = np.random.default_rng(0).normal(4, 0.5, len(TOKENS)) * TOKENS
    found = {}
    for seed in range(seeds):
        generator = np.random.default_rng(100 + seed)
        frames = [scored("dense", base, 1000, 700)]
        for step, shift in shifts.items():
            scatter = generator.normal(0, noise, len(TOKENS))
            if step == BOTH:  # better in one seed, worse in another
                scatter = scatter + (0.05 * (seed - 1) if only is None else only)
            left = 652 if step == GLOBAL else 790
            frames.append(scored(step, base + (shift + scatter) * TOKENS, left, 700 - 210))
        found[seed] = pd.concat(frames, ignore_index=True)
    return found


def scored(step, nll, effective, ffn):
    found = pd.DataFrame({"document": range(len(TOKENS)), "nll": nll, "tokens": TOKENS})
    sizes = {"parameters": 1000, "ffn_parameters": ffn, "effective_parameters": effective}
    return found.assign(step=step, correct=TOKENS // (3 if step == "dense" else 4), **sizes)


def mean_losses(documents, step):
    chosen = [frame[frame.step == step] for frame in documents.values()]
    return np.array([frame.nll.sum() / frame.tokens.sum() for frame in chosen])


def test_rows_are_geometric_means_over_seeds():
    documents = swept()
    rows = table(documents, SETTINGS, BOOTSTRAP).set_index("step")
    assert list(rows.index) == ["dense", *SHIFTS]
    for step in SHIFTS:
        losses, dense = mean_losses(documents, step), mean_losses(documents, "dense")
        row = rows.loc[step]
        assert row.perplexity == pytest.approx(np.prod(np.exp(losses)) ** (1 / 3))
        assert row.perplexity_min == pytest.approx(np.exp(losses.min()))
        assert row.perplexity_max == pytest.approx(np.exp(losses.max()))
        change = 100 * (row.perplexity / np.exp(dense.mean()) - 1)
        assert row.perplexity_change_percent == pytest.approx(change)
        low, high = row.perplexity_change_percent_low, row.perplexity_change_percent_high
        assert low < change < high
        # the planted shift: paired with dense, so that documents' own spread isn't in it
        width = 0.05 * (3 if step == BOTH else 1)
        assert abs(np.log1p(low / 100) - SHIFTS[step]) < width
        assert row.accuracy == pytest.approx((TOKENS // 4).sum() / TOKENS.sum())
    dense = rows.loc["dense"]
    assert dense.perplexity_change_percent == dense.perplexity_change_percent_high == 0
    assert (dense.fusion, dense.ratio, dense.seeds) == ("", 0.0, 3)
    assert (rows.window == 128).all() and (rows.tokens == TOKENS.sum()).all()


def test_shares_count_effective_parameters():
    rows = table(swept(), SETTINGS, BOOTSTRAP).set_index("step")
    assert rows.loc[DROP, "ffn_parameters_percent_removed"] == pytest.approx(30)
    assert rows.loc[DROP, "parameters_percent_removed"] == pytest.approx(21)
    # padding of the widest layer isn't left: 348 of 700 are gone though 490 are stored
    assert rows.loc[GLOBAL, "ffn_parameters_percent_removed"] == pytest.approx(100 * 348 / 700)
    assert rows.loc["dense", "parameters_percent_removed"] == 0


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("prune-flap-drop-r0.30", ("flap", "drop", "r0.30", 0.3, "", "", "")),
        (
            "prune-flap-ot_mass-g0.50",
            ("flap", "ot_mass", "g0.50", 0.5, "pushforward", "cosine", "exact"),
        ),
        (
            "prune-fo_snip-ot_column-r0.50-weight_aware_to_uniform-cityblock",
            ("fo_snip", "ot_column", "r0.50", 0.5, "weight_aware_to_uniform", "cityblock", "exact"),
        ),
    ],
)
def test_fields_name_the_transport_only_where_there_is_one(step, expected):
    assert tuple(tables.step_fields(step).values()) == expected


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("drop", None),
        ("bias", "drop"),
        ("ridge", "drop"),
        ("ridge_sequential", "drop"),
        ("ot_column", "drop"),
        ("ot_mass", "drop"),
        ("ot_ridge", "ridge"),
        ("ot_ridge_sequential", "ridge_sequential"),
    ],
)
def test_each_has_to_beat_what_keeps_the_same_channels(fusion, expected):
    tail = "-uniform-sinkhorn" if fusion.startswith("ot_") else ""
    found = baseline(f"prune-leverage-{fusion}-a0.20{tail}")
    assert found == (expected and f"prune-leverage-{expected}-a0.20")
    assert baseline("dense") is None


def test_verdicts_need_the_interval_and_every_seed():
    documents = swept()
    rows = verdicts(documents, BOOTSTRAP).set_index("step")
    assert list(rows.index) == [MASS, COLUMN, REFIT, BOTH]
    assert rows.verdict.to_dict() == {
        MASS: "better",
        COLUMN: "worse",
        REFIT: "better",
        BOTH: "undecided",
    }
    for step, row in rows.iterrows():
        saved = mean_losses(documents, row.baseline) - mean_losses(documents, step)
        assert row.difference == pytest.approx(saved.mean())
        assert row.low < row.difference < row.high and row.seeds == 3
    assert rows.loc[BOTH, "baseline"] == REFIT and rows.loc[MASS, "baseline"] == DROP


def test_one_seed_against_the_others_leaves_it_undecided():
    losses = np.array([0.2, 0.3, -0.001])
    assert verdict(Interval(0.1, 0.05, 0.3), losses) == "undecided"
    assert verdict(Interval(0.1, 0.05, 0.3), np.abs(losses)) == "better"
    assert verdict(Interval(-0.1, -0.3, -0.05), -np.abs(losses)) == "worse"
    assert verdict(Interval(-0.1, -0.3, 0.05), -np.abs(losses)) == "undecided"
    assert verdict(Interval(0.0, 0.0, 0.0), np.zeros(3)) == "undecided"


def test_swapping_a_step_and_its_baseline_negates_the_verdict():
    ours = verdicts(swept({DROP: 0.4, MASS: 0.3}), BOOTSTRAP).iloc[0]
    names = {DROP: MASS, MASS: DROP}
    swapped = {
        seed: one.assign(step=one.step.replace(names))
        for seed, one in swept({DROP: 0.4, MASS: 0.3}).items()
    }
    theirs = verdicts(swapped, BOOTSTRAP).iloc[0]
    np.testing.assert_allclose(
        [ours.difference, ours.low, ours.high], [-theirs.difference, -theirs.high, -theirs.low]
    )
    assert (ours.verdict, theirs.verdict) == ("better", "worse")


def test_order_of_rows_and_of_documents_changes_nothing():
    documents = swept()
    mixed = {seed: one.sample(frac=1, random_state=seed) for seed, one in documents.items()}
    ours, theirs = (
        table(found, SETTINGS, BOOTSTRAP).set_index("step").sort_index()
        for found in (documents, mixed)
    )
    pd.testing.assert_frame_equal(ours, theirs)


def test_a_step_in_some_seeds_counts_those():
    documents = swept()
    documents[2] = documents[2][documents[2].step != MASS]
    rows = table(documents, SETTINGS, BOOTSTRAP).set_index("step")
    assert rows.loc[MASS, "seeds"] == 2 and rows.loc[DROP, "seeds"] == 3
    assert verdicts(documents, BOOTSTRAP).set_index("step").loc[MASS, "seeds"] == 2


def test_settings_are_not_mixed():
    mixed = SETTINGS | {2: SETTING | {"window": 2048}}
    for call in (
        lambda: describe(mixed),
        lambda: one_setting(mixed),
        lambda: table(swept(), mixed, BOOTSTRAP),
    ):
        with pytest.raises(InputError, match="can't mix evaluation settings: window differ"):
            call()
    documents = swept()
    documents[1] = documents[1].assign(tokens=documents[1].tokens + 1)
    with pytest.raises(InputError, match="seed 1 or a step of it"):
        table(documents, SETTINGS, BOOTSTRAP)
    documents = swept()
    lost = (documents[0].step == MASS) & (documents[0].document == 3)
    documents[0] = documents[0][~lost]
    with pytest.raises(InputError, match="seed 0 or a step of it"):
        verdicts(documents, BOOTSTRAP)


def test_words_name_corpus_window_and_seeds():
    words = "docs, evaluation split: 64 windows of 128 tokens in 40 documents, float32, "
    words += "calibration seed"
    assert describe(SETTINGS) == f"{words}s 0, 1, 2"
    assert describe({7: SETTING}) == f"{words} 7"


def test_the_page_says_first_how_often_transport_won():
    documents = swept(SHIFTS | {"prune-random-ot_mass-r0.30": 0.5})
    rows, found = table(documents, SETTINGS, BOOTSTRAP), verdicts(documents, BOOTSTRAP)
    page = as_html(rows, found, SETTINGS, BOOTSTRAP)
    first = "Transport beat its baseline in 1 of 3 comparisons, lost to it in 1; 1 undecided."
    assert page.index(first) < page.index("<table")
    assert "no baseline" in page and "nan" not in page.lower() and "&lt;NA&gt;" not in page
    assert page.count("<table") == 2 and f"{rows.perplexity[1]:.3f}" in page
    assert describe(SETTINGS) in page


def test_one_seed_decides_but_is_told():
    documents = swept(seeds=1)
    found = verdicts(documents, BOOTSTRAP)
    assert found.set_index("step").loc[MASS, "verdict"] == "better" and (found.seeds == 1).all()
    assert "1 calibration seed, too few" in summary(found, BOOTSTRAP, 40)


def test_nothing_to_compare_is_said():
    documents = swept({DROP: 0.4})
    found = verdicts(documents, BOOTSTRAP)
    assert found.empty and "No transport was compared" in summary(found, BOOTSTRAP, 40)
    rows = table(documents, SETTINGS, BOOTSTRAP)
    assert "No transport" in as_html(rows, found, SETTINGS, BOOTSTRAP)
