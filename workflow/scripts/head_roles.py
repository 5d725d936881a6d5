"""What the heads of a translator look at: positions, rare tokens, how surely."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import pandas as pd

from headroom.gates.pipeline import measure_roles

inputs = snakemake.input
rows = measure_roles(params.settings, inputs.checkpoint, inputs.tokens, inputs.validation)
pd.DataFrame(rows).to_parquet(snakemake.output[0], index=False)
