"""Every pruning of one calibration seed, made in memory and scored on held-out text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake.log[0], params.code, params.settings, snakemake.resources.halvings)

from headroom.checkpoints import write_json
from headroom.ffn.prune import sweep

documents, layers, setting = sweep(
    checkpoint=snakemake.input.checkpoint,
    steps=params.settings["steps"],
    seed=int(snakemake.wildcards.seed),
    inputs=snakemake.input,
    settings={**params.settings, "corpus": snakemake.wildcards.corpus},
    batch=snakemake.resources.batch,
    halvings=snakemake.resources.halvings,
)
documents.to_parquet(snakemake.output.documents, index=False)
layers.to_parquet(snakemake.output.layers, index=False)
write_json(Path(snakemake.output.setting), setting)
jobs.write_provenance(snakemake.output.provenance, params.code, params.settings)
