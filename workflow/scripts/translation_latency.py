"""How fast translators generate before and after heads are removed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.checkpoints import write_json
from headroom.gates.pipeline import measure_latency

write_json(Path(snakemake.output[0]), measure_latency(params.settings, snakemake.input))
