"""The same rules on real weights and real text: a published Llama on TinyStories."""

import json
import math
import os
from pathlib import Path

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
        }
    )
    workflow.run("--cores", "2")
    return workflow


def evaluation(workflow, recipe):
    path = workflow.folder / f"results/evaluations/{recipe}/stories.json"
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
