"""Similarity of every two heads of a layer by one metric."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.heads.measure import measure_checkpoint

measure_checkpoint(
    checkpoint=snakemake.input.checkpoint,
    tokens=snakemake.input.tokens,
    metric=snakemake.wildcards.metric,
    settings=params.settings,
    halvings=halvings,
    output=snakemake.output[0],
)
