"""What tests of crashes and the long measurement share: runs that are watched, results compared."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "HEADROOM_WATCHED"  # in the environment of a run and of all that it starts


@dataclass
class Job:
    """One execution of a job, as Snakemake's messages tell it."""

    rule: str
    outputs: frozenset[str]
    began: float
    ended: float | None = None


class Watched:
    """A Snakemake at work in a folder, its jobs and all its processes."""

    def __init__(self, folder: Path, *arguments: str):
        self.mark = uuid.uuid4().hex
        self.jobs: list[Job] = []
        self.lines: list[str] = []
        self.ended = float("nan")
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", MARK: self.mark}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        rule, output, numbers = "", "", {}
        for line in self.process.stdout:
            now = time.monotonic()
            self.lines.append(line)
            if found := re.match(r"(?:local)?rule (\w+):", line):
                rule = found[1]
            elif line.startswith("    output: "):
                output = line.removeprefix("    output: ").strip()
            elif found := re.match(r"    jobid: (\d+)", line):
                job = Job(rule, frozenset(output.split(", ")), now)
                numbers[found[1]] = job
                self.jobs.append(job)
            elif found := re.match(r"Finished jobid: (\d+)", line):
                numbers[found[1]].ended = now

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait(self, seconds: float = 300) -> int:
        """Wait for the end and return the exit status."""
        status = self.process.wait(seconds)
        self.reader.join(30)
        self.ended = time.monotonic()
        return status

    def wait_for(self, found, seconds: float = 120):
        """Wait until a function of nothing returns something, and return that."""
        end = time.monotonic() + seconds
        while not (value := found()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"it didn't come to that:\n{self.text[-4000:]}")
            time.sleep(0.002)
        return value

    def kill(self) -> None:
        """Kill Snakemake itself, as a person or the kernel does, and nothing else."""
        self.process.kill()
        self.process.wait()
        self.ended = time.monotonic()

    def processes(self, script: str = "") -> list[psutil.Process]:
        """Return the living processes of this run, or those that run a rule's script."""
        return [p for p in _marked(self.mark) if not script or _runs(p, f"{script}.py")]

    def survivors(self, seconds: float = 10) -> list[psutil.Process]:
        """Return the processes of this run that are alive after a while; they are killed then."""
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        for process in left:
            process.send_signal(signal.SIGKILL)
        return left

    def complete(self) -> list[Job]:
        """Return the jobs that Snakemake said were finished."""
        return [job for job in self.jobs if job.ended is not None]


def again(before: Watched, after: Watched) -> list[Job]:
    """Return the jobs of a run that an earlier one had finished already."""
    done = {output for job in before.complete() for output in job.outputs}
    return [job for job in after.jobs if job.outputs & done]


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                yield process
        except psutil.Error:
            continue


def _runs(process: psutil.Process, script: str) -> bool:
    try:
        *_, last = process.cmdline() or [""]
        return "python" in process.name() and last.endswith(script)
    except psutil.Error:
        return False


# What equal runs don't make equal: provenance, times of jobs, logs, hidden folders, TensorBoard's
# events (a clock); measured speed and what is drawn or tabled from it.
UNEQUAL = re.compile(
    r"(provenance|benchmarks|logs|events|latency|\.[^/]*)/"
    r"|(.*/)?latency\.json$"
    r"|(.*/)?decode_latency\.(png|svg)$"
    r"|gates/[^/]*/figures/runs\.html$"
)


def artifacts(folder: Path) -> dict[str, bytes]:
    """Return the results of a copy of the project that equal runs make equal."""
    root = folder / "results"
    files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not UNEQUAL.match(name)}


def unequal(one: Path, other: Path) -> list[str]:
    """Return the names of results that differ between two copies, or are in one of them only."""
    first, second = artifacts(one), artifacts(other)
    return [n for n in sorted({*first, *second}) if first.get(n) != second.get(n)]
