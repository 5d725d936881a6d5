"""What a measurement of gradients will cost."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.gradients.forecast import write_plan

write_plan(
    checkpoint=snakemake.input.checkpoint,
    sets={name: snakemake.input[name] for name in ("originals", "queries")},
    settings=params.settings,
    output=snakemake.output[0],
)
