"""A checkpoint from a folder or a hub, as links inside a folder of results."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.imports import import_checkpoint

name = snakemake.wildcards.base
with jobs.staged(snakemake.output.checkpoint) as folder:
    commit = import_checkpoint(params.settings["checkpoints"][name], name, folder)
notes = {"hub_commit": commit} if commit else {}
jobs.write_provenance(snakemake.output.provenance, params.code, params.settings, notes)
