"""A Marian trained from scratch, and what was seen on the way."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from contextlib import ExitStack

from headroom.gates.pipeline import train_translator

names, output = ("checkpoint", "record", "events"), snakemake.output
with ExitStack() as stack:
    state = stack.enter_context(
        jobs.training_state(params.code, params.settings, sorted(map(str, snakemake.input)))
    )
    outputs = {name: stack.enter_context(jobs.staged(output[name])) for name in names}
    train_translator(params.settings, dict(snakemake.input.items()), outputs, state, halvings)
jobs.write_provenance(output.provenance, params.code, params.settings)
