"""The table of all prunings, what beats its baseline, and the figures over them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import json

import pandas as pd

from headroom import plotting
from headroom.ffn import figures, tables

seeds = params.settings["ffn"]["calibration"]["seeds"]
bootstrap = params.settings["evaluation"]["bootstrap"]
documents = dict(zip(seeds, map(pd.read_parquet, snakemake.input.documents), strict=True))
layers = dict(zip(seeds, map(pd.read_parquet, snakemake.input.layers), strict=True))
settings = {
    seed: json.loads(Path(path).read_text())
    for seed, path in zip(seeds, snakemake.input.settings, strict=True)
}
table = tables.table(documents, settings, bootstrap)
verdicts = tables.verdicts(documents, bootstrap)
setting, output = tables.describe(settings), snakemake.output
table.to_csv(output.csv, index=False)
verdicts.to_csv(output.verdicts, index=False)
Path(output.html).write_text(tables.as_html(table, verdicts, settings, bootstrap))
plotting.save(figures.perplexity_ratio(table, setting), output.perplexity)
heldout = tables.describe_heldout(settings)
plotting.save(figures.rescue_layers(layers, heldout), output.rescue)
