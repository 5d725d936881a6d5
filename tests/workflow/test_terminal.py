"""What a person sees: jobs on a terminal, what failed and how to do it again, Ctrl-C."""

import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from .conftest import SMALL, Workflow, changed

pytestmark = pytest.mark.workflow
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
CHECKPOINT = "results/checkpoints/tiny"


class Terminal:
    """A Snakemake on a terminal of its own."""

    def __init__(self, workflow: Workflow, command: str):
        self.shown = ""
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.chdir(workflow.folder)
            os.execve("/bin/sh", ["sh", "-c", f"exec {command}"], ENVIRONMENT)

    def read(self, until=lambda: False, seconds: float = 120) -> float:
        """Read until something holds or the run has ended; return how long that took."""
        start = time.monotonic()
        while not until():
            assert time.monotonic() - start < seconds, self.shown
            if not select.select([self.screen], [], [], 0.1)[0]:
                continue
            try:
                self.shown += os.read(self.screen, 65536).decode(errors="replace").replace("\r", "")
            except OSError:  # Linux says so when nobody holds the terminal any more
                break
        return time.monotonic() - start

    def interrupt(self, times: int) -> None:
        """Press Ctrl-C, some times in quick succession."""
        for _ in range(times):
            os.write(self.screen, b"\x03")
            time.sleep(0.1)

    def terminate(self) -> None:
        """Do what a scheduler does to all processes when an allocation ends."""
        os.killpg(self.pid, signal.SIGTERM)

    def status(self) -> int:
        """The exit status, once the run has ended."""
        os.close(self.screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def shell(workflow: Workflow, command: str) -> str:
    """Run a command as printed; return what it says."""
    result = subprocess.run(
        command,
        shell=True,
        cwd=workflow.folder,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def slow_training(workflow: Workflow) -> None:
    """The same training with a state after each of its 20 steps, four steps a second."""
    source = "src/headroom/training.py"
    workflow.edit(source, "save_seconds: float = 30.0", "save_seconds: float = 0.0")
    workflow.edit(source, "    optimizer.step()\n", "    optimizer.step()\n    time.sleep(0.25)\n")


STOPS = {
    "ctrl-c": lambda terminal: terminal.interrupt(1),
    "ctrl-c again and again": lambda terminal: terminal.interrupt(3),
    "end of an allocation": Terminal.terminate,
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_leaves_nothing_and_the_next_goes_on_to_the_same_bytes(
    copied, finished, stop
):
    slow_training(copied)
    snakemake = shlex.join([sys.executable, "-m", "snakemake"])
    terminal = Terminal(copied, f"{snakemake} --cores 2 -- {CHECKPOINT}")
    states = copied.folder / "results/.state/training"
    terminal.read(lambda: any(states.glob("*/state.pt")))
    STOPS[stop](terminal)
    assert terminal.read() < 60  # seconds; at once where nothing else runs
    # One more Ctrl-C may find an interpreter that has nothing left to do but to go.
    assert terminal.status() in (1, -signal.SIGINT)
    assert "Traceback" not in terminal.shown
    alive = [p for p in psutil.process_iter(["cmdline"]) if str(copied.folder) in str(p.info)]
    assert not alive
    assert not [*(copied.folder / ".snakemake/locks").glob("*")]
    log = copied.folder / "results/logs/train_checkpoint/tiny.log"
    assert "Traceback" not in log.read_text()
    (again,) = re.findall(
        r"^headroom: The run was stopped\. .*: (\S.*)$", terminal.shown, flags=re.M
    )
    resumed = Terminal(copied, again)
    resumed.read()
    assert resumed.status() == 0
    assert Workflow.counted(resumed.shown) == {"train_checkpoint": 1}
    started, ended = map(resumed.shown.index, ("Job 0: train_checkpoint trained=tiny", "Finished"))
    assert started < ended < resumed.shown.index("1 of 1 steps (100%) done")
    assert "    resources:" not in resumed.shown
    said = log.read_bytes().decode()
    assert re.search(r"^resuming after step [1-9]", said, flags=re.M)
    assert re.search(r"^training: 20/20, 00:\d\d so far, 00:00 left, ", said, flags=re.M)
    assert "\r" not in said, "lines, no bar"
    for name in ("model.safetensors", "config.json", "manifest.json"):
        path = f"{CHECKPOINT}/{name}"
        assert (copied.folder / path).read_bytes() == (finished.folder / path).read_bytes()


FAULT = """
import os
if snakemake.wildcards.corpus == "killed" or (
    snakemake.wildcards.corpus == "healed" and snakemake.resources.failures < 1
):
    os.kill(os.getpid(), 9)
from headroom.corpora"""


def test_each_lost_job_is_told_with_the_command_that_does_it_alone(empty):
    empty.edit("workflow/scripts/text_documents.py", "\nfrom headroom.corpora", FAULT)
    config = changed("corpora.bad", {"path": "bad.txt", "separator": "<>"})
    config["corpora"] |= {name: SMALL["corpora"]["docs"] for name in ("killed", "healed")}
    empty.configure(config)
    (empty.folder / "config.yaml").rename(empty.folder / "my own.yaml")
    (empty.folder / "bad.txt").write_text("\n\n")
    targets = [f"results/corpora/{name}/counts.json" for name in ("bad", "killed", "healed")]
    arguments = ("--cores", "2", "--keep-going", "--configfile", "my own.yaml", "--", *targets)
    result = empty.run(*arguments, check=False)
    assert result.returncode == 1
    told = result.stderr.split("Exiting because a job execution failed")[1]
    lost = re.findall(r"^FAILED text_documents \(corpus=(.*)\)$", told, flags=re.M)
    assert lost == ["bad", "killed"], "what a retry healed is not lost"
    assert "    headroom: config key corpora.bad: the source holds no text" in told
    assert "  no word in results/logs/text_documents/killed.log" in told
    first, _ = re.findall(r"^  this job alone: (.*)$", told, flags=re.M)
    assert shlex.split(first)[3:-1] == ["--cores", "2", "--configfile", "my own.yaml", "--"]
    (empty.folder / "bad.txt").write_text("\n<>\n".join(f"Text {n} is here." for n in range(60)))
    assert Workflow.counted(shell(empty, first)) == {"text_documents": 1}
    assert (empty.folder / targets[0]).is_file()


@pytest.mark.parametrize(
    ("target", "needed"),
    [("gradients", "checkpoints and instructions"), ("gates", "translators")],
)
def test_a_study_without_anything_to_do_says_what_it_needs(empty, target, needed):
    empty.configure({"checkpoints": SMALL["checkpoints"]})
    result = empty.run("--cores", "1", target, check=False)
    *_, line = result.stderr.splitlines()
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert line.startswith(f"headroom: target {target}: nothing is configured (needed: {needed}")
