"""The share of head pairs at or above each similarity, for all metrics."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom import plotting
from headroom.heads.figures import similarity_distribution
from headroom.heads.store import load_similarity

heads = params.settings["heads"]
pairs = zip(heads["metrics"], snakemake.input.similarities, strict=True)
similarities = {metric: load_similarity(path) for metric, path in pairs}
plotting.save(similarity_distribution(similarities, heads["thresholds"]), snakemake.output.png)
