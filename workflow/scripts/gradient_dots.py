"""Dot products of some originals' gradients with those of all queries, layer by layer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.gradients.families import parse_part
from headroom.gradients.measure import measure_part

inputs, resources, own = snakemake.input, snakemake.resources, params.settings["gradients"]
limits = {"memory_gb": resources.held_mb / 1000, "disk_gb": resources.stored_mb / 1000}
with jobs.shared_state(params.code, bool(resources.keep)) as folder:
    measure_part(
        checkpoint=inputs.checkpoint,
        sets={name: inputs[name] for name in ("originals", "queries")},
        settings={**params.settings, "gradients": {**own, **limits}},
        part=parse_part(snakemake.wildcards.part),
        halvings=halvings,
        features=folder,
        outputs=dict(snakemake.output.items()),
    )
