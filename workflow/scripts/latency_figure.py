"""Milliseconds a token of the original and each smaller shape."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import json

from headroom import plotting
from headroom.heads.figures import decode_latency

measured = json.loads(Path(snakemake.input[0]).read_text())
plotting.save(decode_latency(measured["checkpoints"], measured["setting"]), snakemake.output.png)
