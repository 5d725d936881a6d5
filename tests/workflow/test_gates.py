"""Gated runs as a user has them: killed in their midst, leaking pairs, bad input, all files."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from .conftest import ALONE, SMALL, changed

pytestmark = pytest.mark.workflow

alone = functools.partial(changed, config=ALONE)
RUN = "results/gates/phrases/runs/gate-l0.10"


def results(folder):
    """Every byte that a run leaves, but times and the events that hold them."""
    found = {}
    for part in ("checkpoints", "removed", "gates"):
        for path in sorted((folder / "results" / part).rglob("*")):
            if path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_a_run_killed_in_its_midst_ends_with_the_same_numbers(empty, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    empty.edit("src/headroom/training.py", "save_seconds: float = 30.0", "save_seconds: float = 0")
    empty.configure(alone("gates.steps", 120))
    empty.run("--cores", "1", "results/checkpoints/phrases")
    subprocess.run(["cp", "-a", f"{empty.folder}/.", whole], check=True)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", RUN]
    killed = subprocess.Popen(
        command, cwd=empty.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = empty.folder / "results/.state/training"
    end = time.monotonic() + 120
    while not list(state.glob("*/gates/state.pt")):
        assert killed.poll() is None and time.monotonic() < end, "no state was saved"
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    time.sleep(1)  # jobs die with their parent
    assert not (empty.folder / RUN).exists()
    empty.run("--cores", "1", RUN)
    assert (
        "resuming after step"
        in next(
            (empty.folder / "results/logs/gate_heads/phrases").glob("gate-l0.10.log")
        ).read_text()
    )
    subprocess.run(command, cwd=whole, check=True, capture_output=True)
    assert results(empty.folder) == results(whole)


def aligned(folder, train, validation=("good morning",), test=("good night",)):
    """Write sentence pairs whose targets are their sources in capitals."""
    path = {}
    for split, sources in {"train": train, "validation": validation, "test": test}.items():
        sides = (
            sources if isinstance(sources, dict) else {"en": sources, "de": map(str.upper, sources)}
        )
        path[split] = [f"{split}.en", f"{split}.de"]
        for side, lines in sides.items():
            (folder / f"{split}.{side}").write_text("".join(f"{line}\n" for line in lines))
    return alone("pairs.cldr", {"path": path})


IN_THE_JOB = {
    "empty_pair": ({"train": ["a", "b"], "test": ["c", ""]}, "line 2"),
}


@pytest.mark.parametrize("case", IN_THE_JOB)
def test_bad_pairs_are_one_line_that_names_the_file(empty, case):
    splits, said = IN_THE_JOB[case]
    empty.configure(aligned(empty.folder, **splits))
    result = empty.run("--cores", "1", "results/pairs/cldr/train.parquet", check=False)
    assert result.returncode
    log = (empty.folder / "results/logs/sentence_pairs/cldr.log").read_text().splitlines()
    assert log[-1].startswith("headroom: config key pairs.cldr.path.") and said in log[-1]
    assert log[-1] in result.stdout + result.stderr
    assert not (empty.folder / "results/pairs/cldr/train.parquet").exists()


def test_files_of_unequal_length_are_refused_before_any_job(empty):
    empty.configure(aligned(empty.folder, {"en": ["a", "b"], "de": ["A"]}))
    result = empty.run("--cores", "1", check=False)
    said = "headroom: config key pairs.cldr.path.train: train.en has 2 lines and train.de 1"
    assert result.returncode and said in result.stderr
    assert not (empty.folder / "results").exists()


def test_leaking_and_empty_training_pairs_go_and_are_counted(empty):
    train = ["good night", "a  cat", "", "a dog", "a dog", "good morning"]
    empty.configure(aligned(empty.folder, train))
    empty.run("--cores", "1", "results/pairs/cldr/train.parquet")
    counts = json.loads((empty.folder / "results/pairs/cldr/counts.json").read_text())
    assert counts["leaked"] == 2 and counts["empty"] == 1 and counts["duplicates"] == 1
    kept = pd.read_parquet(empty.folder / "results/pairs/cldr/train.parquet")
    assert list(kept.source) == ["a cat", "a dog"]
    log = (empty.folder / "results/logs/sentence_pairs/cldr.log").read_text()
    assert "2" in log and "leak" in log


def test_a_diverging_run_says_so_and_leaves_nothing(empty):
    config = alone("translators.phrases.train.learning_rate", 1.0e30)
    config["translators"]["phrases"]["train"]["schedule"] = "constant"
    empty.configure(config)
    result = empty.run("--cores", "1", "results/checkpoints/phrases", check=False)
    log = (empty.folder / "results/logs/train_translator/phrases.log").read_text()
    assert result.returncode and "lower the learning rate" in log.splitlines()[-1]
    assert not (empty.folder / "results/checkpoints/phrases").exists()


def test_every_promised_file_is_there(finished):
    root = finished.folder / "results"
    for name in (
        "pairs/cldr/counts.json",
        "translations/phrases/beam2.txt",
        "translations/phrases+gate-k2.json",
        "gates/phrases/training/curves.png",
        "gates/phrases/figures/runs.html",
        "gates/phrases/figures/trade_off.svg",
        "gates/phrases/figures/gate-l0.10/p_open.gif",
        "gates/phrases/runs/gate-l0.10/log.jsonl",
        "gates/phrases/runs/gate-l0.10/gates.parquet",
        "gates/phrases/runs/gate-l0.10/translations/target.txt",
        "removed/phrases+gate-k2/config.json",
    ):
        assert (root / name).is_file(), name
    assert list((root / "events/phrases+gate-l0.10").glob("events.out.tfevents.*"))
    kept = json.loads((root / "gates/phrases/runs/gate-k2/removal.json").read_text())
    scratch = json.loads((root / "gates/phrases/runs/mask-scratch-k2/removal.json").read_text())
    assert kept["open_heads"] == 2 and scratch["kept"] == kept["kept"]
    d = SMALL["translators"]["phrases"]["train"]["hidden"]
    head = 3 * (d * d // 4 + d // 4) + d * d // 4
    assert kept["parameters_before"] - kept["parameters"] == 2 * head
    looks = pd.read_json(root / "gates/phrases/runs/gate-k2/reports.jsonl", lines=True)
    assert list(looks.step) == [0, 2, 4]
