"""Train the tokenizer of a checkpoint on its training text."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.corpora.text import read_texts
from headroom.corpora.tokens import train_tokenizer

train = params.settings["checkpoints"][snakemake.wildcards.base]["train"]
with jobs.staged(snakemake.output[0]) as folder:
    train_tokenizer(read_texts(snakemake.input[0]), train["vocabulary"], folder)
