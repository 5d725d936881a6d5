"""Comparisons and verdicts against closed forms and planted effects."""

import json

import numpy as np
import pandas as pd
import pytest

from headroom import plotting
from headroom.checkpoints import write_json
from headroom.heads import figures
from headroom.heads.study import changes, compare, compare_losses, ordering
from headroom.heads.tables import as_html, describe, table, verdicts

BOOTSTRAP = {"resamples": 500, "confidence": 0.95, "seed": 0}


def documents(shift=0.0, seed=0, count=60, noise=0.0):
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 200, count)
    base = generator.normal(4, 0.5, count)
    nll = tokens * (base + shift + np.random.default_rng(seed).normal(0, noise, count))
    correct = (tokens * 0.3).astype(int)
    return pd.DataFrame(
        {"document": range(count), "nll": nll, "tokens": tokens, "correct": correct}
    )


def test_a_constant_shift_changes_perplexity_by_its_exponential_without_spread():
    before, after = (documents(s).set_index("document") for s in (0.0, 0.1))
    found = changes(before, after, BOOTSTRAP)
    expected = 100 * (np.exp(0.1) - 1)
    assert found["perplexity_change_percent"] == pytest.approx(expected)
    assert found["perplexity_change_percent_interval"] == pytest.approx([expected, expected])
    assert found["accuracy_change"] == 0


def test_an_accuracy_of_0_has_no_per_cent_change(tmp_path):
    before = documents(0).assign(correct=0)
    merged = summary("tiny+x", 0.1, 90)
    result = compare(
        original=summary("tiny", 0, 100),
        merged=merged,
        log=log() | {"merged_layers": {"0": {"num_pairs_merged": 2}}},
        documents=(before, documents(0.1)),
        controls=controls([0.2, 0.2], 0.3),
        bootstrap=BOOTSTRAP,
    )
    write_json(tmp_path / "result.json", result)
    found = json.loads((tmp_path / "result.json").read_text())["metrics_change"]
    assert found["accuracy_change_percent"] is None
    assert found["accuracy_change_percent_interval"] == [None, None]
    assert found["accuracy_change"] > 0 and found["perplexity_change_percent"] > 0
    results = {"merge-relu-aligned-q0.90": result}
    rows = table(results)
    page = as_html(rows, results)
    assert "nan" not in page.lower() and "of 0: none" in page
    for draw in (figures.metrics_comparison, figures.metrics_change, figures.damage_parameters):
        plotting.save(draw(rows, describe(results)), tmp_path / "figure.png")
    shown = figures.controls(rows, verdicts(results), describe(results))
    plotting.save(shown, tmp_path / "figure.png")


def controls(random_shifts, dissimilar, noise=0.002):
    parts = {f"random{i}": documents(s, 10 + i, noise=noise) for i, s in enumerate(random_shifts)}
    parts["dissimilar"] = documents(dissimilar, 99, noise=noise)
    rows = [t.assign(control=name, effective_parameters=90) for name, t in parts.items()]
    return pd.concat(rows, ignore_index=True)


@pytest.mark.parametrize(
    ("chosen", "random", "dissimilar", "verdict"),
    [
        (0.01, [0.10, 0.11, 0.12], 0.3, "holds"),
        (0.20, [0.10, 0.11, 0.12], 0.3, "reversed"),
        (0.11, [0.05, 0.11, 0.17], 0.3, "undecided"),
        (0.01, [0.10, 0.11, 0.12], 0.05, "reversed"),
        (0.01, [0.10], 0.3, "undecided"),
    ],
)
def test_planted_orders_are_recognised(chosen, random, dissimilar, verdict):
    after = documents(chosen, 5, noise=0.002).set_index("document")
    found = ordering(after, controls(random, dissimilar), BOOTSTRAP)
    assert found["similar < random < dissimilar"] == verdict


def test_the_spread_of_draws_widens_the_interval():
    tokens = np.full(40, 100.0)
    first = np.full((1, 40), 400.0)
    near, far = (400 + 100 * np.array(shifts)[:, None] * np.ones((1, 40)) for shifts in (
        [0.1, 0.1, 0.1], [0.0, 0.1, 0.2]))  # fmt: skip
    narrow, wide = (compare_losses(first, x, tokens, **BOOTSTRAP) for x in (near, far))
    assert narrow["difference"] == pytest.approx(0.1) == wide["difference"]
    assert narrow["high"] - narrow["low"] < 1e-9 < 0.05 < wide["high"] - wide["low"]


def summary(name, shift, effective):
    one = {"value": 1.0, "low": 0.9, "high": 1.1}
    cost = {"effective_parameters": effective, "kv_cache_bytes_per_token": 8, "checkpoint_bytes": 9}
    return {
        "recipe": name, "corpus": "docs", "split": "evaluation", "window": 8, "boundary": "bos",
        "documents": 60, "tokens": 100, "bootstrap": BOOTSTRAP, "cost": cost,
        "perplexity": one, "accuracy": one, "nll": one,
    }  # fmt: skip


def log():
    return {"threshold": 0.9, "total_merged_pairs": 2, "merged_layers": {}}


def test_results_make_one_row_each_and_settings_are_never_mixed():
    args = {
        "original": summary("tiny", 0, 100),
        "merged": summary("tiny+x", 0.1, 90),
        "log": log(),
        "documents": (documents(0), documents(0.1)),
        "controls": controls([0.2, 0.2], 0.3),
        "bootstrap": BOOTSTRAP,
    }
    results = {"merge-relu-aligned-q0.90": compare(**args)}
    rows = table(results)
    assert list(rows.kind) == ["original", "chosen", "dissimilar", "random0", "random1"]
    assert list(rows.parameters_saved_percent) == pytest.approx([0, 10, 10, 10, 10])
    assert verdicts(results) == {"merge-relu-aligned-q0.90": "holds"}
    other = summary("tiny+x", 0.1, 90) | {"window": 16}
    with pytest.raises(ValueError, match="settings differ"):
        compare(**args | {"merged": other})
    with pytest.raises(ValueError, match="different documents"):
        compare(**args | {"documents": (documents(0), documents(0, count=59))})
