"""Runs that share architecture, branches and seed, trained side by side."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.branches.runs import parse_stack
from headroom.branches.pipeline import train_stack

wildcards, inputs, output = snakemake.wildcards, snakemake.input, snakemake.output
identity = {**params.settings, "group": wildcards.group, "stack": wildcards.stack}
with (
    jobs.training_state(params.code, identity, [inputs.texts, inputs.tokenizer]) as state,
    jobs.staged(output.stack) as folder,
):
    train_stack(
        settings=params.settings,
        stack=parse_stack(wildcards.group, wildcards.stack),
        texts=inputs.texts,
        tokenizer=inputs.tokenizer,
        output=folder,
        state=state,
        halvings=halvings,
    )
jobs.write_provenance(output.provenance, params.code, identity)
