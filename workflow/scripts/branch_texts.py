"""Texts of a split that become branches, as token numbers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.branches.texts import write_texts

inputs, output, split = snakemake.input, snakemake.output, snakemake.wildcards.split
with jobs.staged(output.texts) as folder:
    write_texts(
        params.settings["branches"],
        split,
        documents=inputs.documents,
        others=inputs.get("others"),
        tokenizer=inputs.tokenizer,
        output=folder,
    )
