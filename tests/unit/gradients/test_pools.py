"""Pools and baselines: BM25 against its formula, ties, and truths that are never slipped in."""

import math
import re
from typing import NamedTuple

import numpy as np
import pytest

from headroom.errors import InputError
from headroom.gradients.pools import BASELINES, aligned, bm25_scores, pool

CORPUS = [
    "The cat sat on the mat; the cat slept.",
    "A dog chased the cat",
    "",
    "Ünïcode WORDS and snake_case 42",
    "the the the the",
    "A dog chased the cat",
]
QUERIES = ["cat CAT dog", "ünïcode 42?", "nothing shared", "", "the"]


class Sample(NamedTuple):
    id: str
    prompt: str
    answer: str


def textbook(corpus, query, k1=1.5, b=0.75):
    """Lucene's BM25 of one query, written out."""
    documents = [re.findall(r"\w+", text.lower()) for text in corpus]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            holding = sum(word in other for other in documents)
            if holding == 0:
                continue
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            f = document.count(word)
            score += idf * f / (f + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


def test_bm25_is_the_textbook_formula():
    found = bm25_scores(CORPUS, QUERIES)
    np.testing.assert_allclose(found, [textbook(CORPUS, q) for q in QUERIES], atol=1e-12)
    assert (found[2:4] == 0).all() and found.dtype == np.float64
    assert (bm25_scores(["", "!"], QUERIES) == 0).all()


def test_pool_keeps_the_corpus_order_in_ties_and_injects_only_when_asked():
    scores = bm25_scores(CORPUS, QUERIES)
    truth = np.array([0, 3, 5, 1, -1])
    found = pool("bm25", 2, False, scores, truth)
    assert found.candidate_QC[0].tolist() == [1, 5]  # equal texts
    assert found.candidate_QC[2].tolist() == [0, 1]  # nothing matches
    assert found.truth_Q.tolist() == [-1, 0, -1, 1, -1] and found.found == 2
    injected = pool("bm25", 2, True, scores, truth)
    assert injected.candidate_QC[[0, 2]].tolist() == [[1, 0], [0, 5]]
    assert injected.truth_Q.tolist() == [1, 0, 1, 1, -1] and injected.found == 2
    every = pool("all", 0, True, scores, truth)
    assert (every.candidate_QC == np.arange(6)).all() and every.truth_Q.tolist() == truth.tolist()
    for kind, k in (("bm25", 7), ("bm25", 0), ("tfidf", 2)):
        with pytest.raises(InputError, match=r"config key gradients.candidates"):
            pool(kind, k, False, scores, truth)


def test_baselines_see_what_their_names_say():
    originals = [Sample("a", "red fox", "runs"), Sample("b", "red fox", "sleeps long")]
    queries = [Sample("b", "fox", "it sleeps"), Sample("a", "red", "runs ok")]
    found = {name: measure(originals, queries, 3) for name, measure in BASELINES.items()}
    assert all(scores.shape == (2, 2) for scores in found.values())
    assert (found["bm25_prompt"][:, 0] == found["bm25_prompt"][:, 1]).all()
    assert found["bm25_prompt_answer"].argmax(1).tolist() == [1, 0]
    lengths = [len("red fox runs"), len("red fox sleeps long")]
    assert found["length"][0, 1] == pytest.approx(-math.log(lengths[1] / len("fox it sleeps")))
    np.testing.assert_array_equal(found["random"], BASELINES["random"](originals, queries, 3))
    assert aligned(originals, ["b", "a"]) == originals[::-1]
    with pytest.raises(InputError, match="'c'"):
        aligned(originals, ["a", "c"])
