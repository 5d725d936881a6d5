"""Losses of the runs of a stack on held-out texts, so many of them side by side."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.branches.runs import parse_stack
from headroom.branches.judge import evaluate_stack

wildcards, inputs = snakemake.wildcards, snakemake.input
evaluate_stack(
    settings=params.settings,
    stack=parse_stack(wildcards.group, wildcards.stack),
    folder=inputs.stack,
    texts=inputs.texts,
    branches=int(wildcards.branches),
    halvings=halvings,
).to_parquet(snakemake.output[0], index=False)
