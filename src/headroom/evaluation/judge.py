"""The job that judges one checkpoint on one corpus."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from headroom.checkpoints import load_model, write_json
from headroom.corpora.text import check_unseen
from headroom.corpora.tokens import load_stream
from headroom.evaluation.cost import sizes
from headroom.evaluation.perplexity import judged_windows, score_documents, summary


def judge(
    checkpoint: str,
    tokens: str,
    documents: str,
    seen: Sequence[str],
    names: Mapping[str, str],
    settings: Mapping,
    batch: int,
    summary_file: str,
    documents_file: str,
) -> None:
    """Score a checkpoint on held-out windows and write the summary and the documents' table.

    Args:
        checkpoint: its folder.
        tokens: token stream of the evaluation split.
        documents: the documents that the token stream was made of.
        seen: documents of other corpora that the checkpoint was trained or calibrated on.
        names: recipe and corpus.
        settings: ``compute`` and ``evaluation`` of the configuration.
        batch: windows at once; it changes no number beyond rounding.
        summary_file, documents_file: JSON and Parquet to write.

    Raises:
        InputError: if the checkpoint has seen one of the documents.
    """
    evaluation, compute = settings["evaluation"], settings["compute"]
    torch.set_num_threads(compute["threads"])
    stream = load_stream(tokens)
    tokens_WT, documents_WT = judged_windows(stream, evaluation)
    check_unseen(documents, np.unique(documents_WT), seen)
    model = load_model(checkpoint, compute["device"], compute["dtype"])
    table = score_documents(model, tokens_WT, documents_WT, batch)
    table.to_parquet(documents_file, index=False)
    found = {
        **names,
        "split": "evaluation",
        "window": evaluation["window"],
        "windows": len(tokens_WT),
        "choice": evaluation["choice"],
        "boundary": stream.boundary,
        "dtype": compute["dtype"],
        "cost": sizes(checkpoint, evaluation["window"]),
        **summary(table, evaluation["bootstrap"]),
    }
    write_json(Path(summary_file), found)
