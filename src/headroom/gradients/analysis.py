"""What tells layers apart: likeness to the full gradient, norms, self-similarity, selection, hubs.

Shapes: L layers, Q queries, N originals, C candidates a query.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headroom.errors import InputError
from headroom.gradients.pairs import Pairs, cosine, similarity
from headroom.gradients.retrieval import nearest, nearest_by_layer, ranks

CRITERIA = ("similarity", "accuracy")


class Shares(NamedTuple):
    """How parameters and gradient are spread over the layers, (L,) each; both shares sum to 1."""

    elements: np.ndarray
    share: np.ndarray  # of all elements
    norm_share: np.ndarray  # of ‖g‖², mean over originals


class Chosen(NamedTuple):
    """A step of greedy forward selection."""

    layer: int
    chosen: float  # the criterion on the queries that chose
    held_out: float  # on the others
    parameters_share: float  # elements of all layers chosen so far, of all elements


class Hubs(NamedTuple):
    """How often each original is the nearest of a query."""

    count_N: np.ndarray
    most: int
    skew: float  # third standardised moment of the counts; 0 where all are equal


def uncentred_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Σ a b / √(Σ a² Σ b²) of all elements, 0 where one is all zeros."""
    a, b = a.ravel(), b.ravel()
    scale = np.sqrt(a @ a) * np.sqrt(b @ b)
    return float(a @ b / scale) if scale else 0.0


def layer_comparison(pairs: Pairs) -> np.ndarray:
    """Likeness of each layer's similarities to the full gradient's: their uncentred cosine, (L,).

    Over all queries and candidates of the pool.
    """
    full_QC = similarity(pairs)
    layers = range(len(pairs.layers))
    return np.array([uncentred_cosine(similarity(pairs, [layer]), full_QC) for layer in layers])


def accuracies(pairs: Pairs) -> np.ndarray:
    """Top-1 of every layer, (L,); a tie at the top is no hit."""
    nearest_LQ = nearest_by_layer(pairs)
    return ((nearest_LQ == pairs.truth_Q) & (pairs.truth_Q >= 0)).mean(1)


def parameter_distribution(pairs: Pairs) -> Shares:
    """Return elements a layer and their share, and each layer's share of the squared norm."""
    elements = np.asarray(pairs.sizes, np.int64)
    norm_LN = np.maximum(pairs.original_LN, 0)
    total_N = norm_LN.sum(0)
    share_LN = np.divide(norm_LN, total_N, out=np.zeros(norm_LN.shape), where=total_N != 0)
    norm_share = share_LN[:, total_N != 0]
    mean_L = norm_share.mean(1) if norm_share.size else np.zeros(len(elements))
    return Shares(elements, elements / elements.sum(), mean_L)


def self_similarity(pairs: Pairs) -> np.ndarray:
    """Cosine of each query with its truth by layer, NaN where that is not in the pool, (Q, L)."""
    rows = np.arange(len(pairs.queries))
    place_Q = np.maximum(pairs.truth_Q, 0)
    original_Q = pairs.candidate_QC[rows, place_Q]
    dot_QL = pairs.dot_LQC[:, rows, place_Q].T.astype(np.float64)
    found_LQ = np.stack(
        [
            cosine(dot_QL[:, layer, None], query_Q, original_N[original_Q][:, None])[:, 0]
            for layer, (query_Q, original_N) in enumerate(
                zip(pairs.query_LQ, pairs.original_LN, strict=True)
            )
        ]
    )
    return np.where(pairs.truth_Q >= 0, found_LQ, np.nan).T


def most_divergent(self_QL: np.ndarray, count: int = 3) -> list[int]:
    """Return the queries least like their truths, by the mean cosine over layers, least first."""
    mean_Q = self_QL.mean(1)
    order = np.argsort(mean_Q, kind="stable")  # NaN comes last
    return [int(place) for place in order[:count] if not np.isnan(mean_Q[place])]


