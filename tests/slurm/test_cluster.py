"""What a real SLURM does to the workflow: equal results, and every way in which a job can end."""

import copy
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.workflow.conftest import SMALL, Workflow, changed, copy_project

from .conftest import accounted, said, slurm, submitted

pytestmark = pytest.mark.slurm

# Every rule of every study, few of them twice: a job on a cluster starts Snakemake two more times.
STUDIES = copy.deepcopy(SMALL) | {"compute": {"gpus": 1}}
STUDIES["heads"] |= {
    "metrics": ["relu"],
    "quantiles": [],
    "merges": [
        {
            "criterion": "error",
            "methods": ["refit"],
            "budgets": ["2x1"],
            "controls": ["random0", "flap"],
        }
    ],
}
STUDIES["ffn"]["calibration"]["seeds"] = [0]
STUDIES["gates"] |= {"target_heads": [], "controls": []}
STUDIES["evaluation"]["translation"]["beams"] = [1]
del STUDIES["branches"]["ablations"]["branch"]

# What may differ between two runs of the same thing: when, where and how long.
OF_THE_RUN = re.compile(
    r"provenance/|benchmarks/|logs/|\.state/|\.sums/|slurm/"
    r"|.*/events\.out\.tfevents"  # names and records hold time, host and process
    r"|latency/|gates/.*/latency|.*/decode_latency\.|gates/.*/runs\.html"  # measured, and drawn
)


def model(**sizes) -> dict:
    common = {"hidden": 64, "layers": 2, "heads": 4, "groups": 2, "ffn": 128, "warmup": 2}
    return {"train": common | sizes}


# One trains long enough to be disturbed, a step of the other takes more memory than it asks for.
TRAININGS = {
    "corpora": SMALL["corpora"],
    "compute": {"mem_mb": 700},
    "checkpoints": {
        "long": model(vocabulary=384, window=64, batch=16, tokens=16 * 64 * 300),
        "wide": model(vocabulary=2000, window=128, batch=256, tokens=256 * 128 * 3),
    },
}
LONG, WIDE = "results/checkpoints/long", "results/checkpoints/wide"


@pytest.fixture(scope="session")
def studies(cluster, tmp_path_factory):
    """All studies on the cluster and beside it on one machine, while other tests mostly wait."""
    made = {}
    with ThreadPoolExecutor() as pool:
        for name, arguments in (("cluster", ()), ("local", ("--cores", "2"))):
            workflow = copy_project(tmp_path_factory.mktemp(name) / ".")
            workflow.configure(STUDIES)
            run = said if arguments else submitted
            made[name] = (workflow, pool.submit(run, workflow, *arguments))
        yield made


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory) -> Workflow:
    """Both trainings as they are when nothing happens; states are saved each second."""
    workflow = copy_project(tmp_path_factory.mktemp("undisturbed") / ".")
    workflow.configure(TRAININGS)
    save = "save_seconds: float = "
    workflow.edit("src/headroom/training.py", f"{save}30.0", f"{save}1.0")
    said(workflow, "--cores", "2", LONG, WIDE)
    return workflow


@pytest.fixture
def untrained(undisturbed, tmp_path) -> Workflow:
    """The same with both trainings still to be done."""
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed.folder, folder, symlinks=True)
    for name in (LONG, WIDE):
        shutil.rmtree(folder / name)
    return Workflow(folder)


def files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def log(workflow: Workflow, name: str) -> str:
    return (workflow.folder / f"results/logs/train_checkpoint/{name}.log").read_text()


def trainings(workflow: Workflow) -> list[psutil.Process]:
    """The processes that train here now."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = process.cwd() == str(workflow.folder)
            command = process.cmdline()
        except psutil.Error:
            continue
        if inside and command and command[-1].endswith(".train_checkpoint.py"):
            found.append(process)
    return found


def wait_for_state(workflow: Workflow) -> None:
    """Wait until a training has saved its state, from which it could go on."""
    end = time.monotonic() + 600
    while not list((workflow.folder / "results/.state/training").glob("*/state.pt")):
        assert time.monotonic() < end, "no state was saved"
        time.sleep(0.1)


def test_a_line_of_bad_input_reaches_the_user(studies, untrained):  # the studies begin first
    (untrained.folder / "empty.txt").write_text("")
    untrained.configure(changed("corpora.bad", {"path": "empty.txt"}, TRAININGS))
    shown = submitted(untrained, "results/corpora/bad/train.parquet", "--retries", "0", check=False)
    assert re.search(r"^\s*headroom: .*corpora\.bad", shown, flags=re.M), shown[-4000:]


def test_an_attempt_without_memory_comes_back_with_more_and_half_the_batch(untrained, undisturbed):
    shown = submitted(untrained, WIDE)
    asked = [(row[0], row[1]) for row in accounted(shown, "ReqMem")]
    assert asked in ([(end, "700M"), ("COMPLETED", "1400M")] for end in ("FAILED", "OUT_OF_MEMORY"))
    assert "died for want of memory: 1 " in log(untrained, "wide")
    found, expected = (
        load_file(workflow.folder / WIDE / "model.safetensors")
        for workflow in (untrained, undisturbed)
    )
    for name, tensor in expected.items():
        # Sums in another order, and Adam divides by the root of small squares.
        distance = (found[name] - tensor).norm() / tensor.norm()
        print(f"{name}: {distance:.1e}")
        assert distance < 1e-5, name


# The first task ends long after the others.
ARRAY = """
rule all:
    input: expand("out/{n}", n=range(3))
