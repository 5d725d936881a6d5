"""Samples of instructions and answers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.checkpoints import write_json
from headroom.corpora.instructions import write_instructions

name, output = snakemake.wildcards.instructions, snakemake.output
own = params.settings["instructions"][name]
write_json(Path(output.counts), write_instructions(own, Path(output.samples), name))
