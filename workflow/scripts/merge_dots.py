"""All partitions of a measurement as one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.gradients.pipeline import merge_parts

names = ("dots", "states")
merge_parts({name: snakemake.input[name] for name in names}, dict(snakemake.output.items()))
