"""Who holds Snakemake's locks: what the dead leave goes, what the living hold stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
RUN = """
import os, sys
from pathlib import Path
sys.path.insert(0, %r)
from headroom import locks
folder = Path(".snakemake")
locks.enter(folder)
(folder / "locks").mkdir(exist_ok=True)
number = len(list((folder / "locks").iterdir()))
(folder / "locks" / f"{number}.output.lock").write_text(sys.argv[1])  # as Snakemake does
%s
locks.hold(folder)
print("holds", flush=True)
sys.stdin.readline()
print(locks.alone(folder), flush=True)
"""


@pytest.fixture
def begin(tmp_path):
    """Start runs that lock a name and live until they are ended."""
    runs = []

    def start(name, extra="", says="holds\n"):
        run = subprocess.Popen(
            [sys.executable, "-c", RUN % (str(SRC), extra), name],
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs.append(run)
        assert run.stdout.readline() == says
        return run

    yield start
    for run in runs:
        run.kill()
        run.communicate()


def locked(folder):
    return sorted(p.read_text() for p in (folder / ".snakemake/locks").glob("*.output.lock"))


def end(run):
    return run.communicate("\n", timeout=60)[0].strip()


def test_a_dead_runs_lock_goes_and_a_living_ones_stays(tmp_path, begin):
    living, dead = begin("a"), begin("b")
    assert locked(tmp_path) == ["a", "b"]
    dead.kill()
    dead.wait()
    third = begin("c")
    assert locked(tmp_path) == ["a", "c"]
    assert end(third) == "False" and end(living) == "True"


def test_a_living_runs_lock_is_written_again_after_another_took_all_away(tmp_path, begin):
    living = begin("a")
    for path in (tmp_path / ".snakemake/locks").iterdir():  # as Snakemake does when a run ends
        path.unlink()
    (tmp_path / ".snakemake/locks").rmdir()
    other = begin("b")
    assert locked(tmp_path) == ["a", "b"]
    assert end(other) == "False"
    assert end(living) == "True", "the last one may clear up"
    assert list((tmp_path / ".snakemake/holders").iterdir()) == []


def test_a_run_that_died_before_it_could_say_what_it_had_locked(tmp_path, begin):
    living = begin("a")
    begin("b", "os.kill(os.getpid(), 9)", says="")
    assert locked(tmp_path) == ["a", "b"]
    other = begin("c")
    assert locked(tmp_path) == ["a", "c"]
    end(other), end(living)


def test_of_another_hosts_run_nobody_knows_until_a_person_unlocks(tmp_path, begin):
    from headroom import locks

    holders = tmp_path / ".snakemake/holders"
    holders.mkdir(parents=True)
    note = {"host": "elsewhere", "pid": os.getpid(), "locks": {"output": "x"}}
    (holders / f"elsewhere.{os.getpid()}.1.json").write_text(json.dumps(note))
    run = begin("a")
    assert locked(tmp_path) == ["a", "x"]
    assert end(run) == "False"
    locks.forget(tmp_path / ".snakemake")
    assert end(begin("b")) == "True"


def test_others_may_begin_where_no_hook_says_that_the_locks_are_taken(tmp_path, begin):
    without = "locks = type('Locks', (), {**vars(locks), 'hold': print})"
    living = begin("a", without, says=".snakemake\n")
    assert locked(tmp_path) == ["a"]
    other = begin("b")
    assert locked(tmp_path) == ["a", "b"]
    assert end(other) == "False" and end(living).endswith("True")


def test_who_only_looks_keeps_nobody_waiting():
    from headroom import locks

    for line in ("-n", "-np", "--dry-run all", "--dag", "-S", "--list-rules", "--report r.html"):
        assert locks.looks(line.split()), line
    for line in ("--cores 2", "-c2 heads", "--profile slurm", "-j 1 --keep-going results/a-n.csv"):
        assert not locks.looks(line.split()), line
