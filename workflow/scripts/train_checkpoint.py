"""A Llama trained from scratch: the base checkpoint of offline runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.language_model import train_language_model

inputs = [snakemake.input.tokens, snakemake.input.tokenizer]
with (
    jobs.training_state(params.code, params.settings, inputs) as state,
    jobs.staged(snakemake.output.checkpoint) as folder,
):
    train_language_model(
        settings=params.settings["checkpoints"][snakemake.wildcards.trained]["train"],
        device=params.settings["compute"]["device"],
        tokens=snakemake.input.tokens,
        tokenizer=snakemake.input.tokenizer,
        output=folder,
        state=state,
        halvings=halvings,
    )
jobs.write_provenance(snakemake.output.provenance, params.code, params.settings)
