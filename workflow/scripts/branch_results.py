"""An ablation in tables: every run, means over seeds, hypotheses."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.branches.study import tabulate

tabulate(
    branches=params.settings["branches"],
    name=snakemake.wildcards.ablation,
    bootstrap=params.settings["evaluation"]["bootstrap"],
    stacks=snakemake.input.stacks,
    losses=snakemake.input.losses,
    outputs=dict(snakemake.output.items()),
)
