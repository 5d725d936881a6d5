"""The job that measures one metric's similarities of a checkpoint."""

import numpy as np
import torch

from headroom.checkpoints import geometry, read_config
from headroom.heads.calibration import BATCH, load_checkpoint, load_windows
from headroom.heads.similarity import METRICS, cosine, similarity_pass
from headroom.heads.store import save_similarity
from headroom.progress import progress


def measure_checkpoint(
    checkpoint: str, tokens: str, metric: str, settings: dict, halvings: int, output: str
) -> None:
    """Compute one metric's similarities of a checkpoint and write them.

    Args:
        checkpoint: its folder.
        tokens: a token stream of the calibration split.
        metric: a name of ``METRICS``.
        settings: ``compute`` and ``heads.calibration`` and ``heads.random`` of the configuration.
        halvings: how often the batch is halved (it changes no number).
        output: the file to write.
    """
    heads, random = settings["heads"]["calibration"], settings["heads"]["random"]
    model = load_checkpoint(checkpoint, settings)
    if METRICS[metric].gaussian:
        windows_NT = torch.zeros(random["draws"], random["tokens"], dtype=torch.long)
    else:
        windows_NT = load_windows(tokens, heads["window"], heads["sequences"])
    found = similarity_pass(
        model,
        windows_NT,
        metric,
        batch=max(1, BATCH >> halvings),
        generator=torch.Generator().manual_seed(random["seed"]),
        progress=lambda items: progress(items, metric),
    )
    arrays: dict[str, np.ndarray] = {}
    for name in ("", "_nosink"):
        if f"gram{name}_LHH" in found:
            gram_LHH = found[f"gram{name}_LHH"]
            arrays[f"gram{name}"] = gram_LHH.numpy()
            arrays[f"similarity{name}"] = cosine(gram_LHH).numpy()
    notes = {"metric": metric, "tokens": found["tokens"], "sequences": found["sequences"]}
    groups = geometry(read_config(checkpoint), checkpoint).groups
    save_similarity(output, arrays, groups, notes | {"window": windows_NT.shape[1]})
