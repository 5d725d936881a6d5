"""Sentence pairs of a parallel corpus, split so that none leaks into the test."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.checkpoints import write_json
from headroom.corpora.pairs import SPLITS, write_pairs

name, output = snakemake.wildcards.pairs, snakemake.output
outputs = {split: output[split] for split in SPLITS}
counts = write_pairs(params.settings["pairs"][name], outputs, name)
write_json(Path(output.counts), counts)
