"""A SLURM of two nodes for the session, and what its accounting says."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workflow.conftest import Workflow

CLUSTER = Path(__file__).with_name("cluster.sh")
CANNOT = 77  # the exit status of cluster.sh where SLURM's packages can't be had
PATIENCE = 1800  # seconds; a run takes minutes on free cores


@pytest.fixture(scope="session")
def cluster():
    """Bring the private cluster up and let everything that is started talk to it.

    A shell that talks to it already (``eval "$(tests/slurm/cluster.sh env)"``) keeps it.
    """
    up = subprocess.run([CLUSTER, "up"], stderr=subprocess.PIPE, text=True, timeout=600)
    if up.returncode == CANNOT:
        pytest.skip(up.stderr.strip().splitlines()[-1])
    assert up.returncode == 0, up.stderr
    shell = f'eval "$({CLUSTER} env)"; echo "$SLURM_CONF"; echo "$PATH"'
    found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    own = dict(zip(("SLURM_CONF", "PATH"), found.stdout.splitlines(), strict=True))
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    yield
    if before["SLURM_CONF"] == own["SLURM_CONF"]:
        return
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    subprocess.run([CLUSTER, "down"], check=True, timeout=120)


def submitted(workflow: Workflow, *arguments: str, check: bool = True) -> str:
    """Run Snakemake with the cluster's profile and return what it says."""
    polling = ("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "10")
    return said(workflow, "--profile", "slurm", *polling, *arguments, check=check)


def said(workflow: Workflow, *arguments: str, check: bool = True) -> str:
    """Run Snakemake and return what it says."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    found = subprocess.run(command, cwd=workflow.folder, timeout=PATIENCE, **options)
    assert not check or found.returncode == 0, f"{command} failed:\n{found.stdout[-8000:]}"
    return found.stdout


def slurm(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def accounted(output: str, *fields: str, steps: bool = False) -> list[list[str]]:
    """What sacct knows of the jobs of a run of Snakemake, one row for each time it began."""
    (name,) = re.findall(r"^SLURM run ID: (\S+)", output, flags=re.M)
    # slurmdbd hears of a job's end a moment after slurmctld does.
    for _ in range(20):
        time.sleep(0.5)
        options = ["-n", "-P", "-D", *([] if steps else ["-X"]), "--name", name]
        rows = slurm("sacct", *options, "-o", ",".join(("State", *fields))).splitlines()
        if not any(row.startswith(("RUNNING", "PENDING")) for row in rows):
            return [row.split("|") for row in rows]
    raise AssertionError(f"jobs of {name} don't end: {rows}")
