"""How well a similarity finds each query's original: ranks, intervals, the best of many layers.

Shapes: M measures, L layers, Q queries, C candidates a query, R resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headroom.errors import InputError
from headroom.gradients.pairs import Pairs, similarity
from headroom.progress import progress
from headroom.statistics import Interval, interval, resampled_sums, verdict, wilson

RECALLS = (5, 10)
ENDS = ("", "_low", "_high")
SPLITS = 100


class Best(NamedTuple):
    """The best of all layers, with what choosing it on the same queries is worth."""

    layer: int  # the best on all queries
    top1: float  # its accuracy there: too good, because it was chosen there
    chosen: int  # the best on a random half of the queries
    held_out: Interval  # that one's accuracy on the other half
    held_out_mean: float  # of such halves, over the splits
    null_quantile: float  # 95 % quantile of the best layer's accuracy where no layer knows a truth
    p_value: float  # share of the null that is as good as ``top1``


def ranks(similarity_QC: np.ndarray, truth_Q: np.ndarray) -> np.ndarray:
    """Mid-rank of each query's truth: 1 + #greater + #ties / 2, the truth itself not counted.

    A tie at the top is rank 1.5 or worse, so it is no hit.

    Args:
        similarity_QC: greater is more similar.
        truth_Q: place among the candidates, −1 where the truth is none of them.

    Returns:
        float64 (Q,), inf where the truth is not in the pool.

    Raises:
        InputError: if a similarity is no number.
    """
    if np.isnan(similarity_QC).any():
        raise InputError("a similarity is no number: measure it anew")
    own_Q1 = np.take_along_axis(similarity_QC, np.maximum(truth_Q, 0)[:, None], axis=1)
    greater_Q, equal_Q = (similarity_QC > own_Q1).sum(1), (similarity_QC == own_Q1).sum(1)
    return np.where(truth_Q >= 0, 1 + greater_Q + (equal_Q - 1) / 2, np.inf)


def summary(
    ranks_Q: np.ndarray, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Return top1, mrr, recall5 and recall10, each with ``_low`` and ``_high``, and n.

    top1 = share of rank ≤ 1, recall@k of rank ≤ k, with Wilson's intervals; mrr = mean 1/rank with
    a bootstrap interval over queries.

    Raises:
        InputError: with fewer than two queries.
    """
    every_RM, _ = _resampled(np.asarray(ranks_Q)[None], resamples, seed)
    return _single(ranks_Q, every_RM[:, 0], confidence)


def summaries(
    ranks_MQ: np.ndarray,
    reference: int,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict]:
    """Return ``summary`` of each measure, and how it differs from one of them on the same queries.

    ``difference`` is the measure's top1 minus the reference's, ``mrr_difference`` that of the mean
    reciprocal ranks, with paired bootstrap intervals: all measures see the same resamples of the
    queries. ``verdict`` says whether top1 is better, worse or undecided.

    Args:
        reference: place of the measure that others are held against; its verdict is ``reference``.

    Raises:
        InputError: with fewer than two queries.
    """
    reciprocal_RM, hit_RM = _resampled(np.asarray(ranks_MQ), resamples, seed)
    rows = []
    for place, ranks_Q in enumerate(ranks_MQ):
        row = _single(ranks_Q, reciprocal_RM[:, place], confidence)
        found = None
        for name, every_RM in (("mrr_difference", reciprocal_RM), ("difference", hit_RM)):
            change_R = every_RM[:, place] - every_RM[:, reference]
            found = interval(change_R[0], change_R[1:], confidence)
            row |= _ends(name, found)
        rows.append(row | {"verdict": "reference" if place == reference else verdict(found, ())})
    return rows


