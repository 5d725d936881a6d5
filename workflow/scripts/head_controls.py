"""Every control of one merge, made in memory and scored on held-out text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.heads.reduce import score_controls

table = score_controls(
    checkpoint=snakemake.input.checkpoint,
    step=snakemake.wildcards.step,
    similarity=snakemake.input.get("similarity"),
    inputs=snakemake.input.inputs,
    tokens=snakemake.input.tokens,
    settings=params.settings,
    batch=snakemake.resources.batch,
    halvings=halvings,
)
table.to_parquet(snakemake.output[0], index=False)
