"""What a run that failed tells: each lost job, the end of its log, the command that does it again.

The Snakefile calls this when a run has ended, with Snakemake's jobs and its command line.
"""

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence

from headroom.errors import redacted

LINES = 10  # of a log
BYTES = 65536  # of a log that are looked at
# What a single job needs of the command line, with how many values it takes: where, how, with what.
CARRIED = {
    ("--cores", "-c"): "?",
    ("--jobs", "-j"): "?",
    ("--profile",): None,
    ("--workflow-profile",): None,
    ("--executor", "-e"): None,
    ("--software-deployment-method", "--sdm"): "+",
    ("--default-resources",): "*",
    ("--set-resources",): "+",
    ("--resources", "--res"): "*",
    ("--snakefile", "-s"): None,
    ("--directory", "-d"): None,
    ("--configfile", "--configfiles"): "+",
    ("--config", "-C"): "*",
}


def explain(jobs: Iterable, arguments: Sequence[str]) -> str:
    """Return what is to be said at the end of a run that didn't come to its end.

    Args:
        jobs: those that failed for good, of Snakemake: ``rule.name``, ``wildcards``, ``log``,
            ``output``; a group holds several in ``jobs``.
        arguments: the command line, the program first.
    """
    single = [job for found in jobs for job in getattr(found, "jobs", [found])]
    single = sorted(single, key=lambda job: (job.rule.name, [*map(str, job.output)]))
    told = [line for job in single for line in (*_told(job, arguments), "")]
    again = [*_program(arguments[0]), *arguments[1:]]
    count = f"{len(single)} failed. " if single else "The run was stopped. "
    return "\n".join(
        [
            *told,
            f"headroom: {count}What is done stays, trainings go on from their last saved state; "
            f"run the same again: {shlex.join(again)}",
        ]
    )


def _told(job, arguments: Sequence[str]) -> list[str]:
    wildcards = ", ".join(f"{name}={value}" for name, value in job.wildcards.items())
    head = f"FAILED {job.rule.name}" + (f" ({wildcards})" if wildcards else "")
    path = str(job.log[0])
    last = tail(path)
    said = f"the end of {path}:" if last else f"no word in {path}: see above what Snakemake says"
    again = shlex.join(command(arguments, str(job.output[0])))
    return [head, f"  {said}", *(f"    {line}" for line in last), f"  this job alone: {again}"]


def tail(path: str | os.PathLike) -> list[str]:
    """Return the last lines of a log, printable; none where there is no log.

    A carriage return ends a line too: what a bar overwrites.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - BYTES))
            content = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip().expandtabs() for line in re.split(r"[\r\n]+", content)]
    shown = ["".join(c if c.isprintable() else "�" for c in line) for line in lines if line]
    return [redacted(line) for line in shown[-LINES:]]


def command(arguments: Sequence[str], output: str) -> list[str]:
    """Return the command that makes one output, in the way that a command line said.

    Args:
        arguments: the command line, the program first.
        output: a file or folder.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=True)
    for names, values in CARRIED.items():
        parser.add_argument(*names, nargs=values, action="append")
    known, _ = parser.parse_known_args(arguments[1:])
    kept: list[str] = []
    for names in CARRIED:
        for given in getattr(known, names[0].strip("-").replace("-", "_")) or []:
            values = [] if given is None else [given] if isinstance(given, str) else given
            kept += [names[0], *values]
    return [*_program(arguments[0]), *kept, "--", output]


def _program(called: str) -> list[str]:
    """Return how Snakemake was called: by its name where the shell finds it."""
    if called.endswith("__main__.py"):
        return [sys.executable, "-m", "snakemake"]
    return ["snakemake"] if shutil.which("snakemake") == called else [called]
