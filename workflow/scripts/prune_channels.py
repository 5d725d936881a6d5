"""Prune FFN channels: a smaller checkpoint, its rescue report and a transport plan."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.ffn.prune import prune_checkpoint

output = snakemake.output
with jobs.staged(output.checkpoint) as folder:
    prune_checkpoint(
        checkpoint=snakemake.input.checkpoint,
        step=snakemake.wildcards.prune,
        inputs=snakemake.input,
        settings=params.settings,
        halvings=halvings,
        output=folder,
        record={"rescue": output.rescue, "report": output.report, "plan": output.plan},
    )
jobs.write_provenance(output.provenance, params.code, params.settings)
