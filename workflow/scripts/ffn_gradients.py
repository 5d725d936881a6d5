"""How sensitive two losses are to the weights of each FFN channel, on calibration text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.ffn.gradients import measure_gradients

measure_gradients(
    checkpoint=snakemake.input.checkpoint,
    tokens=snakemake.input.tokens,
    seed=int(snakemake.wildcards.seed),
    settings=params.settings,
    output=snakemake.output[0],
)
