"""Figures of the gradients study."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.gradients.pipeline import draw

wildcards = snakemake.wildcards
setting = f"{wildcards.setting}, {wildcards.backend}"
draw(dict(snakemake.input.items()), setting, dict(snakemake.output.items()))
