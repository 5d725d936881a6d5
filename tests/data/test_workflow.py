"""The same rules on real weights and real text: a published Llama on TinyStories."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.workflow.conftest import copy_project

DATA = Path(
    os.environ.get("HEADROOM_DATA", Path(__file__).parents[2].parent / "shared" / "data")
).resolve()
pytestmark = [
    pytest.mark.data,
    pytest.mark.workflow,
    pytest.mark.skipif(
        not (DATA / "models" / "stories260K").is_dir(),
        reason=f"no real data in {DATA} (set HEADROOM_DATA to the folder that holds it)",
    ),
]
STORY = "<|endoftext|>"
PRUNED = {
    "ratios": [0.3],
    "prunes": [{"scores": ["random", "flap"], "fusions": ["drop", "ridge", "ot_mass", "ot_ridge"]}],
    "saved": ["prune-flap-ridge-r0.30", "prune-flap-ot_mass-r0.30-activation"],
}


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    workflow = copy_project(tmp_path_factory.mktemp("stories") / ".")
    texts = DATA / "tinystories"
    workflow.configure(
        {
            "checkpoints": {"stories": {"path": str(DATA / "models" / "stories260K")}},
            "corpora": {
                "stories": {
                    "calibration": {"path": str(texts / "train.txt"), "separator": STORY},
                    "evaluation": {"path": str(texts / "v2_valid.txt"), "separator": STORY},
                }
            },
            "evaluation": {"window": 512, "sequences": 120, "latency": {"runs": 3}},
            "heads": {
                "calibration": {"window": 512, "sequences": 16, "inputs": 8},
                "metrics": ["relu"],
                "quantiles": [0.9],
                "merges": [
                    {
                        "criterion": "relu",
                        "methods": ["average", "aligned", "refit"],
                        "quantiles": [0.9],
                    },
                    {
                        "criterion": "error",
                        "methods": ["refit"],
                        "budgets": ["2x2"],
                        "controls": ["random0", "random1", "dissimilar", "flap"],
                    },
                ],
            },
            "ffn": {"checkpoints": []},
        }
    )
    workflow.run("--cores", "2", timeout=1800)
    return workflow


@pytest.fixture(scope="module")
def wiki(tmp_path_factory):
    """The 3 M-parameter Llama on the text that it was trained for, calibrated on its own text."""
    workflow = copy_project(tmp_path_factory.mktemp("wiki") / ".")
    texts, heading = DATA / "wikitext2", "^ = [^=]+ = $"
    files = {"train": "wiki.valid.raw", "calibration": "wiki.train.tokens"}
    files["evaluation"] = "wiki.test.raw"
    workflow.configure(
        {
            "checkpoints": {"wiki": {"path": str(DATA / "models" / "wikitext3M")}},
            "corpora": {
                "wikitext2": {
                    split: {"path": str(texts / name), "heading": heading}
                    for split, name in files.items()
                }
            },
            "evaluation": {"window": 256, "sequences": 32},
            "ffn": PRUNED | {"calibration": {"window": 256, "sequences": 32, "seeds": [0, 1]}},
        }
    )
    workflow.run("--cores", "2", "ffn", timeout=1800)
    return workflow


def evaluation(workflow, recipe, corpus="stories"):
    path = workflow.folder / f"results/evaluations/{recipe}/{corpus}.json"
    return json.loads(path.read_text())


def test_the_published_loss(stories):
    found = evaluation(stories, "stories")
    assert found["nll"]["value"] == pytest.approx(1.3455, abs=0.002)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(found["nll"]["value"]))
    assert found["documents"] > 100 and found["tokens"] == 120 * 511
    assert found["cost"]["parameters"] == 260032


def test_merges_of_real_heads_keep_a_working_model(stories):
    losses = {
        step: evaluation(stories, f"stories+{step}")["nll"]["value"]
        for step in (
            "merge-relu-average-q0.90",
            "merge-relu-aligned-q0.90",
            "merge-relu-refit-q0.90",
            "merge-error-refit-b2x2",
        )
    }
    dense = evaluation(stories, "stories")["nll"]["value"]
    assert all(dense <= loss < 3 for loss in losses.values()), losses
    assert losses["merge-relu-refit-q0.90"] < losses["merge-relu-aligned-q0.90"]
    half = evaluation(stories, "stories+merge-error-refit-b2x2")["cost"]
    saved = 5 * (4 + 2) * 2 * 8 * 64  # layers x (query heads + key/value heads) x 2dD
    assert half["parameters"] == 260032 - saved


def test_the_controls_are_there_with_their_verdicts(stories):
    path = "results/heads/stories/merges/merge-error-refit-b2x2/stories/evaluation_results.json"
    found = json.loads((stories.folder / path).read_text())
    names = {row["control"] for row in found["controls"]}
    assert names == {"random0", "random1", "dissimilar", "flap_drop", "flap_refit"}
    merged = found["merged_metrics"]["nll_nats_per_token"]
    for name in ("flap_drop", "dissimilar"):
        control = next(row for row in found["controls"] if row["control"] == name)
        comparison = found["ordering"]["comparisons"][f"chosen < {name}"]
        difference = math.log(control["perplexity"]) - merged
        assert comparison["difference"] == pytest.approx(difference, abs=1e-6)
        assert comparison["low"] <= difference <= comparison["high"]
        sign = {"holds": 1, "reversed": -1, "undecided": 0}[comparison["verdict"]]
        assert sign * difference >= 0


def test_refitted_channels_beat_dropped_ones_and_transport_does_not(wiki):
    """What the notes promise: a refit helps any choice; a plan without one harms a good choice."""
    workflow, base, corpus = wiki, "wiki", "wikitext2"
    root = workflow.folder / f"results/ffn/{base}/figures/{corpus}"
    table = pd.read_csv(root / "table.csv").set_index("step")
    verdicts = pd.read_csv(root / "verdicts.csv").set_index("step").verdict
    for score in ("random", "flap"):
        step = f"prune-{score}-ridge-r0.30"
        assert verdicts[step] == "better"
        assert table.perplexity["dense"] < table.perplexity[step]
    assert table.perplexity["prune-flap-drop-r0.30"] < table.perplexity["prune-random-drop-r0.30"]
    assert verdicts["prune-flap-ot_mass-r0.30"] == "worse"
    assert (table.loc[table.index != "dense", "seeds"] == 2).all()
    rescue = workflow.folder / f"results/ffn/{base}/prunes/prune-flap-ridge-r0.30/rescue.json"
    layers = json.loads(rescue.read_text())["layers"]
    assert all(0 < layer["functional_rescue"] < 1 for layer in layers)
    saved = evaluation(workflow, f"{base}+prune-flap-ridge-r0.30", corpus)
    assert saved["perplexity"]["value"] == pytest.approx(
        np.exp(first_seed(workflow, base, corpus, "prune-flap-ridge-r0.30")), rel=1e-5
    )


def first_seed(workflow, base, corpus, step):
    """Mean nll of a step with seed 0, from the sweep."""
    path = workflow.folder / f"results/ffn/{base}/sweep/{corpus}/s0/documents.parquet"
    rows = pd.read_parquet(path)
    rows = rows[rows.step == step]
    return rows.nll.sum() / rows.tokens.sum()
