"""headroom: how much of a transformer is redundant, taken out, and what that cost."""

from snakemake.utils import min_version

min_version("9.27.1")

# An example given by --configfile replaces the default instead of being merged into it.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


for name in ("common", "inputs", "corpora", "checkpoints", "evaluation"):

    include: f"workflow/rules/{name}.smk"


for name in ("heads", "ffn", "gates", "branches", "gradients"):

    include: f"workflow/rules/{name}_inputs.smk"
    include: f"workflow/rules/{name}.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,
    heads,
    ffn,
    gates,
    branches,
    gradients,
    evaluations,


rule all:
    default_target: True
    input:
        heads_targets(),
        ffn_targets(),
        gates_targets(),
        branches_targets(),
        gradients_targets(),
        evaluation_targets(),


rule heads:
    input:
        asked("heads", heads_targets()),


rule ffn:
    input:
        asked("ffn", ffn_targets()),


rule gates:
    input:
        asked("gates", gates_targets()),


rule branches:
    input:
        asked("branches", branches_targets()),


rule gradients:
    input:
        asked("gradients", gradients_targets()),


rule evaluations:
    input:
        asked("evaluations", evaluation_targets()),


onstart:
    begin()


onsuccess:
    if locks.alone(Path(".snakemake")):
        jobs.remove_states()


onerror:
    locks.alone(Path(".snakemake"))
    print(explain(workflow.scheduler.failed, sys.argv), file=sys.stderr, flush=True)
