"""headroom: how much of a transformer is redundant, taken out, and what that cost."""

from snakemake.utils import min_version

min_version("9.27.1")

# An example given by --configfile replaces the default instead of being merged into it.
if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/corpora.smk"
include: "workflow/rules/checkpoints.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/heads_inputs.smk"
include: "workflow/rules/heads.smk"
include: "workflow/rules/ffn_inputs.smk"
include: "workflow/rules/ffn.smk"
include: "workflow/rules/gates_inputs.smk"
include: "workflow/rules/gates.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,
    heads,
    ffn,
    gates,
    evaluations,


rule all:
    default_target: True
    input:
        heads_targets(),
        ffn_targets(),
        gates_targets(),
        evaluation_targets(),


rule heads:
    input:
        heads_targets(),


rule ffn:
    input:
        ffn_targets(),


rule gates:
    input:
        gates_targets(),


rule evaluations:
    input:
        evaluation_targets(),


onstart:
    locks.hold(Path(".snakemake"))


onsuccess:
    locks.release(Path(".snakemake"))
    jobs.remove_states()


onerror:
    locks.release(Path(".snakemake"))
