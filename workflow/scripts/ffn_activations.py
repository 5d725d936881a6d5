"""What the FFN channels of a checkpoint do on calibration text of one seed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.ffn.observe import measure_activations

measure_activations(
    checkpoint=snakemake.input.checkpoint,
    tokens=snakemake.input.tokens,
    seed=int(snakemake.wildcards.seed),
    settings=params.settings,
    halvings=halvings,
    output=snakemake.output[0],
)
