"""Configuration, wildcards and the few helpers that rules share."""

import itertools
import os
import re
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, f"{workflow.basedir}/src")

from headroom import digest, experiment, jobs, locks
from headroom.branches import grid, runs
from headroom.branches.sizes import evaluation_bytes, training_bytes
from headroom.errors import InputError
from headroom.failures import explain
from headroom.ffn import families as ffn_families
from headroom.gates import families as gate_families
from headroom.gradients import families as gradient_families
from headroom.heads import families
from headroom.imports import source_files
from headroom.recipes import METRICS, Gate, Mask, Merge, Prune, Remove
from headroom.recipes import canonical, parse_recipe, parse_step
from headroom.recipes import recipe_regex, step_regex, translator_regex

try:
    config = experiment.load(
        config, Path(workflow.basedir, "workflow/schemas/config.schema.yaml")
    )
except InputError as error:
    sys.exit(f"headroom: {error}")


def either(names):
    """A pattern that matches one of the names; "-" is none of any kind."""
    return "|".join(map(re.escape, names)) or "-"


def trained(table):
    """Those of some models that are trained here."""
    return [name for name, source in config[table].items() if "train" in source]


jobs.name_parent()
# Steps of a run, which executors start as Snakemakes of their own, are inside its locks.
if "--unlock" in sys.argv:
    locks.forget(Path(".snakemake"))
elif workflow.is_main_process and not locks.looks(sys.argv[1:]):
    locks.enter(Path(".snakemake"))


NEEDED = {
    "heads": "checkpoints, of which heads.checkpoints names some",
    "ffn": "checkpoints, of which ffn.checkpoints names some, and ffn.prunes or ffn.saved",
    "gates": "translators, of which gates.translators names some",
    "branches": "branches.ablations",
    "gradients": "checkpoints and instructions, of which gradients.checkpoints and "
    "gradients.instructions name some",
    "evaluations": "evaluation.recipes",
}


def asked(target, files):
    """A target's files, looked up where it is asked for; one without any says what it needs."""

    def found(wildcards):
        if not files:
            needed = NEEDED[target]
            sys.exit(
                f"headroom: target {target}: nothing is configured (needed: {needed})"
            )
        return files

    return found


# Seconds in which a run that was stopped isn't disturbed by more of Ctrl-C.
PATIENCE = 5


def begin():
    """Before the first job: own the lock, be stopped in order, say less on a terminal."""
    locks.hold(Path(".snakemake"))
    stopped = [float("-inf")]

    def stop(number, frame):
        if time.monotonic() - stopped[0] > PATIENCE:
            stopped[0] = time.monotonic()
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    if sys.stderr.isatty():
        for each in workflow.rules:
            each.message = "{rule} {wildcards}"


RECIPE = recipe_regex(list(config["checkpoints"]))
TRAINED_TRANSLATORS = either(trained("translators"))


wildcard_constraints:
    base=either(config["checkpoints"]),
    trained=either(trained("checkpoints")),
    pairs=either(config["pairs"]),
    translator=either(config["translators"]),
    translation=translator_regex(list(config["translators"])),
    gate=f"{step_regex(Gate)}|{step_regex(Mask)}",
    recipe=RECIPE,
    parent=RECIPE,
    step=f"{step_regex(Merge)}|{step_regex(Remove)}",
    prune=step_regex(Prune),
    seed=r"\d+",
    corpus="|".join(config["corpora"]),
    split="train|calibration|evaluation",
    metric="|".join(METRICS),
    group=runs.group_regex(),
    stack=runs.stack_regex(),
    branches=r"\d+",
    ablation=either(config["branches"]["ablations"]),
    architecture=runs.architecture_regex(),
    instructions=either(config["instructions"]),
    setting="|".join(gradient_families.SETTINGS),
    backend="|".join(gradient_families.backends()),
    part=r"\d+-of-\d+",


def settings(*keys):
    """The named parts of the configuration ("heads.calibration"), nested, sorted and plain.

    A key with a name that may hold dots is a tuple: ("checkpoints", "llama-3.2-1b").
    """
    found = {}
    for key in keys:
        *path, last = key.split(".") if isinstance(key, str) else key
        source, target = config, found
        for part in path:
            source, target = source[part], target.setdefault(part, {})
        target[last] = source[last]
    return experiment.sanitised(found)


def model_settings(*keys):
    """The same, with what decides how a model computes."""
    return settings("compute.device", "compute.dtype", "compute.threads", *keys)


def code_digest(script):
    """A digest of a rule's script and of all of headroom that it imports, made when asked for.

    On a cluster every job reads all rules twice, and needs the digest of one.
    """
    path = Path(workflow.basedir, "workflow/scripts", f"{script}.py")
    return lambda wildcards: digest.code_digest(path)


def base_of(recipe):
    """The base checkpoint of a recipe."""
    return parse_recipe(recipe).base


def tokens_of(recipe, corpus, split):
    """The token stream that a recipe's tokenizer makes of a corpus' split."""
    return f"results/tokens/{base_of(recipe)}/{corpus}/{split}.safetensors"


def failures(wildcards, attempt):
    """How many attempts of a job failed before this one."""
    return attempt - 1


def memory(factor):
    """Megabytes: a fixed part and a multiple of the checkpoints' bytes, doubled by each attempt."""

    def mem_mb(wildcards, input, attempt):
        folders = [*input.get("checkpoints", [])]
        if "checkpoint" in input.keys():
            folders.append(input.checkpoint)
        # A checkpoint that isn't made yet counts nothing; Snakemake asks again before the job.
        files = [
            file
            for folder in map(str, folders)
            if os.path.isdir(folder)
            for file in os.scandir(folder)
        ]
        size = sum(file.stat().st_size for file in files) / 1e6
        return int(config["compute"]["mem_mb"] + factor * size) * 2 ** (attempt - 1)

    return mem_mb


def all_threads():
    """The cores of this machine; on a cluster as many as a job computes with.

    A job's own Snakemake sees its node's cores there, of which only the asked ones are its.
    """
    cores = None if workflow.remote_exec else workflow.resource_settings.cores
    return max(config["compute"]["threads"], cores or 1)


def light_memory(wildcards, attempt):
    """Megabytes of a job that runs no model, doubled by each attempt."""
    return 700 * 2 ** (attempt - 1)
