"""What every job does before and after its work, in real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from headroom import attempts, jobs

SRC = Path(__file__).parents[2] / "src"


def run(code, cwd, **options):
    text = f"import sys; sys.path.insert(0, {str(SRC)!r})\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", text], cwd=cwd, timeout=60, **options)


START = """
from types import SimpleNamespace as Made
from headroom import jobs
job = Made(log=["log/a.log"], params=Made(code="code", settings={"x": 1}))
job.resources = Made(failures=%d)
job.input, job.output = ["results/in.json"], ["results/out.json", "results/folder"]
halvings = jobs.start(job)
"""
FAILING = (
    START
    + """
from headroom.errors import InputError
import os; os.write(2, b"from C\\n")
open("ran", "a").write("x")
raise InputError("config key a.b is 3: at most 2 is allowed")
"""
)


def test_bad_input_is_one_line_and_is_not_tried_again(tmp_path):
    first = run(FAILING % 0, tmp_path)
    log = (tmp_path / "log/a.log").read_text().splitlines()
    assert first.returncode == 1
    assert log == ["from C", "headroom: config key a.b is 3: at most 2 is allowed"]
    second = run(FAILING % 1, tmp_path)
    assert second.returncode == 1
    assert (tmp_path / "ran").read_text() == "x", "the second attempt must not run"
    assert "not tried again" in (tmp_path / "log/a.log").read_text()
    run(FAILING % 0, tmp_path)
    assert (tmp_path / "ran").read_text() == "xx", "a new run tries again"


def test_other_errors_keep_their_traceback(tmp_path):
    run(START % 0 + "1 / 0", tmp_path)
    log = (tmp_path / "log/a.log").read_text()
    assert "Traceback" in log and log.splitlines()[-1].startswith("headroom: ZeroDivisionError")


def test_only_an_attempt_that_died_for_want_of_memory_halves_what_follows(tmp_path):
    says = START + "print('halvings', halvings, flush=True); "

    def attempt(failures, end):
        run(says % failures + end, tmp_path)
        log = (tmp_path / "log/a.log").read_text()
        found = re.search(r"^halvings (\d)", log, flags=re.M)[0]
        assert ("died for want of memory" in log) == (found != "halvings 0")
        return found

    killed = "import os; os.kill(os.getpid(), 9)"
    assert attempt(0, killed) == "halvings 0"
    assert attempt(1, "raise MemoryError") == "halvings 0", "a kill alone says nothing"
    assert attempt(2, "raise RuntimeError('CUDA out of memory.')") == "halvings 1"
    assert attempt(3, killed) == "halvings 2"
    assert attempt(0, killed) == "halvings 0", "a new run begins anew"
    note = next((tmp_path / "results/.state/attempts").iterdir())
    attempts = json.loads(note.read_text())
    if attempts[-1]["kills"] is not None:
        attempts[-1]["kills"] -= 1  # the kernel has killed for memory since
        note.write_text(json.dumps(attempts))
        assert attempt(1, killed) == "halvings 1"


# What SLURM says (State, MaxRSS, AllocTRES) of the job and of its step.
ENDS = {
    "cgroup": ("OUT_OF_MEMORY||mem=300M", "OUT_OF_MEMORY|4255K|mem=300M", True),
    "watched": ("FAILED||mem=300M", "CANCELLED by 0|349174K|cpu=1,mem=300M,node=1", True),
    "watched_gigabytes": ("FAILED||mem=1.50G", "CANCELLED by 0|1700M|mem=1.50G", True),
    "time": ("TIMEOUT||mem=300M", "CANCELLED|214K|mem=300M", False),
    "node": ("NODE_FAIL||mem=300M", "CANCELLED by 0||mem=300M", False),
    "error": ("FAILED||mem=300M", "FAILED|290M|mem=300M", False),
    "unlimited": ("FAILED||mem=300M", "FAILED|900M|mem=300M", False),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_slurm_says_of_an_end_decides(name, tmp_path, monkeypatch):
    *rows, memory = ENDS[name]
    sacct = tmp_path / "sacct"
    text = "\n".join(rows)
    sacct.write_text(f"#!/bin/sh\n[ \"$6\" = 7_2 ] && cat <<'END'\n{text}\nEND\n")
    sacct.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    note = tmp_path / "note.json"
    assert attempts.begin(note, 0) == 0
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert attempts.begin(note, 1) == memory


ENDING = (
    START % 0
    + """