rule task:
    output: "out/{n}"
    resources: mem_mb=600
    shell: "sleep $((SLURM_ARRAY_TASK_ID == SLURM_ARRAY_TASK_MIN ? 30 : 0)); touch {output}"
"""


def test_arrays_are_left_off_because_a_task_waits_for_the_files_of_the_first(cluster, tmp_path):
    """If this fails, the plugin was mended, and the profile could submit arrays."""
    (tmp_path / "Snakefile").write_text(ARRAY)
    polling = ("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "5")
    array = ("--slurm-array-jobs", "all", "--slurm-status-command", "squeue")
    shown = said(
        Workflow(tmp_path), "--executor", "slurm", "--jobs", "9", *array, *polling, check=False
    )
    ends = [row[0] for row in accounted(shown)]
    assert sorted(ends) == ["COMPLETED", "FAILED", "FAILED"]
    logs = "".join(path.read_text() for path in tmp_path.rglob("slurm_logs/**/*.log"))
    assert logs.count("MissingOutputException") == 2


def test_a_training_that_met_its_time_limit_goes_on_to_the_same_bytes(untrained, undisturbed):
    with ThreadPoolExecutor() as pool:
        limit = ("--set-resources", "train_checkpoint:runtime=2")
        run = pool.submit(submitted, untrained, LONG, *limit)
        wait_for_state(untrained)
        for process in trainings(untrained):  # so that it can't end in time, however fast
            process.send_signal(signal.SIGSTOP)
        shown = run.result()
    ends = [row[0] for row in accounted(shown)]
    assert ends[0] == "TIMEOUT" and ends[-1] == "COMPLETED"
    assert "resuming after step" in log(untrained, "long")
    assert "want of memory" not in log(untrained, "long")
    assert files(untrained.folder / LONG) == files(undisturbed.folder / LONG)


def test_all_studies_give_the_same_bytes_as_on_one_machine(studies):
    (here, here_run), (there, there_run) = studies["cluster"], studies["local"]
    shown = here_run.result()
    there_run.result()
    found, expected = (files(workflow.folder / "results") for workflow in (here, there))
    assert {name for name in expected if not OF_THE_RUN.match(name)} == {
        name for name in found if not OF_THE_RUN.match(name)
    }
    differ = [
        name
        for name, content in expected.items()
        if not OF_THE_RUN.match(name) and found[name] != content
    ]
    assert not differ
    jobs = accounted(shown, "NodeList", "AllocTRES")
    assert {row[1] for row in jobs} == {"one", "two"}
    assert {row[0] for row in jobs} == {"COMPLETED"}
    assert sum("gres/gpu=1" in row[2] for row in jobs) > 20
    (report,) = (here.folder / "results/slurm").glob("efficiency_report_*.csv")
    head, *rows = report.read_text().splitlines()
    assert "MaxRSS_MB" in head and "RequestedMem_MB" in head and len(rows) >= len(jobs)
    assert "Nothing to be done" in submitted(here)


def test_a_job_whose_node_fails_ends_on_the_other_and_never_runs_twice(untrained, undisturbed):
    with ThreadPoolExecutor() as pool:
        run = pool.submit(submitted, untrained, LONG)
        wait_for_state(untrained)
        (node,) = slurm("squeue", "-h", "-t", "RUNNING", "-o", "%N").splitlines()
        slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        most = 0
        try:
            while not run.done():
                most = max(most, len(trainings(untrained)))
                time.sleep(0.2)
        finally:
            slurm("scontrol", "update", f"nodename={node}", "state=resume")
        shown = run.result()
    (first, *_), (last, *other) = accounted(shown, "JobID", "NodeList", "Start", "End")
    assert first == "NODE_FAIL" and last == "COMPLETED"
    assert most == 1
    assert other[1] != node
    assert "resuming after step" in log(untrained, "long")
    assert "want of memory" not in log(untrained, "long")
    assert files(untrained.folder / LONG) == files(undisturbed.folder / LONG)
