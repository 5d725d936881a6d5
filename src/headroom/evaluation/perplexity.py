"""Perplexity and next-token accuracy on held-out text, token-weighted, by document.

Shapes: B sequences a batch, T tokens, V vocabulary, C positions a chunk.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from headroom.corpora.tokens import Stream, windows
from headroom.errors import InputError
from headroom.progress import progress
from headroom.statistics import bootstrap_ratio

LOGITS = 2**26  # logits held at once, so that a vocabulary of 128k does not decide the memory


def judged_windows(stream: Stream, evaluation: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows that a checkpoint is judged on, tokens and documents, int64 (N, T).

    Args:
        stream: of the evaluation split.
        evaluation: ``window`` T, ``sequences`` at most N, ``choice``: the ``first`` ones, or
            ``spread`` evenly over the stream, which sees more documents.

    Raises:
        InputError: if the stream is shorter than one window.
    """
    tokens_NT, documents_NT = windows(stream, evaluation["window"], "evaluation.window")
    places = np.arange(min(evaluation["sequences"], len(tokens_NT)))
    if evaluation["choice"] == "spread":
        places = places * len(tokens_NT) // len(places)
    return tokens_NT[places], documents_NT[places]


@torch.no_grad()
def score_documents(
    model: torch.nn.Module,
    tokens: Sequence[np.ndarray],
    documents: Sequence[np.ndarray],
    batch: int = 8,
) -> pd.DataFrame:
    """Sum −ln p(token | those before it in its sequence) over each document's predicted tokens.

    A sequence's first token is not predicted; a token counts for the document it belongs to.
    Sequences may differ in length: padding is masked and never counted.

    Args:
        model: a causal language model in evaluation mode.
        tokens: sequences of token numbers, (N, T) or a list of ragged ones.
        documents: for each token the number of its document, in the same shapes.
        batch: sequences at once; it changes no number beyond rounding.

    Returns:
        One row a document: document, nll (nats, float64), tokens, correct.

    Raises:
        InputError: if a sequence is longer than the model's positions, or a loss is not finite.
    """
    longest = max(map(len, tokens))
    positions = getattr(model.config, "max_position_embeddings", longest)
    if longest > positions:
        raise InputError(
            f"config key evaluation.window: {longest} tokens (allowed: at most {positions}, the "
            f"model's max_position_embeddings)"
        )
    parts = []
    starts = range(0, len(tokens), batch)
    for start in progress(starts, "evaluation", unit="batch"):
        chosen = slice(start, start + batch)
        parts.append(_score_batch(model, tokens[chosen], documents[chosen]))
    table = pd.DataFrame(np.concatenate(parts), columns=["document", "nll", "correct"])
    if not np.isfinite(table.nll).all():  # asked before sums, which leave NaN out
        raise InputError("the checkpoint gives a loss that is not finite on the evaluation text")
    grouped = table.groupby("document", sort=True)
    scores = grouped.agg(nll=("nll", "sum"), tokens=("nll", "size"), correct=("correct", "sum"))
    kinds = {"document": "int64", "tokens": "int64", "correct": "int64"}
    return scores.reset_index().astype(kinds)


def _score_batch(
    model, tokens: Sequence[np.ndarray], documents: Sequence[np.ndarray]
) -> np.ndarray:
    """Return (document, nll, correct) of every predicted token of a batch, float64."""
    lengths = torch.tensor([len(sequence) for sequence in tokens])
    mask_BT = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    tokens_BT = torch.zeros(mask_BT.shape, dtype=torch.long)
    tokens_BT[mask_BT] = torch.from_numpy(np.concatenate(list(tokens)).astype(np.int64))
    padded = not bool(mask_BT.all())
    device = model.device
    hidden_BTD = model.base_model(
        input_ids=tokens_BT.to(device),
        attention_mask=mask_BT.to(device) if padded else None,
        use_cache=False,
    ).last_hidden_state
    wanted_BT = mask_BT[:, 1:]
    hidden_CD = hidden_BTD[:, :-1][wanted_BT.to(device)]
    targets_C = tokens_BT[:, 1:][wanted_BT].to(device)
    nll_C, correct_C = token_losses(model, hidden_CD, targets_C)
    owners = np.concatenate([np.asarray(sequence)[1:] for sequence in documents])
    return np.stack([owners.astype(np.float64), nll_C.numpy(), correct_C.numpy()], axis=1)


def token_losses(model, hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return nll (nats) and whether the likeliest token is right, float64 on the CPU.

    Logits are made for a chunk of positions at a time and their log-sum-exp taken in float32 at
    least.
    """
    head = model.get_output_embeddings()
    losses, hits = [], []
    for part_CD, wanted_C in zip(
        hidden_CD.split(max(1, LOGITS // head.weight.shape[0])),
        targets_C.split(max(1, LOGITS // head.weight.shape[0])),
        strict=True,
    ):
        logits_CV = head(part_CD)
        if logits_CV.dtype in (torch.bfloat16, torch.float16):
            logits_CV = logits_CV.float()
        losses.append(torch.nn.functional.cross_entropy(logits_CV, wanted_C, reduction="none"))
        hits.append(logits_CV.argmax(-1) == wanted_C)
    return torch.cat(losses).double().cpu(), torch.cat(hits).double().cpu()


def summary(table: pd.DataFrame, bootstrap: Mapping) -> dict:
    """Return perplexity, accuracy and mean nll with intervals over documents.

    perplexity = exp(Σ nll / Σ tokens), accuracy = Σ correct / Σ tokens.

    Args:
        table: of :func:`score_documents`.
        bootstrap: resamples, confidence and seed.
    """
    tokens = table.tokens.to_numpy(float)
    nll = table.nll.to_numpy(float)
    measures = {
        "perplexity": bootstrap_ratio(nll, tokens, transform=np.exp, **bootstrap),
        "nll": bootstrap_ratio(nll, tokens, **bootstrap),
        "accuracy": bootstrap_ratio(table.correct.to_numpy(float), tokens, **bootstrap),
    }
    found: dict = {name: interval._asdict() for name, interval in measures.items()}
    return found | {
        "documents": len(table),
        "tokens": int(tokens.sum()),
        "bootstrap": dict(bootstrap),
    }
