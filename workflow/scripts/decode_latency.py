"""Milliseconds a token, measured alternately over checkpoints of different shapes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.checkpoints import write_json
from headroom.evaluation.cost import decode_latency, describe_latency

result = {
    "setting": describe_latency(params.settings),
    "checkpoints": decode_latency(snakemake.input.checkpoints, params.settings),
}
write_json(Path(snakemake.output[0]), result)
