"""The token numbers of a translator's training pairs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.checkpoints import load_tokenizer
from headroom.corpora.pair_tokens import encode_pairs, save
from headroom.corpora.pairs import read_pairs

name, inputs = snakemake.wildcards.translator, snakemake.input
longest = params.settings["translators"][name]["longest"]
key = f"translators.{name}.longest"
tokens = encode_pairs(*read_pairs(inputs.pairs), load_tokenizer(inputs.tokenizer), longest, key)
print(f"{tokens.pairs} pairs; {tokens.too_long} with more than {longest} tokens left out")
save(tokens, snakemake.output[0])
