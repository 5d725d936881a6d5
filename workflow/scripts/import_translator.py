"""A translator of others: links to its files, or a download."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.imports import import_translator

name = snakemake.wildcards.translator
with jobs.staged(snakemake.output.checkpoint) as folder:
    commit = import_translator(params.settings["translators"][name], name, folder)
notes = {"hub_commit": commit}
jobs.write_provenance(snakemake.output.provenance, params.code, params.settings, notes)
