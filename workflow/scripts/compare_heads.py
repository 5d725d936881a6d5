"""Both models' metrics, their difference and the controls, for one merge."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import json

import pandas as pd

from headroom.checkpoints import write_json
from headroom.heads.study import compare

original, merged = (snakemake.input.original, snakemake.input.merged)
controls = pd.read_parquet(snakemake.input.controls[0]) if snakemake.input.controls else None
result = compare(
    original=json.loads(Path(original[0]).read_text()),
    merged=json.loads(Path(merged[0]).read_text()),
    log=json.loads(Path(snakemake.input.log).read_text()),
    documents=(pd.read_parquet(original[1]), pd.read_parquet(merged[1])),
    controls=controls,
    bootstrap=params.settings["evaluation"]["bootstrap"],
)
names = {"original_model": snakemake.wildcards.parent}
names["merged_model"] = f"{snakemake.wildcards.parent}+{snakemake.wildcards.step}"
write_json(Path(snakemake.output[0]), names | result)
