"""The table of all merges and the figures over them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import json

from headroom import plotting
from headroom.heads import figures, tables

results = {
    step: json.loads(Path(path).read_text())
    for step, path in zip(params.settings["steps"], snakemake.input.results, strict=True)
}
table, setting, output = tables.table(results), tables.describe(results), snakemake.output
table.to_csv(output.csv, index=False)
Path(output.html).write_text(tables.as_html(table, results))
plotting.save(figures.metrics_comparison(table, setting), output.metrics_comparison)
plotting.save(figures.metrics_change(table, setting), output.metrics_change)
plotting.save(figures.merged_pairs(tables.pairs_by_layer(results)), output.merged_pairs)
plotting.save(figures.damage_threshold(table, setting), output.damage_threshold)
plotting.save(figures.damage_parameters(table, setting), output.damage_parameters)
plotting.save(figures.controls(table, tables.verdicts(results), setting), output.controls)
