"""Tables of runs and methods from sentence counts made by hand."""

import io
import json

import numpy as np
import pandas as pd
import pytest

from headroom.evaluation.translation import COUNTS, bleu, bleu_counts
from headroom.gates import figures, page, tables

BOOTSTRAP = {"resamples": 200, "confidence": 0.95, "seed": 0}
SENTENCES = 40
REFERENCES = [f"the {n} dogs of house {n + 1} ran home on day {n + 2} again" for n in range(40)]
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"


def damaged(every, shift=0):
    """The references with a wrong word in every so manieth sentence."""
    return [
        text.replace("ran home", "sat down") if every and (n + shift) % every == 0 else text
        for n, text in enumerate(REFERENCES)
    ]


def sentence_counts(hypotheses, beams=(1, 4)):
    """A row a sentence and beam size, as translations are counted; greedy ones are all wrong."""
    rows = []
    for size in beams:
        found = bleu_counts(hypotheses if size > 1 else ["x"] * SENTENCES, REFERENCES, False)
        for place, counts in reversed(list(enumerate(found))):  # the order must not matter
            rows.append(
                {"beams": size, "sentence": place, **dict(zip(COUNTS, counts, strict=True))}
            )
    return pd.DataFrame(rows)


def study(runs):
    """Scores, counts and removals of runs given as step -> (translations, open heads)."""
    counts = {step: sentence_counts(texts) for step, (texts, _) in runs.items()}
    one = {"bleu_signature": SIGNATURE}
    scores = {
        step: {
            "sentences": SENTENCES,
            "beam1": {**one, "chrf": 1.0},
            "beam4": {**one, "chrf": 70.0},
        }
        for step in runs
    }
    removals = {
        step: {
            "open_heads": heads,
            "heads": 8,
            "parameters": 1000 + 10 * heads,
            "parameters_before": 1080,
            "flops": 200 + heads,
            "flops_before": 208,
        }
        for step, (_, heads) in runs.items()
        if step
    }
    runs = tables.runs_table(scores, counts, removals, 4, BOOTSTRAP)
    return runs, tables.methods_table(runs, counts, 4, BOOTSTRAP), scores, counts


THREE = {"": (damaged(10), 8)}
for seed, name in enumerate(["", "-s1", "-s2"]):
    THREE |= {
        f"gate-l0.00{name}": (damaged(8, seed), 8),
        f"gate-l0.05{name}": (damaged(8, seed), 5 + seed),  # word by word its control's
        f"gate-k3{name}": (damaged(4, seed), 3),
        f"mask-michel-k3{name}": (damaged(2, seed), 3),
        f"mask-random-k3{name}": (damaged(1, seed), 3),
        # Better in one seed alone: never a verdict.
        f"mask-scratch-k3{name}": (damaged(0 if seed == 1 else 3, seed), 3),
    }


@pytest.fixture(scope="module")
def three():
    return study(THREE)


def test_each_run_is_held_against_the_control_of_its_seed(three):
    runs, _, _, counts = three
    assert runs.step.tolist() == list(THREE)
    scored = {
        step: bleu(table[table.beams == 4][list(COUNTS)].to_numpy().sum(0))
        for step, table in counts.items()
    }
    controls = {f"gate-l0.00{name}" for name in ("", "-s1", "-s2")}
    for row in runs.itertuples():
        assert row.bleu == pytest.approx(scored[row.step])
        assert row.bleu_low <= row.bleu <= row.bleu_high
        if not row.step or row.step in controls:
            assert np.isnan(row.difference) and pd.isna(row.verdict)
            continue
        against = "gate-l0.00" + (f"-s{row.seed}" if row.seed else "")
        assert row.difference == pytest.approx(scored[row.step] - scored[against])
        sign = {"better": row.difference_low > 0, "worse": row.difference_high < 0}
        assert row.verdict == next((name for name, holds in sign.items() if holds), "undecided")
    assert (runs[runs.method == "random"].verdict == "worse").all()


