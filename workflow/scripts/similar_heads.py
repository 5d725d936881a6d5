"""The pairs of heads at or above a threshold, and their complete-linkage clusters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from headroom import jobs

params = snakemake.params
jobs.start(snakemake)

from headroom.checkpoints import write_json
from headroom.heads.clustering import resolve_threshold, similar_heads
from headroom.heads.store import load_similarity
from headroom.recipes import canonical

wildcards, chosen = snakemake.wildcards, params.settings["heads"]
similarity_LHH = load_similarity(snakemake.input[0])
heads = {"model_path": wildcards.recipe, "metric": wildcards.metric, "corpus": wildcards.corpus}
selections = [f"t{canonical(value)}" for value in chosen["thresholds"]]
selections += [f"q{canonical(value)}" for value in chosen["quantiles"]]
for selection, path in zip(selections, snakemake.output.lists, strict=True):
    threshold = resolve_threshold(selection, similarity_LHH)
    heads["threshold"] = threshold
    write_json(Path(path), heads | similar_heads(similarity_LHH, threshold))
