"""Merge or remove heads: a smaller checkpoint and the log of what became one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.heads.reduce import reduce_checkpoint

with jobs.staged(snakemake.output.checkpoint) as folder:
    reduce_checkpoint(
        checkpoint=snakemake.input.checkpoint,
        step=snakemake.wildcards.step,
        similarity=snakemake.input.get("similarity"),
        inputs=snakemake.input.inputs,
        settings=params.settings,
        halvings=halvings,
        output=folder,
        log=snakemake.output.log,
    )
jobs.write_provenance(snakemake.output.provenance, params.code, params.settings)
