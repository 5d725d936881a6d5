"""Candidate pools of the queries, and what retrieval is held against without any gradient.

Shapes: Q queries, N originals, C candidates a query.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from headroom.errors import InputError
from headroom.gradients.pairs import places_in

if TYPE_CHECKING:
    from headroom.corpora.instructions import Sample

K1, B = 1.5, 0.75  # of BM25, as in the study's source
POOLS = ("all", "bm25")

Baseline = Callable[["Sequence[Sample]", "Sequence[Sample]", int], np.ndarray]


class Pool(NamedTuple):
    """Candidates of each query, where its truth is among them, and how many the pool found."""

    candidate_QC: np.ndarray  # places among the originals
    truth_Q: np.ndarray  # places among the candidates; −1 where the truth is not in the pool
    found: int  # queries whose truth the pool held before any was injected


def words(text: str) -> list[str]:
    """Return a text's lower-cased words: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.lower())


def bm25_scores(corpus_texts: Sequence[str], query_texts: Sequence[str]) -> np.ndarray:
    """BM25 of each query with each text of the corpus.

    Σ_w∈q ln(1 + (N − n_w + ½)/(n_w + ½)) · f_w / (f_w + k1 (1 − b + b |d| / mean |d|)), k1 = 1.5,
    b = .75; Robertson and Zaragoza 2009 with Lucene's idf, which is never negative. A word counts
    as often as it is in the query.

    Returns:
        float64 (Q, N), zeros for a query that shares no word with the corpus.
    """
    from bm25s import BM25

    corpus = [words(text) for text in corpus_texts]
    scores_QN = np.zeros((len(query_texts), len(corpus)))
    if not any(corpus):
        return scores_QN
    index = BM25(k1=K1, b=B, method="lucene", dtype="float64", backend="numpy")
    index.index(corpus, show_progress=False)
    for query, text in enumerate(query_texts):
        wanted = words(text)
        if wanted:
            scores_QN[query] = index.get_scores(wanted)
    return scores_QN


def pool(kind: str, k: int, inject_truth: bool, scores_QN: np.ndarray, truth_Q: np.ndarray) -> Pool:
    """Return the candidates of each query.

    Args:
        kind: ``all`` originals, or the ``k`` with the highest scores, ties in the corpus's order.
        k: candidates a query; ignored with ``all``.
        inject_truth: put a truth that is missing into the last slot. Retrieval is then easier than
            it would be in use.
        scores_QN: of ``bm25_scores``; with ``all`` only its shape is read.
        truth_Q: places among the originals, −1 where there is none.

    Raises:
        InputError: with another kind or a k outside 1 … N.
    """
    Q, N = scores_QN.shape
    if kind not in POOLS:
        raise InputError(
            f"config key gradients.candidates.pool is {kind!r} (allowed: {', '.join(POOLS)})"
        )
    if kind == "all":
        candidate_QC = np.broadcast_to(np.arange(N), (Q, N))
    elif 1 <= k <= N:
        candidate_QC = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k].copy()
    else:
        raise InputError(
            f"config key gradients.candidates.k is {k} (allowed: 1 to the {N} originals)"
        )
    place_Q = places_in(candidate_QC, truth_Q)
    found = int((place_Q >= 0).sum())
    missing_Q = (place_Q < 0) & (truth_Q >= 0)
    if inject_truth and missing_Q.any():
        candidate_QC[missing_Q, -1] = truth_Q[missing_Q]
        place_Q = places_in(candidate_QC, truth_Q)
    return Pool(candidate_QC, place_Q, found)


def aligned(samples: "Sequence[Sample]", ids: Sequence[str]) -> "list[Sample]":
    """Return the samples of these ids, in their order.

    Raises:
        InputError: if there is none of an id.
    """
    found = {sample.id: sample for sample in samples}
    missing = [name for name in ids if name not in found]
    if missing:
        raise InputError(
            f"{len(missing)} measured samples are not in the corpus (the first: {missing[0]!r}); "
            f"measure again"
        )
    return [found[name] for name in ids]


def _both(sample: "Sample") -> str:
    return f"{sample.prompt}\n{sample.answer}"


def bm25_prompt(originals: "Sequence[Sample]", queries: "Sequence[Sample]", seed: int):
    """Return BM25 scores of the prompts, (Q, N)."""
    return bm25_scores([s.prompt for s in originals], [s.prompt for s in queries])


def bm25_prompt_answer(originals: "Sequence[Sample]", queries: "Sequence[Sample]", seed: int):
    """Return BM25 scores of prompts with answers, (Q, N)."""
    return bm25_scores([_both(s) for s in originals], [_both(s) for s in queries])


def length(originals: "Sequence[Sample]", queries: "Sequence[Sample]", seed: int) -> np.ndarray:
    """Return −|ln(length of the query / of the original)|, characters of prompt and answer."""
    query_Q, original_N = (
        np.log([len(_both(sample)) for sample in samples]) for samples in (queries, originals)
    )
    return -np.abs(query_Q[:, None] - original_N)


def random(originals: "Sequence[Sample]", queries: "Sequence[Sample]", seed: int) -> np.ndarray:
    """Return seeded uniform numbers, (Q, N)."""
    return np.random.default_rng(seed).random((len(queries), len(originals)))


BASELINES: dict[str, Baseline] = {
    "bm25_prompt": bm25_prompt,
    "bm25_prompt_answer": bm25_prompt_answer,
    "length": length,
    "random": random,
}
