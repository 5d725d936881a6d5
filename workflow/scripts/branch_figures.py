"""Loss of an architecture against branches and against the rotary ratio."""

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

means, architecture = pd.read_csv(snakemake.input.means), snakemake.wildcards.architecture
setting = read_json(snakemake.input.setting)["setting"]
plotting.save(figures.loss_figure(means, architecture, setting), snakemake.output.loss)
plotting.save(figures.ratio_figure(means, architecture, setting), snakemake.output.ratio)
