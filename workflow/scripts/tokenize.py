"""A split of a corpus as one stream of tokens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.corpora.text import read_texts
from headroom.corpora.tokens import save_stream, token_stream

corpus = snakemake.wildcards.corpus
stream = token_stream(
    read_texts(snakemake.input.documents),
    snakemake.input.tokenizer,
    params.settings["corpora"][corpus]["boundary"],
    key=f"corpora.{corpus}",
)
save_stream(stream, snakemake.output[0])
