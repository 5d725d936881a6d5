"""Jobs of the heads study that make or judge checkpoints with fewer heads."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from headroom.attention import replaced
from headroom.checkpoints import (
    Overlay,
    Tensors,
    load_model,
    read_config,
    resolve_device,
    write_derived,
    write_json,
)
from headroom.corpora.tokens import load_stream
from headroom.evaluation.cost import effective_parameters
from headroom.evaluation.perplexity import judged_windows, score_documents
from headroom.heads.families import control_steps
from headroom.heads.pipeline import InputFile, merge_model, plan_layers
from headroom.heads.store import load_similarity
from headroom.progress import progress
from headroom.recipes import Merge, Remove, parse_step

BATCH = 8


def reduce_checkpoint(
    checkpoint: str,
    step: str,
    similarity: str | None,
    inputs: str,
    settings: Mapping,
    halvings: int,
    output: Path,
    log: str,
) -> None:
    """Merge or remove heads of a checkpoint, write the new one and the log.

    Args:
        checkpoint: folder of the parent.
        step: the recipe step.
        similarity: file of the criterion's metric; None where the step needs none.
        inputs: file of attention inputs.
        settings: ``compute`` and ``heads.cross_group``, ``heads.ridge`` of the configuration.
        halvings: how often the batch is halved.
        output: an empty folder for the checkpoint.
        log: the file for the merge log.
    """
    parsed = parse_step(step)
    config, changed, entries = merge_model(
        Tensors(checkpoint),
        read_config(checkpoint),
        parsed,
        criterion_similarity(parsed, similarity),
        InputFile(inputs),
        settings["heads"],
        **_compute(settings, halvings),
    )
    write_derived(checkpoint, output, config, lambda name, tensor: changed.get(name, tensor))
    write_json(Path(log), {"original_model": Path(checkpoint).name, **entries})


def criterion_similarity(step: Merge | Remove, path: str | None) -> np.ndarray | None:
    """Return the similarities that a step goes by, with or without the attention sink."""
    if path is None or isinstance(step, Remove):
        return None
    return load_similarity(path, sink=not step.criterion.endswith("_nosink"))


def _compute(settings: Mapping, halvings: int) -> dict:
    torch.set_num_threads(settings["compute"]["threads"])
    device = resolve_device(settings["compute"]["device"])
    return {"device": device, "batch": max(1, BATCH >> halvings)}


def score_controls(
    checkpoint: str,
    step: str,
    similarity: str | None,
    inputs: str,
    tokens: str,
    settings: Mapping,
    batch: int,
    halvings: int,
) -> pd.DataFrame:
    """Make every control of one merge in memory and score it on held-out text.

    Args:
        checkpoint, step, similarity, inputs, halvings: as in :func:`reduce_checkpoint`.
        tokens: token stream of the evaluation split.
        settings: also ``evaluation`` and ``controls`` (names) of this merge.
        batch: windows that go through the model at once.

    Returns:
        One row a control and document: control, document, nll (nats), tokens, correct,
        effective_parameters.
    """
    merge = parse_step(step)
    similarity_LHH = criterion_similarity(merge, similarity)
    parent, config = Tensors(checkpoint), read_config(checkpoint)
    compute = _compute(settings, halvings)
    common = (InputFile(inputs), settings["heads"])
    chosen = plan_layers(parent, config, merge, similarity_LHH, *common, **compute)
    text = judged_windows(load_stream(tokens), settings["evaluation"])
    model = load_model(checkpoint, settings["compute"]["device"], settings["compute"]["dtype"])
    tables, steps = [], control_steps(step, settings["controls"])
    for name, control in progress(steps.items(), "controls", unit="control"):
        plans = chosen if isinstance(control, Merge) else None
        new, changed, _ = merge_model(
            parent, config, control, similarity_LHH, *common, chosen=plans, **compute
        )
        with replaced(model, changed):
            table = score_documents(model, *text, max(1, batch >> halvings))
        table["effective_parameters"] = effective_parameters(Overlay(parent, changed), new)
        tables.append(table.assign(control=name))
    return pd.concat(tables, ignore_index=True)
