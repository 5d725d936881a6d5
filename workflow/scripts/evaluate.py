"""Perplexity, accuracy and sizes of a checkpoint on held-out text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.evaluation.judge import judge

judge(
    checkpoint=snakemake.input.checkpoint,
    tokens=snakemake.input.tokens,
    documents=snakemake.input.documents,
    seen=snakemake.input.seen,
    names={"recipe": snakemake.wildcards.recipe, "corpus": snakemake.wildcards.corpus},
    settings=params.settings,
    batch=max(1, snakemake.resources.batch >> halvings),
    summary_file=snakemake.output.summary,
    documents_file=snakemake.output.documents,
)
jobs.write_provenance(snakemake.output.provenance, params.code, params.settings)
