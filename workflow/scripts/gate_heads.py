"""A gated run: which heads close, and the model without them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from contextlib import ExitStack

from headroom.gates.pipeline import gate_translator

names, output = ("checkpoint", "removed", "record", "events"), snakemake.output
step, inputs = snakemake.wildcards.gate, dict(snakemake.input.items())
identity = {**params.settings, "step": step}
with ExitStack() as stack:
    state = stack.enter_context(
        jobs.training_state(params.code, identity, sorted(map(str, snakemake.input)))
    )
    outputs = {name: stack.enter_context(jobs.staged(output[name])) for name in names}
    gate_translator(params.settings, step, inputs, outputs, state, halvings)
jobs.write_provenance(output.provenance, params.code, identity)
