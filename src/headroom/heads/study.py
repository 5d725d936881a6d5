"""What a merge cost: both models' metrics, their difference, and the controls beside it."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from headroom.errors import InputError
from headroom.statistics import paired_bootstrap_ratio_difference

MEASURES = ("perplexity", "accuracy")


def compare(
    original: Mapping,
    merged: Mapping,
    log: Mapping,
    documents: tuple[pd.DataFrame, pd.DataFrame],
    controls: pd.DataFrame | None,
    bootstrap: Mapping,
) -> dict:
    """Return the content of ``evaluation_results.json`` for one merge.

    Args:
        original, merged: evaluation summaries of the two checkpoints.
        log: the merge log.
        documents: tables (document, nll in nats, tokens, correct) of the two, same documents.
        controls: the same table for all controls, with a column ``control`` and the checkpoint's
            ``effective_parameters``; None where the configuration asks for none.
        bootstrap: resamples, confidence and seed.

    Raises:
        InputError: if the two were evaluated on different windows or documents.
    """
    _same_setting(original, merged)
    before, after = (table.set_index("document").sort_index() for table in documents)
    if not before.index.equals(after.index) or not (before.tokens == after.tokens).all():
        raise InputError("the two checkpoints were evaluated on different documents")
    result = {
        "setting": _setting(original),
        "original_metrics": _metrics(original),
        "merged_metrics": _metrics(merged),
        "metrics_change": changes(before, after, bootstrap),
        "merge_info": dict(log),
    }
    if controls is not None:
        result["controls"] = control_rows(controls, before, bootstrap)
        result["ordering"] = ordering(after, controls, bootstrap)
    return result


def _setting(summary: Mapping) -> dict:
    names = ("corpus", "split", "window", "choice", "boundary", "documents", "tokens", "bootstrap")
    return {name: summary[name] for name in names if name in summary}


def _same_setting(original: Mapping, merged: Mapping) -> None:
    if _setting(original) != _setting(merged):
        raise InputError(
            f"evaluation settings differ: {_setting(original)} against {_setting(merged)}"
        )


def _metrics(summary: Mapping) -> dict:
    """The seed's plain numbers, their intervals beside them, and the sizes."""
    found = {name: summary[name]["value"] for name in MEASURES}
    found |= {
        f"{name}_interval": [summary[name]["low"], summary[name]["high"]] for name in MEASURES
    }
    return found | {"nll_nats_per_token": summary["nll"]["value"], **summary["cost"]}


def changes(before: pd.DataFrame, after: pd.DataFrame, bootstrap: Mapping) -> dict:
    """Return absolute and per cent changes with paired intervals over documents.

    Perplexity is exp(Σ nll / Σ tokens), accuracy Σ correct / Σ tokens; both tables are resampled
    together, so that what makes a document hard cancels. A per cent change from 0 is None.
    """
    found: dict[str, object] = {}
    tokens = before.tokens.to_numpy(float)
    for name, column, transform in (
        ("perplexity", "nll", np.exp),
        ("accuracy", "correct", None),
        ("nll", "nll", None),
    ):
        for suffix, relative in (("", False), ("_percent", True)):
            change = paired_bootstrap_ratio_difference(
                before[column].to_numpy(float),
                after[column].to_numpy(float),
                tokens,
                transform=transform,
                relative=relative,
                **bootstrap,
            )
            scale, key = 100.0 if relative else 1.0, f"{name}_change{suffix}"
            found[key] = None if change is None else scale * change.value
            found[f"{key}_interval"] = (
                [None, None] if change is None else [scale * change.low, scale * change.high]
            )
    return found


def control_rows(controls: pd.DataFrame, before: pd.DataFrame, bootstrap: Mapping) -> list[dict]:
    """Return for each control its perplexity, accuracy and changes against the original."""
    rows = []
    for name, table in controls.groupby("control", sort=True):
        after = table.set_index("document").sort_index()
        tokens = after.tokens.sum()
        rows.append(
            {
                "control": name,
                "perplexity": float(np.exp(after.nll.sum() / tokens)),
                "accuracy": float(after.correct.sum() / tokens),
                "effective_parameters": int(table.effective_parameters.iloc[0]),
                "metrics_change": changes(before, after, bootstrap),
            }
        )
    return rows


def ordering(after: pd.DataFrame, controls: pd.DataFrame, bootstrap: Mapping) -> dict:
    """Say whether damage grows from the chosen merge over random ones to the least similar one.

    Each comparison is a difference of mean nll (nats a token) with an interval over documents and,
    where there are several, over the random draws too: ``holds`` if it lies above zero,
    ``reversed`` below, else ``undecided``. One draw can't hold anything.
    """
    losses = {
        name: table.set_index("document").sort_index()["nll"].to_numpy(float)[None]
        for name, table in controls.groupby("control")
    }
    draws = [losses[name] for name in sorted(losses) if name.startswith("random")]
    stacks = {"chosen": after.nll.to_numpy(float)[None]}
    if draws:
        stacks["random"] = np.concatenate(draws)
    if "dissimilar" in losses:
        stacks["dissimilar"] = losses["dissimilar"]
    removal = {name: losses[name] for name in losses if "random" not in name and name not in stacks}
    pairs = [("chosen", "random"), ("random", "dissimilar"), ("chosen", "dissimilar")]
    found = [(a, b) for a, b in pairs if a in stacks and b in stacks]
    found += [("chosen", name) for name in sorted(removal)]
    stacks |= removal
    tokens = after.tokens.to_numpy(float)
    comparisons = {
        f"{a} < {b}": compare_losses(
            stacks[a],
            stacks[b],
            tokens,
            lone_draw="random" in (a, b) and len(draws) == 1,
            **bootstrap,
        )
        for a, b in found
    }
    wanted = [f"{a} < {b}" for a, b in pairs[:2] if (a, b) in found]
    states = [comparisons[name]["verdict"] for name in wanted]
    verdict = "undecided" if not states else _joint(states)
    return {"comparisons": comparisons, "similar < random < dissimilar": verdict}


def _joint(states: list[str]) -> str:
    if "reversed" in states:
        return "reversed"
    return "holds" if all(state == "holds" for state in states) else "undecided"


def compare_losses(
    first: np.ndarray,
    second: np.ndarray,
    tokens: np.ndarray,
    resamples: int,
    confidence: float,
    seed: int,
    lone_draw: bool = False,
) -> dict:
    """Return by how much ``second`` loses more than ``first``, nats a token, with its verdict.

    Args:
        first, second: sums of nll, shape (draws, documents).
        tokens: predicted tokens, shape (documents,).
        lone_draw: one side is a single random draw, which decides nothing.
    """
    generator = np.random.default_rng(seed)
    count = len(tokens)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)

    def resampled(losses: np.ndarray) -> np.ndarray:
        means = (weights @ losses.T) / (weights @ tokens)[:, None]
        chosen = generator.integers(len(losses), size=(resamples, len(losses)))
        return np.take_along_axis(means, chosen, axis=1).mean(1)

    total = tokens.sum()
    difference = float((second.sum(1) / total).mean() - (first.sum(1) / total).mean())
    tail = (1 - confidence) / 2
    spread = resampled(second) - resampled(first)
    low, high = (float(value) for value in np.quantile(spread, (tail, 1 - tail)))
    verdict = "holds" if low > 0 else "reversed" if high < 0 else "undecided"
    draws = max(len(first), len(second))
    if lone_draw:
        verdict = "undecided"
    return {"difference": difference, "low": low, "high": high, "draws": draws, "verdict": verdict}