def _resampled(ranks_MQ: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean reciprocal ranks and hit rates, (1 + R, M) each: of all queries, then resamples.

    Counts of hits are whole numbers, so that equal measures differ by exactly 0.
    """
    M, Q = ranks_MQ.shape
    if Q < 2:
        raise InputError(f"retrieval needs at least 2 queries (found {Q})")
    columns = np.concatenate([1 / ranks_MQ, ranks_MQ <= 1]).T
    every = np.vstack([columns.sum(0), resampled_sums(columns, resamples, seed)]) / Q
    return every[:, :M], every[:, M:]


def _single(ranks_Q: np.ndarray, reciprocal_R: np.ndarray, confidence: float) -> dict:
    shares = {"top1": 1} | {f"recall{k}": k for k in RECALLS}
    row = {"n": len(ranks_Q)}
    for name, k in shares.items():
        row |= _ends(name, wilson(int((ranks_Q <= k).sum()), len(ranks_Q), confidence))
    return row | _ends("mrr", interval(reciprocal_R[0], reciprocal_R[1:], confidence))


def _ends(name: str, found: Interval) -> dict[str, float]:
    return {f"{name}{end}": value for end, value in zip(ENDS, found, strict=True)}


def nearest(similarity_QC: np.ndarray) -> np.ndarray:
    """Return the place of each query's most similar candidate, −1 where several tie, (Q,)."""
    place_Q = similarity_QC.argmax(1)
    most_Q1 = np.take_along_axis(similarity_QC, place_Q[:, None], axis=1)
    return np.where((similarity_QC == most_Q1).sum(1) == 1, place_Q, -1)


def nearest_by_layer(pairs: Pairs) -> np.ndarray:
    """Return ``nearest`` of every layer's similarity, (L, Q)."""
    return np.stack([nearest(similarity(pairs, [layer])) for layer in range(len(pairs.layers))])


def best_of_all(
    nearest_LQ: np.ndarray,
    pairs: Pairs,
    permutations: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    splits: int = SPLITS,
) -> Best:
    """Return the best layer and two answers to its having been chosen among many.

    Held out: chosen on a random half of the queries, judged on the other one. Null: the greatest
    top1 over layers where another candidate counts as each query's truth,
    p = (1 + #{null ≥ found}) / (1 + R), Phipson and Smyth 2010. Where all originals are
    everyone's candidates, truths are permuted over the queries, which keeps how often an original
    is somebody's nearest; else the truth is drawn among the query's own candidates.

    Args:
        nearest_LQ: of ``nearest_by_layer``.
        pairs: the same ones.
        permutations: R.

    Raises:
        InputError: with fewer than two queries or without a permutation.
    """
    if permutations < 1:
        raise InputError(
            f"config key gradients.permutations is {permutations} (allowed: at least 1)"
        )
    rng, Q = np.random.default_rng((seed, len(pairs.queries))), len(pairs.queries)
    if Q < 2:
        raise InputError(f"retrieval needs at least 2 queries (found {Q})")
    hit_LQ = _hits(nearest_LQ, pairs.truth_Q)
    best = _first_best(hit_LQ, pairs.sizes)
    chosen, other_hits = _held_out(hit_LQ, pairs.sizes, splits, rng)
    null_R = _null(nearest_LQ, pairs, permutations, rng)
    top1 = int(hit_LQ[best].sum())
    return Best(
        layer=best,
        top1=top1 / Q,
        chosen=chosen,
        held_out=wilson(int(other_hits[0].sum()), len(other_hits[0]), confidence),
        held_out_mean=float(np.mean([hits.mean() for hits in other_hits])),
        null_quantile=float(np.quantile(null_R, 0.95)) / Q,
        p_value=float(1 + (null_R >= top1).sum()) / (1 + permutations),
    )


def _held_out(
    hit_LQ: np.ndarray, sizes: Sequence[int], splits: int, rng: np.random.Generator
) -> tuple[int, list[np.ndarray]]:
    """Return the first split's best layer, and each split's hits on the half that didn't choose."""
    found = []
    for _ in range(splits):
        half, other = np.array_split(rng.permutation(hit_LQ.shape[1]), 2)
        layer = _first_best(hit_LQ[:, half], sizes)
        found.append((layer, hit_LQ[layer, other]))
    return found[0][0], [hits for _, hits in found]


def _hits(nearest_LQ: np.ndarray, truth_Q: np.ndarray) -> np.ndarray:
    return (nearest_LQ == truth_Q) & (truth_Q >= 0)


def _first_best(hit_LQ: np.ndarray, sizes: Sequence[int]) -> int:
    """Return the layer with the most hits; of equals the smallest tensor, then the first."""
    order = np.argsort(sizes, kind="stable")
    return int(order[hit_LQ[order].sum(1).argmax()])


def _null(
    nearest_LQ: np.ndarray, pairs: Pairs, permutations: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the most hits over layers for each drawing of the truths, (R,)."""
    shared, (Q, C) = pairs.shared_pool, pairs.candidate_QC.shape
    nearest_LQ, truth_Q = nearest_LQ.astype(np.int32), pairs.truth_Q.astype(np.int32)
    found = []
    for _ in progress(range(permutations), "permutations", unit="draw"):
        if shared:
            drawn_Q = rng.permutation(truth_Q)
        else:
            drawn_Q = np.where(truth_Q >= 0, rng.integers(C, size=Q), -1).astype(np.int32)
        found.append(_hits(nearest_LQ, drawn_Q).sum(1).max())
    return np.array(found)
