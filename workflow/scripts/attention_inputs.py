"""What each layer of attention reads on the calibration text, and its rotary angles."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.heads.calibration import store_attention_inputs

store_attention_inputs(
    checkpoint=snakemake.input.checkpoint,
    tokens=snakemake.input.tokens,
    settings=params.settings,
    halvings=halvings,
    output=snakemake.output[0],
)
