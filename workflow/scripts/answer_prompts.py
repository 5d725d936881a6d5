"""The model's own answers to the paraphrased prompts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
halvings = jobs.start(snakemake)

from headroom.gradients.answers import write_answers

write_answers(
    checkpoint=snakemake.input.checkpoint,
    prompts=snakemake.input.prompts,
    settings=params.settings,
    halvings=halvings,
    output=snakemake.output[0],
)
