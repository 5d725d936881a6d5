"""The same rules on real sentence pairs: Multi30k, a translator trained for a moment."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
        not (DATA / "multi30k").is_dir(),
        reason=f"no real data in {DATA} (set HEADROOM_DATA to the folder that holds it)",
    ),
]
FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    workflow = copy_project(tmp_path_factory.mktemp("captions") / ".")
    folder = DATA / "multi30k"
    path = {
        split: [str(folder / f"{name}.{side}") for side in ("en", "de")]
        for split, name in FILES.items()
    }
    workflow.configure(
        {
            "checkpoints": {},
            "pairs": {
                "multi30k": {"path": path, "lowercase": True, "limits": {"train": 5000, "test": 60}}
            },
            "translators": {
                "m30k": {
                    "longest": 48,
                    "train": {"vocabulary": 1000, "hidden": 64, "steps": 60, "warmup": 40},
                }
            },
            "evaluation": {
                "translation": {"validation": 8, "latency": {"batches": [1], "runs": 3}}
            },
            "gates": {
                "lambdas": [0.1],
                "target_heads": [4],
                "controls": [],
                "steps": 10,
                "report": 10,
                "gate_learning_rate": 0.3,
            },
        }
    )
    workflow.run("--cores", "2", "gates", timeout=1800)
    return workflow.folder / "results"


def test_the_splits_are_those_that_were_published_and_share_no_sentence(captions):
    counts = json.loads((captions / "pairs/multi30k/counts.json").read_text())
    assert counts["test"]["pairs"] == 60 and 4990 < counts["train"]["pairs"] <= 5000
    splits = {s: pd.read_parquet(captions / f"pairs/multi30k/{s}.parquet") for s in FILES}
    assert not set(splits["train"].source) & {*splits["validation"].source, *splits["test"].source}
    assert all((part.source == part.source.str.lower()).all() for part in splits.values())


def test_every_run_is_scored_as_the_command_line_does(captions):
    runs = pd.read_csv(captions / "gates/m30k/figures/runs.csv").fillna({"step": ""})
    assert list(runs.step) == ["", "gate-l0.00", "gate-l0.10", "gate-k4"]
    assert set(runs.signature) == {"nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:2.6.0"}
    assert runs.open_heads.iloc[-1] == 4 and runs.bleu.between(0, 100).all()
    folder = captions / "translations/m30k+gate-k4"
    command = [sys.executable, "-m", "sacrebleu", folder / "reference.txt", "-i"]
    command += [folder / "beam4.txt", "-m", "bleu", "-lc", "-b", "-w", "6"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(said) == pytest.approx(runs.bleu[3], abs=1e-6)
