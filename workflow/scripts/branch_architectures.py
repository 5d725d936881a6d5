"""Losses at the most branches, architecture by architecture."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

import pandas as pd

from headroom import plotting
from headroom.branches import figures
from headroom.checkpoints import read_json

means, setting = pd.read_csv(snakemake.input.means), read_json(snakemake.input.setting)["setting"]
plotting.save(figures.architecture_figure(means, setting), snakemake.output.figure)
