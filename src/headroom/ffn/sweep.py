"""The job that makes many prunings in memory and scores them on held-out text."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from headroom.attention import replaced
from headroom.checkpoints import Overlay, replacing
from headroom.corpora.text import check_unseen
from headroom.corpora.tokens import Stream, load_stream
from headroom.evaluation.cost import effective_parameters
from headroom.evaluation.perplexity import judged_windows, score_documents
from headroom.ffn.families import DENSE, check_family, seeded
from headroom.ffn.pipeline import prune_model
from headroom.ffn.prune import load_source
from headroom.ffn.task import Pruned, Source
from headroom.progress import progress
from headroom.recipes import Prune, format_step, parse_step

TABLES = ("layers", "documents")  # the last one written says that a step is done


def sweep(
    checkpoint: str,
    steps: Sequence[str],
    seed: int,
    inputs: Mapping,
    settings: Mapping,
    batch: int,
    halvings: int,
    held: float,
    state: Path,
) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Make every pruning of one seed in memory and score it on held-out text.

    Args:
        checkpoint, inputs, settings, halvings: as in ``prune.load_source``; ``inputs`` also holds
            ``evaluation``, the token stream of the judged corpus, ``documents``, its documents, and
            ``seen``, those of other corpora that were read; settings also ``evaluation``.
        steps: recipe steps without seeds.
        batch: windows that go through the model at once.
        held: bytes of pruned tensors that may wait on the CPU, so that several share a pass.
        state: folder where finished steps are kept; a job that was killed goes on behind them.

    Returns:
        One row a step and document (step, document, nll in nats, tokens, correct, parameters,
        ffn_parameters, effective_parameters), the parent as ``dense``; one row a step and layer
        (the rescue figures); the evaluation setting.

    Raises:
        InputError: for a step that the family can't hold, or held-out text that was seen.
    """
    source = load_source(checkpoint, inputs, seed, settings, halvings)
    plain = {seeded(step, seed): step for step in steps}
    check_family("ffn.prunes", map(parse_step, plain), source.config["model_type"])
    stream = load_stream(inputs["evaluation"])
    text = judged_windows(stream, settings["evaluation"])
    check_unseen(inputs["documents"], np.unique(text[1]), inputs.get("seen") or [])
    batch = max(1, batch >> halvings)
    dense = score_documents(source.model, *text, batch)
    left = [parse_step(name) for name, step in plain.items() if not _done(state, step)]
    for one in pruned_in_groups(source, left, held):
        with replaced(source.model, one.tensors):
            table = score_documents(source.model, *text, batch)
        found = pd.DataFrame(one.layers), _sized(table, source, one.tensors, one.config)
        _keep(state, plain[format_step(one.step)], found)
    layers, documents = (_kept(state, steps, name) for name in TABLES)
    whole = _sized(dense, source, {}, source.config).assign(step=DENSE)
    setting = _setting(settings, stream, dense, len(text[0]))
    setting["heldout"] = list(source.heldout_NT.shape)  # what functional rescue is measured on
    return pd.concat([whole, documents], ignore_index=True), layers, setting


def _setting(settings: Mapping, stream: Stream, dense: pd.DataFrame, windows: int) -> dict:
    """Return what every number of the sweep depends on."""
    evaluation = settings["evaluation"]
    return {
        "corpus": settings["corpus"],
        "split": "evaluation",
        "window": evaluation["window"],
        "windows": windows,
        "choice": evaluation["choice"],
        "boundary": stream.boundary,
        "dtype": settings["compute"]["dtype"],
        "documents": len(dense),
        "tokens": int(dense.tokens.sum()),
    }


def _file(state: Path, step: str, table: str) -> Path:
    return state / f"{step}.{table}.parquet"


def _done(state: Path, step: str) -> bool:
    return _file(state, step, TABLES[-1]).is_file()


def _keep(state: Path, step: str, found: Sequence[pd.DataFrame]) -> None:
    """Write a step's tables, each whole or not at all."""
    for name, table in zip(TABLES, found, strict=True):
        with replacing(_file(state, step, name), durable=True) as part:
            table.to_parquet(part, index=False)


def _kept(state: Path, steps: Sequence[str], table: str) -> pd.DataFrame:
    parts = [pd.read_parquet(_file(state, step, table)).assign(step=step) for step in steps]
    return pd.concat(parts, ignore_index=True)


def pruned_in_groups(source: Source, steps: Sequence[Prune], held: float) -> Iterator[Pruned]:
    """Yield prunings, as many of them made in one pass over the layers as ``held`` bytes allow."""
    shapes = source.tensors.counts()
    names = [name for name in shapes if ".mlp." in name]
    size = source.tensors[names[0]].element_size()  # of a number as stored
    together = max(1, int(held // (size * sum(shapes[name] for name in names))))
    for start in progress(range(0, len(steps), together), "passes", unit="pass"):
        yield from prune_model(
            source,
            steps[start : start + together],
            lambda items: progress(items, "layers", unit="layer"),
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