def test_equal_translations_differ_by_nothing(three):
    runs, methods, *_ = three
    same = runs[runs.strength == 0.05]
    assert (same[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    assert (same.verdict == "undecided").all()
    row = methods[methods.strength == 0.05].iloc[0]
    assert (row.control, row.control_low, row.control_high) == (0, 0, 0)
    assert row.control_verdict == "undecided"


def test_the_first_row_is_the_untouched_translator(three):
    base = three[0].iloc[0]
    assert (base.step, base.method, base.seed) == ("", "none", 0)
    assert (base.open_heads, base.heads, base.parameters, base.flops) == (8, 8, 1080, 208)
    assert (base.chrf, base.signature) == (70.0, SIGNATURE)


def test_methods_are_means_over_seeds(three):
    runs, methods, *_ = three
    assert methods.method.tolist() == ["lambda", "lambda", "target", "michel", "random", "scratch"]
    assert (methods.seeds == 3).all() and (methods.heads == 8).all()
    lambdas = methods[methods.method == "lambda"]
    assert lambdas.strength.tolist() == [0, 0.05]
    assert list(zip(lambdas.heads_low, lambdas.heads_high, strict=True)) == [(8, 8), (5, 7)]
    by_method = methods[methods.method != "lambda"].set_index("method")
    means = runs.groupby("method").bleu.mean()
    for name, row in by_method.iterrows():
        assert row.bleu == pytest.approx(means[name])
        assert row.translator == pytest.approx(means[name] - runs.bleu[0])
        control = runs[runs.strength == 0].bleu.mean()
        assert row.control == pytest.approx(means[name] - control)
        if name != "target":
            assert row.gated == pytest.approx(means[name] - means["target"])
    assert np.isnan(by_method.gated["target"]) and np.isnan(lambdas.gated).all()
    assert np.isnan(lambdas.control.iloc[0]) and lambdas.translator.notna().all()


def test_a_verdict_needs_the_sign_of_every_seed(three):
    methods = three[1].set_index("method")
    assert methods.gated_verdict["random"] == methods.gated_verdict["michel"] == "worse"
    row = methods.loc["scratch"]
    assert row.control_verdict == "undecided"
    # Two seeds lose, one gains: the interval alone may lie to one side.
    seeds = three[0][three[0].method == "scratch"].difference
    assert (seeds > 0).any() and (seeds < 0).any()


def test_the_order_of_the_runs_changes_no_number(three):
    shuffled = [*reversed(THREE)]
    shuffled = ["", *(step for step in shuffled if step)]
    _, methods, *_ = study({step: THREE[step] for step in shuffled})
    keys = ["method", "strength"]
    wanted = three[1].sort_values(keys).reset_index(drop=True)
    found = methods.sort_values(keys).reset_index(drop=True)
    pd.testing.assert_frame_equal(found[wanted.columns], wanted)


ONE = {"": THREE[""], "gate-l0.00": THREE["gate-l0.00"], "gate-l0.05": THREE["gate-l0.05"]}
LATER = {"": THREE[""], "gate-l0.00-s7": THREE["gate-l0.00"], "gate-k3-s7": THREE["gate-k3"]}


@pytest.mark.parametrize(
    "made", [ONE, dict(list(ONE.items())[:2]), LATER, THREE], ids=["one seed", "λ 0", "s7", "three"]
)
def test_whatever_was_run_is_shown(made):
    runs, methods, scores, _ = study(made)
    setting = tables.describe(scores, 4, BOOTSTRAP)
    assert setting == (
        f"40 held-out test sentences, beam 4, {SIGNATURE}; 95% intervals over sentences"
    )
    html = page.runs_page(runs, setting, None, tables.methods_html(methods))
    assert "nan" not in html.lower().replace("nant", "")
    figures.trade_off(runs, setting)
    figures.open_against_lambda(runs)
    if made is LATER:
        assert runs.difference.notna().tolist() == [False, False, True]
        assert runs.seed.tolist() == [0, 7, 7]


def test_tables_of_different_settings_are_refused():
    _, _, scores, _ = study(ONE)
    scores["gate-l0.05"]["beam4"]["bleu_signature"] += "|case:lc"
    with pytest.raises(ValueError, match="different settings"):
        tables.describe(scores, 4, BOOTSTRAP)


def test_tables_survive_csv_and_json(three):
    for table in three[:2]:
        text = table.to_csv(index=False)
        again = pd.read_csv(io.StringIO(text), keep_default_na=True)
        if "step" in again:
            again["step"] = again.step.fillna("")
        pd.testing.assert_frame_equal(again, table, check_dtype=False)
        rows = json.loads(table.to_json(orient="records", double_precision=15))
        back = pd.DataFrame(rows)[list(table)]
        pd.testing.assert_frame_equal(back, table, check_dtype=False, rtol=1e-9)


def test_heads_and_seeds_are_read_from_names():
    assert tables.method_of("gate-l0.05-s2")[:2] == ("lambda", 0.05)
    assert tables.method_of("gate-k6")[0::2] == ("target", 6)
    assert tables.method_of("mask-michel-k12-s3")[0::2] == ("michel", 12)
    assert [tables.method_of(s)[3] for s in ("", "gate-k6", "mask-random-k6-s12")] == [0, 0, 12]
    assert tables.control_of("gate-k6-s1", {"gate-l0.00": None}) is None
