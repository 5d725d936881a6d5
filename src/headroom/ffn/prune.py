"""Jobs of the ffn study that make or judge checkpoints with fewer FFN channels."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from headroom.attention import replaced
from headroom.checkpoints import (
    Overlay,
    Tensors,
    load_model,
    read_config,
    write_derived,
    write_json,
)
from headroom.corpora.tokens import load_stream
from headroom.evaluation.cost import effective_parameters
from headroom.evaluation.perplexity import judged_windows, score_documents
from headroom.ffn.families import seeded
from headroom.ffn.observe import (
    BATCH,
    calibration_windows,
    heldout_windows,
    load_statistics,
)
from headroom.ffn.pipeline import Pruned, Source, prune_model
from headroom.ffn.rescue import report
from headroom.ffn.store import save_plan
from headroom.recipes import Prune, format_step, parse_step

HELD = 8e9  # bytes of pruned tensors that wait on the CPU while several prunings share a pass


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
    one = prune_model(source, [parsed], lambda items: tqdm(items, desc="layers"))[0]
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
    said = report(one.layers, {"model": Path(checkpoint).name, "step": step})
    print(said, file=sys.stderr)
    Path(record["report"]).write_text(said)
    kept, scores = (
        [t.numpy() for t in found] for found in (one.selection.kept, one.selection.scores)
    )
    save_plan(record["plan"], kept, scores, one.plans)


def sweep(
    checkpoint: str,
    steps: Sequence[str],
    seed: int,
    inputs: Mapping[str, str | None],
    settings: Mapping,
    batch: int,
    halvings: int,
) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Make every pruning of one seed in memory and score it on held-out text.

    Args:
        checkpoint, inputs, settings, halvings: as in :func:`load_source`; ``inputs`` also holds
            ``evaluation``, the token stream of the judged corpus, settings also ``evaluation``.
        steps: recipe steps without seeds.
        batch: windows that go through the model at once.

    Returns:
        One row a step and document (step, document, nll in nats, tokens, correct, parameters,
        ffn_parameters, effective_parameters), the parent as ``dense``; one row a step and layer
        (the rescue figures); the evaluation setting.
    """
    source = load_source(checkpoint, inputs, seed, settings, halvings)
    evaluation = settings["evaluation"]
    stream = load_stream(inputs["evaluation"])
    text = judged_windows(stream, evaluation)
    batch = max(1, batch >> halvings)
    dense = score_documents(source.model, *text, batch)
    documents, layers = [_sized(dense, source, {}, source.config).assign(step="dense")], []
    plain = {seeded(step, seed): step for step in steps}
    for one in pruned_in_groups(source, [parse_step(step) for step in plain]):
        name = plain[format_step(one.step)]
        with replaced(source.model, one.tensors):
            table = score_documents(source.model, *text, batch)
        documents.append(_sized(table, source, one.tensors, one.config).assign(step=name))
        layers.append(pd.DataFrame(one.layers).assign(step=name))
    setting = {
        "corpus": settings["corpus"],
        "split": "evaluation",
        "window": evaluation["window"],
        "windows": len(text[0]),
        "choice": evaluation["choice"],
        "boundary": stream.boundary,
        "dtype": settings["compute"]["dtype"],
        "documents": len(dense),
        "tokens": int(dense.tokens.sum()),
    }
    return pd.concat(documents), pd.concat(layers), setting


def pruned_in_groups(source: Source, steps: Sequence[Prune]) -> Iterator[Pruned]:
    """Yield prunings, as many of them made in one pass over the layers as memory holds."""
    counts = source.tensors.counts()
    numbers = sum(count for name, count in counts.items() if ".mlp." in name)
    size = max(1, int(HELD // (4 * numbers)))
    for start in tqdm(range(0, len(steps), size), desc="passes", file=sys.stderr):
        yield from prune_model(
            source, steps[start : start + size], lambda items: tqdm(items, desc="layers")
        )


def _sized(
    table: pd.DataFrame, source: Source, changed: Mapping[str, Tensor], config: dict
) -> pd.DataFrame:
    """Add what the checkpoint with these tensors would hold."""
    overlay = Overlay(source.tensors, changed)
    counts = overlay.counts()
    return table.assign(
        parameters=sum(counts.values()),
        ffn_parameters=sum(count for name, count in counts.items() if ".mlp." in name),
        effective_parameters=effective_parameters(overlay, config),
    )
