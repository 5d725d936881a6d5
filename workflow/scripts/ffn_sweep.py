"""Every pruning of one calibration seed, made in memory and scored on held-out text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.checkpoints import write_json
from headroom.ffn.sweep import sweep

inputs, resources, output = snakemake.input, snakemake.resources, snakemake.output
with jobs.training_state(params.code, params.settings, sorted({*map(str, inputs)})) as state:
    documents, layers, setting = sweep(
        checkpoint=inputs.checkpoint,
        steps=params.settings["steps"],
        seed=int(snakemake.wildcards.seed),
        inputs=inputs,
        settings={**params.settings, "corpus": snakemake.wildcards.corpus},
        batch=resources.batch,
        halvings=halvings,
        held=resources.mem_mb * 1e6 / 2,
        state=state,
    )
documents.to_parquet(output.documents, index=False)
layers.to_parquet(output.layers, index=False)
write_json(Path(output.setting), setting)
jobs.write_provenance(output.provenance, params.code, params.settings)
