"""The job that makes a checkpoint with fewer FFN channels."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from headroom.checkpoints import (
    Tensors,
    load_model,
    read_config,
    write_derived,
    write_json,
)
from headroom.ffn.observe import (
    BATCH,
    calibration_windows,
    heldout_windows,
    load_statistics,
)
from headroom.ffn.pipeline import prune_model
from headroom.ffn.rescue import report
from headroom.ffn.store import save_plan
from headroom.ffn.task import Source
from headroom.progress import progress
from headroom.recipes import parse_step


def load_source(
    checkpoint: str, inputs: Mapping[str, str | None], seed: int, settings: Mapping, halvings: int
) -> Source:
    """Load what prunings of one seed share.

    Args:
        checkpoint: folder of the parent.
        inputs: files ``activations`` and ``gradients`` (None where no step reads them), token
            streams ``calibration`` and ``heldout``.
        seed: of the calibration windows.
        settings: ``compute`` and ``ffn`` of the configuration.
        halvings: how often the batch, and the plans solved at once, are halved.
    """
    compute, ffn = settings["compute"], settings["ffn"]
    torch.set_num_threads(compute["threads"])
    calibration, config = ffn["calibration"], read_config(checkpoint)
    window, layers = calibration["window"], range(config["num_hidden_layers"])
    gradients = inputs.get("gradients")
    return Source(
        model=load_model(checkpoint, compute["device"], compute["dtype"]),
        tensors=Tensors(checkpoint),
        config=config,
        activations=[load_statistics(inputs["activations"], i) for i in layers],
        gradients=[load_statistics(gradients, i) for i in layers] if gradients else None,
        windows_NT=calibration_windows(
            inputs["calibration"], window, calibration["sequences"], seed
        ),
        heldout_NT=heldout_windows(inputs["heldout"], window, calibration["heldout"]),
        settings=ffn,
        batch=max(1, BATCH >> halvings),
        workers=max(1, compute["threads"] >> halvings),
    )


def prune_checkpoint(
    checkpoint: str,
    step: str,
    inputs: Mapping[str, str | None],
    settings: Mapping,
    halvings: int,
    output: Path,
    record: Mapping[str, str],
) -> None:
    """Prune a checkpoint's FFN channels, write the new one, its rescue report and its plan.

    Args:
        checkpoint, inputs, settings, halvings: as in :func:`load_source`.
        step: the recipe step.
        output: an empty folder for the checkpoint.
        record: files ``rescue`` (JSON), ``report`` (text) and ``plan`` (safetensors).
    """
    parsed = parse_step(step)
    seed = int(parsed.resolved("seed")[1:])
    source = load_source(checkpoint, inputs, seed, settings, halvings)
    one = prune_model(source, [parsed], lambda items: progress(items, "layers", unit="layer"))[0]
    parent = source.tensors
    write_derived(
        checkpoint,
        output,
        one.config,
        lambda name, tensor: one.tensors.get(name, tensor),
        {name: tensor for name, tensor in one.tensors.items() if name not in parent},
    )
    names = {"original_model": Path(checkpoint).name, "step": {"verb": "prune", **asdict(parsed)}}
    sequences, window = source.windows_NT.shape
    text = {
        "sequences": sequences,
        "window": window,
        "seed": seed,
        "heldout": len(source.heldout_NT),
    }
    write_json(Path(record["rescue"]), names | {"calibration": text, "layers": one.layers})
    words = f"first {text['heldout']} windows of {window} tokens of the calibration corpus"
    names = {"model": Path(checkpoint).name, "step": step, "held-out text": words}
    said = report(one.layers, names)
    print(said, file=sys.stderr)
    Path(record["report"]).write_text(said)
    kept, scores = (
        [t.numpy() for t in found] for found in (one.selection.kept, one.selection.scores)
    )
    save_plan(record["plan"], kept, scores, one.plans)
