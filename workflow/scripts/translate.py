"""Translations of the held-out test set and their scores."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import pandas as pd

from headroom.checkpoints import write_json
from headroom.gates.pipeline import translate_test

inputs, output = snakemake.input, snakemake.output
with jobs.staged(output.translations) as folder:
    scores, rows = translate_test(
        params.settings, inputs.checkpoint, inputs.tokenizer, inputs.test, folder
    )
write_json(Path(output.scores), scores)
pd.DataFrame(rows).to_parquet(output.counts, index=False)
jobs.write_provenance(output.provenance, params.code, params.settings)
