"""Two runs in one folder: what both would make is refused, what one makes is left alone."""

import signal

import pytest

from .conftest import Workflow
from .crashing import Watched, unequal
from .test_crashes import JUDGED, MAPS, REDONE, TRAININGS, remove

pytestmark = pytest.mark.workflow
MERGED = REDONE[-1]


def test_disjoint_runs_at_once_both_end_and_train_once_each(copied, finished):
    remove(copied, *TRAININGS.values())
    runs = [Watched(copied.folder, "--cores", "1", target) for target in TRAININGS.values()]
    assert [run.wait() for run in runs] == [0, 0], [run.text for run in runs]
    assert [[job.rule for job in run.jobs] for run in runs] == [[rule] for rule in TRAININGS]
    assert unequal(copied.folder, finished.folder) == []


def test_a_living_runs_targets_are_refused_also_after_another_run_has_ended(copied, finished):
    remove(copied, *REDONE, MAPS)
    living = Watched(copied.folder, "--cores", "1", MERGED)
    living.wait_for(lambda: living.jobs)
    living.process.send_signal(signal.SIGSTOP)

    def refused():
        run = copied.run("--cores", "1", MERGED, check=False)
        said = run.stdout + run.stderr
        assert run.returncode and "rule reduce_heads" not in said
        assert f"another run is at work here (process {living.process.pid} on " in said
        assert "Directory cannot be locked" in said and "--unlock" in said

    refused()
    copied.run("--cores", "1", MAPS)  # when it ends Snakemake removes all locks
    refused()
    living.process.send_signal(signal.SIGCONT)
    assert living.wait() == 0, living.text
    copied.run("--cores", "2", JUDGED)
    assert unequal(copied.folder, finished.folder) == []


@pytest.mark.parametrize("moment", ["with its locks written", "in a job"])
def test_a_dead_runs_lock_goes_by_itself(copied, moment):
    remove(copied, MERGED)
    hook = "    locks.hold("
    killed = f"    import os; os.kill(os.getpid(), {signal.SIGKILL:d})\n{hook}"
    if moment != "in a job":
        copied.edit("workflow/rules/common.smk", hook, killed)
    run = Watched(copied.folder, "--cores", "1", MERGED)
    if moment == "in a job":
        run.wait_for(lambda: run.jobs)
        run.kill()
    assert run.wait() == -signal.SIGKILL and run.survivors() == []
    assert list((copied.folder / ".snakemake/locks").iterdir())
    if moment != "in a job":
        copied.edit("workflow/rules/common.smk", killed, hook)
    copied.run("--cores", "1", MERGED)
    assert not (copied.folder / ".snakemake/locks").exists()


def test_unlock_is_for_a_person_to_say(copied: Workflow):
    remove(copied, MERGED)
    living = Watched(copied.folder, "--cores", "1", MERGED)
    living.wait_for(lambda: living.jobs)
    living.process.send_signal(signal.SIGSTOP)
    copied.run("--unlock")
    planned = copied.run("--cores", "1", MAPS)
    assert "another run" not in planned.stderr and "cannot be locked" not in planned.stderr
    living.process.send_signal(signal.SIGCONT)
    assert living.wait() == 0, living.text
