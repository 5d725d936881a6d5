"""Which channel goes where: the transport plan of one layer of a pruning."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom import plotting
from headroom.ffn.figures import transport_plan
from headroom.ffn.store import load_plan

plan, kept, scores, layer = load_plan(snakemake.input[0])
title = f"{snakemake.wildcards.recipe}: {snakemake.wildcards.prune}, layer {layer}"
plotting.save(transport_plan(plan, kept, scores, title), snakemake.output.png)
