"""The same samples in other words."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.checkpoints import write_json
from headroom.corpora.paraphrase import write_paraphrases

output, resources = snakemake.output, snakemake.resources
counts, notes = write_paraphrases(
    settings=params.settings,
    options={
        name: resources[name] / 1000
        for name in ("concurrency", "timeout", "max_retries")
        if resources[name] >= 0
    },
    originals=Path(snakemake.input.originals),
    output=Path(output.samples),
    cache=Path("results/.paraphrases"),
    name=snakemake.wildcards.instructions,
)
write_json(Path(output.counts), counts)
jobs.write_provenance(output.provenance, params.code, params.settings, notes)
