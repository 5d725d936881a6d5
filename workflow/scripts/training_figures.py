"""Curves and translations of a translator's training."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.gates import record

output = snakemake.output
run = record.read(snakemake.input.record)
record.draw_curves(run, f"{snakemake.wildcards.translator}: training", output.curves)
title = f"Translations while {snakemake.wildcards.translator} trained"
Path(output.translations).write_text(record.translations_html(run, title))
