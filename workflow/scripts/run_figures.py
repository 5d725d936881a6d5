"""A gated run in pictures: the GIF of its gates, maps, curves, translations."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import pandas as pd

from headroom.gates import record

wildcards, output = snakemake.wildcards, snakemake.output
run = record.read(snakemake.input.record)
roles = pd.read_parquet(snakemake.input.roles)
name = f"{wildcards.translator}+{wildcards.gate}"
folder = Path(output.run).parent
Path(output.run).write_text(record.draw_run(run, roles, name, folder))
title = f"Translations while {name} trained"
Path(output.translations).write_text(record.translations_html(run, title))
