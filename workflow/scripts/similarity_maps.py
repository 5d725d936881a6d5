"""Heat maps of the similarities of heads, one a layer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom import plotting
from headroom.heads.figures import similarity_maps
from headroom.heads.store import load_variants

variants, groups = load_variants(snakemake.input.similarity)
plotting.save(similarity_maps(snakemake.wildcards.metric, variants, groups), snakemake.output.png)