def matching_and_others(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Return each layer's mean cosine of queries with their truths and with all others, (L,) each.

    NaN where there is no such pair.
    """
    rows = np.flatnonzero(pairs.truth_Q >= 0)
    own_QC = np.zeros(pairs.candidate_QC.shape, dtype=bool)
    own_QC[rows, pairs.truth_Q[rows]] = True
    matching, others = [], []
    for layer in range(len(pairs.layers)):
        found_QC = similarity(pairs, [layer])
        for means, of_QC in ((matching, own_QC), (others, ~own_QC)):
            means.append(found_QC[of_QC].mean() if of_QC.any() else np.nan)
    return np.array(matching), np.array(others)


def halves(queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two random halves of the queries' places, each in order."""
    order = np.random.default_rng((seed, queries)).permutation(queries)
    return np.sort(order[: queries // 2]), np.sort(order[queries // 2 :])


class _Sums:
    """Running Σ dot, Σ ‖q‖² and Σ ‖o‖² of the layers chosen so far, over some queries."""

    def __init__(self, pairs: Pairs, rows: np.ndarray, criterion: str):
        self.pairs, self.rows, self.criterion = pairs, rows, criterion
        self.candidate_QC, self.truth_Q = pairs.candidate_QC[rows], pairs.truth_Q[rows]
        self.full_QC = similarity(pairs)[rows]
        self.dot_QC, self.query_Q = np.zeros(self.candidate_QC.shape), np.zeros(len(rows))
        self.original_N = np.zeros(len(pairs.originals))

    def _with(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dot_QC = self.pairs.dot_LQC[layer][self.rows]
        query_Q = self.query_Q + self.pairs.query_LQ[layer, self.rows]
        return self.dot_QC + dot_QC, query_Q, self.original_N + self.pairs.original_LN[layer]

    def score(self, layer: int) -> float:
        """Return the criterion with one more layer."""
        dot_QC, query_Q, original_N = self._with(layer)
        found_QC = cosine(dot_QC, query_Q, original_N[self.candidate_QC])
        if self.criterion == "similarity":
            return uncentred_cosine(found_QC, self.full_QC)
        return float((ranks(found_QC, self.truth_Q) <= 1).mean())

    def add(self, layer: int) -> None:
        """Choose a layer."""
        self.dot_QC, self.query_Q, self.original_N = self._with(layer)


def greedy_forward_selection(
    pairs: Pairs, criterion: str, steps: int, seed: int = 0
) -> list[Chosen]:
    """Return the layers that are chosen one after another, each the best addition to those before.

    ``similarity``: the concatenation's similarities come closest to the full gradient's, by their
    uncentred cosine; ``accuracy``: its top-1 is highest. Layers are chosen on a random half of the
    queries and reported on both; of equals the smaller tensor is taken, then the first.

    Args:
        steps: layers to choose at most.
        seed: of the halves.

    Raises:
        InputError: with another criterion, fewer than one step or two queries.
    """
    if criterion not in CRITERIA:
        raise InputError(f"criterion {criterion!r} (allowed: {', '.join(CRITERIA)})")
    if steps < 1:
        raise InputError(f"config key gradients.greedy is {steps} (allowed: at least 1)")
    if len(pairs.queries) < 2:
        raise InputError(f"retrieval needs at least 2 queries (found {len(pairs.queries)})")
    choosing, holding = (_Sums(pairs, rows, criterion) for rows in halves(len(pairs.queries), seed))
    left = sorted(range(len(pairs.layers)), key=lambda layer: (pairs.sizes[layer], layer))
    found: list[Chosen] = []
    elements, every = 0, sum(pairs.sizes)
    while left and len(found) < steps:
        scores = [choosing.score(layer) for layer in left]
        place = int(np.argmax(scores))
        layer = left.pop(place)
        elements += pairs.sizes[layer]
        found.append(Chosen(layer, scores[place], holding.score(layer), elements / every))
        choosing.add(layer)
        holding.add(layer)
    return found


def hubness(pairs: Pairs, layers: Sequence[int] | None = None) -> Hubs:
    """Count how often each original is a query's nearest (Radovanović et al. 2010, k = 1).

    Queries with a tie at the top count for nobody.

    Args:
        pairs: of queries with candidates.
        layers: places of layers; None: the full gradient.
    """
    place_Q = nearest(similarity(pairs, layers))
    rows = np.flatnonzero(place_Q >= 0)
    nearest_Q = pairs.candidate_QC[rows, place_Q[rows]]
    count_N = np.bincount(nearest_Q, minlength=len(pairs.originals))
    spread = count_N.std()
    skew = float(((count_N - count_N.mean()) ** 3).mean() / spread**3) if spread else 0.0
    return Hubs(count_N, int(count_N.max()), skew)
