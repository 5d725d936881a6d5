"""What kills at random moments cost: the small experiment of all studies, killed again and again.

    python benchmarks/crashes.py                          12 kills, seed 0, two cores
    python benchmarks/crashes.py --kills 40 --seed 3
    python benchmarks/crashes.py --undisturbed FOLDER     of an earlier run with --keep

Every other kill hits Snakemake, which is then started again, the others a job, which Snakemake
tries again. Prints a Markdown table: kills, processes that outlived their Snakemake by ten seconds,
results that differ from an undisturbed run's, jobs done again though Snakemake had said they were
finished, and seconds of jobs that were begun in vain beside those of all jobs that ended. The last
is what it costs at most: a training goes on from its state.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.workflow.conftest import SMALL, copy_project
from tests.workflow.crashing import Job, Watched, again, unequal


def main() -> None:
    """Run the experiment undisturbed, then with kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--undisturbed", type=Path, help="folder of an earlier undisturbed run")
    parser.add_argument("--keep", type=Path, help="folder to work in (default: one that goes)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        undisturbed = options.undisturbed or made(folder / "undisturbed", options.cores)
        (folder / "killed").mkdir(parents=True)
        copy_project(folder / "killed").configure(SMALL)
        measure(folder / "killed", undisturbed, options)


def made(folder: Path, cores: int) -> Path:
    """Run the experiment to its end in a copy of the project."""
    folder.mkdir(parents=True)
    copy_project(folder).configure(SMALL)
    run = Watched(folder, "--cores", str(cores))
    if run.wait(7200):
        sys.exit(run.text[-4000:])
    return folder


def measure(folder: Path, undisturbed: Path, options: argparse.Namespace) -> None:
    """Kill, start again, and print the table."""
    draw = random.Random(options.seed)
    start = ("--cores", str(options.cores))
    runs, survivors, kills = [Watched(folder, *start)], 0, {"snakemake": 0, "job": 0}
    for number in range(options.kills):
        run = runs[-1]
        # By progress, not by the clock, so that kills spread over the experiment on any machine.
        ahead = len(run.jobs) + draw.randint(1, max(1, 2 * 80 // options.kills - 1))
        while len(run.jobs) < ahead and run.process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 3))
        if run.process.poll() is not None:
            break
        if number % 2:
            kills["job"] += kill_a_job(run, draw)
            continue
        run.kill()
        kills["snakemake"] += 1
        survivors += len(run.survivors())
        runs.append(Watched(folder, *start))
        print(f"killed at {sum(len(r.complete()) for r in runs)} jobs", file=sys.stderr, flush=True)
    if runs[-1].wait(7200):
        sys.exit(runs[-1].text[-4000:])
    later = [(run, after) for place, run in enumerate(runs) for after in runs[place + 1 :]]
    done_again = sum(len(again(run, after)) for run, after in later)
    vain, whole = sum(map(lost, runs)), sum(map(spent, runs))
    print("| kills (Snakemake, job) | survivors | unequal results | complete jobs again | lost |")
    print("|---|---|---|---|---|")
    print(
        f"| {sum(kills.values())} ({kills['snakemake']}, {kills['job']}) | {survivors} | "
        f"{len(unequal(folder, undisturbed))} | {done_again} | {vain:.0f} s of {whole:.0f} s |"
    )


def kill_a_job(run: Watched, draw: random.Random) -> bool:
    """Kill a process that runs a rule's script, and say whether there was one."""
    scripts = [process for job in running(run) for process in run.processes(job.rule)]
    if scripts:
        draw.choice(scripts).kill()
    return bool(scripts)


def running(run: Watched) -> list[Job]:
    """Return the jobs that have begun and not ended."""
    return [job for job in run.jobs if job.ended is None]


def lost(run: Watched) -> float:
    """Seconds of a run's jobs that ended in nothing."""
    seconds = 0.0
    for place, job in enumerate(run.jobs):
        if job.ended is None:
            tries = [other.began for other in run.jobs[place + 1 :] if other.outputs == job.outputs]
            seconds += min(tries, default=run.ended) - job.began
    return seconds


def spent(run: Watched) -> float:
    """Seconds of a run's jobs that ended well."""
    return sum(job.ended - job.began for job in run.complete())


if __name__ == "__main__":
    main()
