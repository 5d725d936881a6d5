"""Which gradients, states and baselines find the originals."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.gradients.pipeline import write_retrieval

wildcards = snakemake.wildcards
with jobs.staged(snakemake.output.export) as folder:
    write_retrieval(
        inputs=dict(snakemake.input.items()),
        settings=params.settings,
        title=f"{wildcards.recipe}, {wildcards.instructions}: {wildcards.setting}, "
        f"{wildcards.backend}",
        outputs={**dict(snakemake.output.items()), "export": str(folder)},
    )
