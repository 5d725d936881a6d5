"""Real Snakemake runs on a copy of the project, so that tests may edit its code."""

import copy
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PARTS = ("Snakefile", "config.yaml", "workflow", "src", "profiles", "envs", "examples", "slurm")

# Seconds, not minutes: every rule at least once, on a model trained for a few steps.
SMALL = {
    "corpora": {"docs": {"packages": ["python", "yaml", "tqdm"], "characters": 300000}},
    "checkpoints": {
        "tiny": {
            "train": {
                "vocabulary": 384,
                "hidden": 24,
                "layers": 2,
                "heads": 4,
                "groups": 2,
                "ffn": 32,
                "window": 32,
                "batch": 4,
                "tokens": 2560,
                "warmup": 2,
            }
        }
    },
    "pairs": {"cldr": {"cldr": {"pairs": 400}, "limits": {"validation": 8, "test": 12}}},
    "instructions": {"objects": {"packages": ["python"], "samples": 9, "characters": 120}},
    "translators": {
        "phrases": {
            "longest": 40,
            "train": {
                "vocabulary": 320,
                "hidden": 16,
                "layers": 1,
                "heads": 4,
                "ffn": 16,
                "batch_tokens": 256,
                "steps": 6,
                "warmup": 2,
                "report": 3,
            },
        }
    },
    "evaluation": {
        "window": 32,
        "sequences": 64,
        "bootstrap": {"resamples": 200},
        "latency": {"prompt": 4, "new_tokens": 2, "runs": 3},
        "translation": {
            "beams": [1, 2],
            "validation": 8,
            "latency": {"batches": [1], "source": 4, "new_tokens": 2, "runs": 3},
        },
    },
    "heads": {
        "calibration": {"window": 32, "sequences": 8, "inputs": 8},
        "metrics": ["relu", "relu_random"],
        "thresholds": [0.99],
        "quantiles": [0.5],
        "merges": [
            {"criterion": "relu", "methods": ["average"], "thresholds": [0.99]},
            {
                "criterion": "error",
                "methods": ["refit"],
                "budgets": ["2x1"],
                "controls": ["random0", "random1", "dissimilar", "flap"],
            },
        ],
    },
    "ffn": {
        "calibration": {
            "window": 32,
            "sequences": 8,
            "gradient_sequences": 2,
            "heldout": 4,
            "seeds": [0, 1],
        },
        "ratios": [0.5],
        "prunes": [
            {"scores": ["flap"], "fusions": ["drop", "ridge", "ot_mass"]},
            {"scores": ["fo_snip"], "fusions": ["drop"]},
        ],
        "saved": ["prune-flap-ot_mass-r0.50"],
    },
    "gates": {
        "lambdas": [0.1],
        "target_heads": [2],
        "controls": ["scratch"],
        "steps": 4,
        "batch_tokens": 256,
        "report": 2,
    },
    "branches": {
        "vocabulary": 300,
        "length": 12,
        "long_texts": "pieces",
        "texts": {"train": 200, "evaluation": 48},
        "layers": 1,
        "train": {"texts": 4, "steps": 4, "warmup": 1},
        "ablations": {
            "branch": {
                "architectures": [{"hidden": 32, "heads": 2}],
                "ratios": [0, 1],
                "train_branches": ["1-3"],
                "evaluation_branches": [1, 4],
                "controls": [{"mask": "isolated", "ratios": [1]}],
            },
            "heads": {
                "architectures": [{"hidden": 32, "heads": 2}, {"hidden": 64, "heads": 4}],
                "ratios": [1],
                "train_branches": ["1-3"],
                "evaluation_branches": [4],
            },
        },
    },
    "gradients": {
        "settings": ["model_generated"],
        "backends": ["two_sided"],
        "answers": {"new_tokens": 6},
        "batch": 2,
        "block": 4,
        "partitions": 2,
        "two_sided": {"inner": 4, "outer": 4},
        "permutations": 20,
        "greedy": 2,
    },
}
# Its gates study without the rest.
ALONE = {
    "checkpoints": {},
    **{name: SMALL[name] for name in ("pairs", "translators", "evaluation", "gates")},
}
TARGETS = ("job", "all", "heads", "ffn", "gates", "branches", "gradients")  # no jobs of their own


def changed(path, value, config=SMALL):
    """A copy of an experiment with one setting changed; a number in the path counts in a list."""
    config = copy.deepcopy(config)
    node = config
    *keys, last = path.split(".")
    for key in keys:
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[int(key)]
    node[last] = value
    return config


class Workflow:
    """A copy of the project with its own results, run as a user runs it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def configure(self, config: dict) -> None:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config))

    def run(
        self, *arguments: str, check: bool = True, timeout: int = 600
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "snakemake", *arguments]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(
            command,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment,
        )
        if check and result.returncode:
            pytest.fail(f"{command} failed:\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}")
        return result

    def planned(self, *arguments: str) -> dict[str, int]:
        """The number of jobs a rule that a run would do now."""
        result = self.run("-n", *arguments)
        return self.counted(result.stdout + result.stderr)

    @staticmethod
    def counted(text: str) -> dict[str, int]:
        """Read the table of jobs that Snakemake prints before a run."""
        table = text.split("Job stats:")[1].split("total")[0] if "Job stats:" in text else ""
        rows = re.findall(r"^(\w+)\s+(\d+)$", table, flags=re.M)
        return {name: int(count) for name, count in rows if name not in TARGETS}

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text, f"{name} lacks {old!r}"
        path.write_text(text.replace(old, new, 1))


def copy_project(folder: Path) -> Workflow:
    ignore = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        source = ROOT / part
        if source.is_symlink():
            (folder / part).symlink_to(os.readlink(source))
        elif source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignore)
        else:
            shutil.copyfile(source, folder / part)
    return Workflow(folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id) -> Workflow:
    """The small experiment, run once to its end; tests that change it copy it.

    Of several test processes the first makes it, the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = (shared if worker_id == "master" else shared.parent) / "finished"
    shared.mkdir(exist_ok=True)
    workflow = Workflow(shared / "project")
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "done").exists():
            shutil.rmtree(workflow.folder, ignore_errors=True)
            workflow.folder.mkdir()
            copy_project(workflow.folder).configure(SMALL)
            workflow.run("--cores", "2", timeout=1800)  # minutes, more on a busy machine
            (shared / "done").touch()
    return workflow


@pytest.fixture
def copied(finished, tmp_path) -> Workflow:
    """A copy of the finished experiment with its time stamps, to be changed."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder, symlinks=True)
    return Workflow(folder)


@pytest.fixture
def empty(tmp_path) -> Workflow:
    """The project with nothing made yet."""
    workflow = copy_project(tmp_path)
    workflow.configure(SMALL)
    return workflow
