"""The documents of a corpus, split by content into train, calibration and evaluation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.checkpoints import write_json
from headroom.corpora.text import write_splits

output, corpus = snakemake.output, snakemake.wildcards.corpus
paths = {"train": output.train, "calibration": output.calibration, "evaluation": output.evaluation}
counts = write_splits(params.settings["corpora"][corpus], paths, corpus)
write_json(Path(output.counts), counts)
