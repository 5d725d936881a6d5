"""Train the joint tokenizer of a translator on its training pairs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.corpora.pair_tokens import train_joint_tokenizer
from headroom.corpora.pairs import read_pairs

train = params.settings["translators"][snakemake.wildcards.translator]["train"]
sources, targets = read_pairs(snakemake.input[0])
with jobs.staged(snakemake.output[0]) as folder:
    train_joint_tokenizer([*sources, *targets], train["vocabulary"], folder)
