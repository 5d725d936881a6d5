"""Kills at random moments, damaged files, a full disk: a rerun makes what was made undisturbed."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from .conftest import Workflow
from .crashing import Watched, again, unequal

pytestmark = pytest.mark.workflow
STEP = "merge-error-refit-b2x1"
MERGED = f"results/checkpoints/tiny+{STEP}"
JUDGED = f"results/heads/tiny/merges/{STEP}/docs/evaluation_results.json"
REDONE = (  # by a run that is asked for JUDGED
    f"results/heads/tiny/merges/{STEP}",
    f"results/evaluations/tiny+{STEP}",
    MERGED,
)
TRAINED = "results/checkpoints/tiny"
TRAININGS = {  # by the script that makes them
    "train_checkpoint": TRAINED,
    "train_stack": "results/branches/stacks/32-d16-h2-b1-3/r00_r10",
}


def remove(workflow: Workflow, *names: str) -> None:
    for name in names:
        path = workflow.folder / name
        assert path.exists(), name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_killed_snakemake_leaves_no_process_and_loses_only_what_it_was_doing(copied, finished):
    draw = random.Random(7)
    remove(copied, *REDONE)
    runs: list[Watched] = []
    for jobs in (1, 2):  # that have begun
        run = Watched(copied.folder, "--cores", "2", JUDGED)
        run.wait_for(lambda run=run, jobs=jobs: len(run.jobs) >= jobs)
        time.sleep(draw.uniform(0, 3))
        run.kill()
        assert run.survivors() == []
        runs.append(run)
    last = Watched(copied.folder, "--cores", "2", JUDGED)
    assert last.wait() == 0, last.text
    first, second = runs
    assert [again(first, second), again(first, last), again(second, last)] == [[], [], []]
    assert unequal(copied.folder, finished.folder) == []


@pytest.mark.parametrize("script", TRAININGS)
def test_a_killed_training_is_done_again_to_the_same_bytes(copied, finished, script):
    draw = random.Random(script)
    remove(copied, TRAININGS[script])
    run = Watched(copied.folder, "--cores", "1", TRAININGS[script])
    (training,) = run.wait_for(lambda: run.processes(script))
    time.sleep(draw.uniform(0, 2))  # importing takes longer; what has a state: test_gates.py
    training.send_signal(signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert "Trying to restart job" in run.text and run.survivors() == []
    assert unequal(copied.folder, finished.folder) == []


HOOK = """
import os, sys
if sys.orig_argv[-1].endswith("reduce_heads.py"):
    kills = open({seen!r}, "a+")
    kills.seek(0)
    touched, moments = [], {moments}[len(kills.read().split()):]
    def hook(event, arguments):
        if event in ("open", "os.rename") and ".tiny+{step}." in str(arguments[0]) and moments:
            touched.append(event)
            if len(touched) == moments[0]:
                os.write(kills.fileno(), b"killed\\n")
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)
"""


def test_a_merge_that_is_killed_while_it_writes_leaves_nothing_half(
    copied, finished, tmp_path, monkeypatch
):
    remove(copied, *REDONE)
    hook, seen = tmp_path / "hook", tmp_path / "seen"
    hook.mkdir()
    moments = random.Random(5).sample(range(2, 12), 2)  # of two attempts, in files it touches
    (hook / "sitecustomize.py").write_text(HOOK.format(step=STEP, seen=str(seen), moments=moments))
    monkeypatch.setenv("PYTHONPATH", str(hook))
    run = Watched(copied.folder, "--cores", "1", MERGED)
    assert run.wait() == 0, run.text
    assert run.text.count("Trying to restart job") == 2
    assert seen.read_text().split() == ["killed", "killed"]
    monkeypatch.delenv("PYTHONPATH")
    copied.run("--cores", "2", JUDGED)
    assert not list((copied.folder / "results/checkpoints").glob(".*"))
    assert unequal(copied.folder, finished.folder) == []


SIMILAR, MAPS = (
    "results/heads/tiny/similarity/relu/docs.safetensors",
    "results/heads/tiny/figures/similarity_relu.png",
)
DAMAGED = {  # what is left of a file, and what is made of it next
    "results/evaluations/tiny/docs.json": (0, JUDGED),
    f"results/heads/tiny/merges/{STEP}/docs/controls.parquet": (0.9, JUDGED),
    SIMILAR: (0.5, MAPS),
    "results/tokenizers/tiny/tokenizer.json": (0.5, "results/tokens/tiny/docs/train.safetensors"),
    f"{MERGED}/model.safetensors": (0.99, f"results/evaluations/tiny+{STEP}/docs.json"),
}


def verify(workflow: Workflow) -> subprocess.CompletedProcess:
    """Do what `make verify` does."""
    return subprocess.run(
        [sys.executable, "-m", "headroom.verify", "results"],
        cwd=workflow.folder,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
    )


def test_damage_is_named_by_verify_and_by_the_next_job(copied):
    assert verify(copied).returncode == 0
    for name, (share, target) in DAMAGED.items():
        path = copied.folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        said = verify(copied)
        assert said.returncode == 1 and f"{name} is damaged" in said.stdout
        assert len(said.stdout.splitlines()) == 1
        (copied.folder / target).unlink(missing_ok=True)
        failed = copied.run("--cores", "1", "-T", "0", target, check=False)
        shown = failed.stdout + failed.stderr
        assert failed.returncode and f"headroom: {name} is damaged" in shown, shown
        path.write_bytes(whole)


def test_what_was_damaged_is_made_anew_as_the_message_says(copied, finished):
    (copied.folder / SIMILAR).write_bytes(b"")
    remove(copied, MAPS)
    failed = copied.run("--cores", "1", MAPS, check=False)
    (advice,) = set(re.findall("delete (.*) and run again", failed.stdout + failed.stderr))
    (copied.folder / advice).unlink()
    copied.run("--cores", "1", MAPS)
    assert unequal(copied.folder, finished.folder) == []


@pytest.fixture
def small_disk(copied):
    """Lay a disk over the results that has room for them and 4 MB."""
    results = copied.folder / "results"
    size = sum(p.stat().st_blocks * 512 for p in results.rglob("*")) + 4_000_000
    aside = results.rename(copied.folder / "aside")
    results.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(results)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip(f"mounting a small disk: {mounted.stderr.strip()}")
    shutil.copytree(aside, results, symlinks=True, dirs_exist_ok=True)
    yield results
    subprocess.run(["umount", str(results)], check=True)


def test_a_full_disk_is_said_in_one_line_and_with_room_the_run_goes_on(
    copied, finished, small_disk
):
    remove(copied, *REDONE)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        free = shutil.disk_usage(small_disk).free
        file.write(bytes(free - 40_000))
    failed = copied.run("--cores", "2", JUDGED, check=False)
    shown = failed.stdout + failed.stderr
    (line,) = {line.strip() for line in shown.splitlines() if "is full: make room" in line}
    assert failed.returncode and line.startswith("headroom: the disk of "), line
    assert "Traceback" not in shown
    assert not (copied.folder / MERGED).exists()
    filler.unlink()
    copied.run("--cores", "2", JUDGED)
    assert unequal(copied.folder, finished.folder) == []
