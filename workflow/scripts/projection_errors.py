"""Errors of approximate gradients against exact ones, on a few samples."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.gradients.errors import write_errors

inputs, own = snakemake.input, params.settings["gradients"]
limits = {"memory_gb": snakemake.resources.held_mb / 1000, "disk_gb": 0.0}
write_errors(
    checkpoint=inputs.checkpoint,
    sets={name: inputs[name] for name in ("originals", "queries")},
    settings={**params.settings, "gradients": {**own, **limits}},
    halvings=halvings,
    output=snakemake.output[0],
)
