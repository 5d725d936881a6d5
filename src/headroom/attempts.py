"""How earlier attempts of a job ended, so that one that died for want of memory comes back smaller.

Snakemake tries a failed job again but doesn't say why it failed. Every attempt leaves a note; the
next one reads how it ended: from SLURM's accounting, from the kernel's count of processes killed
for memory on the same host, or from the attempt's own words. What ended otherwise (a time limit, a
node, a signal) is done again as it was, to the same bytes.
"""

import json
import os
import platform
import re
import subprocess
from pathlib import Path

from headroom.checkpoints import write_json

WORDS = ("can't allocate memory", "out of memory")  # of PyTorch's allocators


def begin(note: Path, failures: int) -> int:
    """Note that an attempt begins; say and return how many before it died for want of memory.

    Args:
        note: file of the job's attempts.
        failures: how many attempts of this job failed before, in this run of the workflow.
    """
    own = {"host": platform.node(), "job": _cluster_job(), "kills": _memory_kills()}
    own["restarts"] = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    noted = json.loads(note.read_text()) if failures and note.is_file() else []
    before = [attempt for attempt in noted if not _same(attempt, own)][-failures:]
    for attempt in before:
        if "memory" not in attempt:
            attempt["memory"] = _killed_on_cluster(attempt) or _killed_on_host(attempt)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, [*before, own])
    halvings = sum(attempt["memory"] for attempt in before)
    if halvings:
        print(f"attempts that died for want of memory: {halvings} (as many halvings)", flush=True)
    return halvings


def failed(note: Path, error: BaseException) -> None:
    """Note what ended an attempt that could still say so."""
    memory = isinstance(error, MemoryError) or any(word in str(error) for word in WORDS)
    attempts = json.loads(note.read_text())
    attempts[-1]["memory"] = memory
    write_json(note, attempts)


def _same(attempt: dict, own: dict) -> bool:
    """Whether an attempt is this one, which SLURM began again because its node failed.

    In an allocation that all jobs share their number is equal too, but nothing was restarted since.
    """
    return attempt["job"] == own["job"] and attempt["restarts"] < own["restarts"]


def _cluster_job() -> str | None:
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID")


def _killed_on_cluster(attempt: dict) -> bool:
    """Whether SLURM ended a job or one of its steps for its memory.

    Where cgroups enforce the limit, accounting says so. Where SLURM enforces it by looking
    (``OverMemoryKill``), the job has only FAILED, and its step was cancelled above its limit.
    """
    if attempt["job"] is None:
        return False
    command = ["sacct", "-n", "-P", "-o", "State,MaxRSS,AllocTRES", "-j", attempt["job"]]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return any(_over_memory(*row.split("|")) for row in found.stdout.splitlines())


def _over_memory(state: str, most: str, allocated: str) -> bool:
    """Whether a row of sacct's is of what was ended for its memory."""
    limit = re.search(r"\bmem=([\d.]+[KMGTP]?)", allocated)
    above = bool(most and limit) and _bytes(most) > _bytes(limit[1])
    return state == "OUT_OF_MEMORY" or (state.startswith("CANCELLED") and above)


def _bytes(size: str) -> float:
    """Read a size of sacct's: a number and maybe a unit."""
    number, unit = re.fullmatch(r"([\d.]+)([KMGTP]?)", size).groups()
    return float(number) * 1024 ** " KMGTP".index(unit or " ")


def _killed_on_host(attempt: dict) -> bool:
    """Whether the kernel of this host has killed anything for memory since the attempt began."""
    now = _memory_kills()
    return attempt["host"] == platform.node() and now is not None and now > attempt["kills"]


def _memory_kills() -> int | None:
    """Processes that the kernel killed for memory since it started (Linux; elsewhere None)."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), flags=re.M)
    except OSError:
        return None
    return int(found[1]) if found else None
