"""All runs of a translator: table, BLEU against heads, heads against λ."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import pandas as pd

from headroom import plotting
from headroom.checkpoints import read_json
from headroom.gates import figures, page, tables

settings, inputs, output = params.settings, snakemake.input, snakemake.output
bootstrap, wanted = settings["evaluation"]["bootstrap"], settings["evaluation"]["translation"]
beams, steps = max(wanted["beams"]), ["", *settings["steps"]]
scores = dict(zip(steps, map(read_json, inputs.scores), strict=True))
counts = dict(zip(steps, map(pd.read_parquet, inputs.counts), strict=True))
kept = [read_json(Path(folder) / "removal.json") for folder in inputs.removals]
removals = dict(zip(steps[1:], kept, strict=True))
runs = tables.runs_table(scores, counts, removals, beams, bootstrap)
methods = tables.methods_table(runs, counts, beams, bootstrap)
setting = tables.describe(scores, beams, bootstrap)
runs.to_csv(output.csv, index=False)
cost = pd.DataFrame(read_json(inputs.latency))
Path(output.html).write_text(page.runs_page(runs, setting, cost, tables.methods_html(methods)))
plotting.save(figures.trade_off(runs, setting), output.trade_off)
plotting.save(figures.open_against_lambda(runs), output.strength)