import os, pathlib
pathlib.Path("results/folder").mkdir(parents=True)
pathlib.Path("results/folder/a").write_text("a")
pathlib.Path("results/out.json").write_text("{}")
"""
)


def test_outputs_are_recorded_unless_the_job_fails(tmp_path):
    records = [tmp_path / "results/.sums" / name for name in ("out.json", "folder")]
    assert run(ENDING, tmp_path).returncode == 0
    found = json.loads(records[0].read_text())
    assert found["bytes"] == 2 and len(found["sha256"]) == 64
    assert list(json.loads(records[1].read_text())["files"]) == ["a"]
    for end in ("1 / 0", "os.kill(os.getpid(), 15)", "os.kill(os.getpid(), 9)"):
        shutil.rmtree(tmp_path / "results/folder", ignore_errors=True)
        assert run(ENDING + end, tmp_path).returncode != 0
        assert not any(record.exists() for record in records), end


def test_a_record_that_cannot_be_written_fails_the_job(tmp_path):
    end = "pathlib.Path('results/.sums').write_text('a file, no folder')"
    assert run(ENDING + end, tmp_path).returncode == 1
    assert (tmp_path / "log/a.log").read_text().startswith("headroom: FileExistsError: ")


def test_a_damaged_input_ends_the_job_with_one_line_and_how_to_go_on(tmp_path):
    path, record = tmp_path / "results/in.json", tmp_path / "results/.sums/in.json"
    path.parent.mkdir()
    path.write_text("")
    assert run(START % 0, tmp_path).returncode == 0, "what has no record is accepted"
    record.parent.mkdir(exist_ok=True)
    record.write_text('{"bytes": 1234, "sha256": ""}')
    assert run(START % 0, tmp_path).returncode == 1
    assert (tmp_path / "log/a.log").read_text() == (
        "headroom: results/in.json is damaged: 0 bytes, 1234 were written; delete results/in.json "
        "and run again, it is made anew (if it was replaced on purpose, delete "
        "results/.sums/in.json instead)\n"
    )


def test_a_job_waits_for_its_twin_of_an_earlier_run(tmp_path):
    text = f"import sys; sys.path.insert(0, {str(SRC)!r})\n" + START % 0
    twin = subprocess.Popen(
        [sys.executable, "-c", text + "open('began', 'w'); input(); print('twin ends')"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
    )
    until((tmp_path / "began").exists)
    code = text + "open('second', 'w')"
    second = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    log = tmp_path / "log/a.log"
    until(
        lambda: f"waits for the same job of an earlier run (process {twin.pid}" in log.read_text()
    )
    assert not (tmp_path / "second").exists()
    twin.communicate(b"\n")
    assert second.wait(60) == 0 and (tmp_path / "second").exists()
    assert log.read_text() == "", "its log is its own"


def until(reached):
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_that_slurm_begins_again_is_the_same_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no sacct
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    note = tmp_path / "note.json"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert attempts.begin(note, 0) == 0
    attempts.failed(note, MemoryError())
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert attempts.begin(note, 1) == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert attempts.begin(note, 1) == 1, "its node failed"


def test_in_an_allocation_that_jobs_share_memory_still_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    note = tmp_path / "note.json"
    assert attempts.begin(note, 0) == 0
    attempts.failed(note, MemoryError())
    assert attempts.begin(note, 1) == 1


def test_the_state_of_what_was_interrupted_outlives_a_run_that_ends_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input").write_text("x")
    with jobs.training_state("code", 1, ["input"]) as finished:
        pass
    with pytest.raises(KeyboardInterrupt), jobs.training_state("code", 2, ["input"]) as stopped:
        (stopped / "state.pt").write_text("half")
        raise KeyboardInterrupt
    jobs.remove_states()
    assert not finished.exists() and (stopped / "state.pt").read_text() == "half"
    with jobs.training_state("code", 2, ["input"]) as again:
        assert again == stopped
        jobs.remove_states()
        assert again.exists(), "at work"
    jobs.remove_states()
    assert not stopped.exists()


def test_staged_output_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(RuntimeError), jobs.staged(output) as folder:
        (folder / "new").write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]
    with jobs.staged(output) as folder:
        (folder / "new").write_text("whole")
    assert [p.name for p in output.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_job_left_is_removed_and_a_living_ones_is_not(tmp_path):
    killed = """
    import os
    from headroom import jobs
    with jobs.staged("out") as folder:
        (folder / "new").write_text("half")
        os.kill(os.getpid(), 9)
    """
    run(killed, tmp_path)
    assert len(list(tmp_path.glob(".out.*"))) == 1
    twin = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kept = {f".out.{twin.pid}", ".out.notes", ".outer.1234567", ".out.1234567.x"}
    for name in kept:
        (tmp_path / name).mkdir()
    with jobs.staged(tmp_path / "out") as folder:
        names = {path.name for path in tmp_path.iterdir()}
        assert names == kept | {folder.name}
    twin.communicate(b"\n")


def test_provenance_holds_what_the_job_found_out(tmp_path):
    jobs.write_provenance(tmp_path / "p.json", "code", {"x": 1}, {"hub_commit": "abc"})
    found = json.loads((tmp_path / "p.json").read_text())
    assert (found["hub_commit"], found["settings"], found["code"]) == ("abc", {"x": 1}, "code")


def test_state_belongs_to_settings_code_and_the_bytes_of_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("input").write_text("a")

    def folder(code="c", settings=None):
        with jobs.training_state(code, settings or {"lr": 1.0}, ["input"]) as state:
            return state

    same = folder()
    assert folder() == same
    assert folder(code="d") != same
    assert folder(settings={"lr": 2.0}) != same
    Path("input").write_text("b")
    assert folder() != same


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent death signal is Linux")
def test_a_job_dies_with_its_parent(tmp_path):
    code = f"""
    import subprocess, sys, os, time
    child = subprocess.Popen([sys.executable, "-c", '''
    import sys; sys.path.insert(0, {str(SRC)!r})
    from headroom import jobs; jobs.die_with_parent()
    open("pid", "w").write(str(__import__("os").getpid()))
    import time; time.sleep(60)
    '''.replace("\\n    ", "\\n")])
    while not os.path.exists("pid") or not open("pid").read(): time.sleep(.02)
    os.kill(os.getpid(), 9)
    """
    run(code, tmp_path)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the orphan lives")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent death signal is Linux")
def test_a_job_that_starts_after_its_parent_died_ends_at_once(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    namespace = os.readlink("/proc/self/ns/pid")
    for value, status in (
        (f"{dead.pid} {namespace}", -signal.SIGTERM),
        (f"{os.getpid()} {namespace}", 0),
        (f"{dead.pid} pid:[1]", 0),
    ):
        monkeypatch.setenv(jobs.PARENT, value)
        assert run(START % 0, tmp_path).returncode == status
