"""Which heads are alike: pairs, clusters, thresholds, budgets and partitions of least cost.

Shapes: L layers, H query heads, G key/value heads. Only numpy here (scipy where it is needed), so
that jobs that read similarities stay light.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np

from headroom.errors import InputError

Block = tuple[int, ...]
# Costs of candidate clusters, many at once because they share work.
Costs = Callable[[Sequence[Block]], np.ndarray]
EXHAUSTIVE = 6  # items; 6 have at most 90 partitions of one size


def similar_pairs(similarity_HH: np.ndarray, threshold: float) -> list[tuple[int, int, float]]:
    """Return all pairs (i < j, similarity) that reach the threshold, the most alike first."""
    i, j = np.triu_indices(len(similarity_HH), 1)
    values = np.asarray(similarity_HH, dtype=float)[i, j]
    found = [
        (int(a), int(b), float(s)) for a, b, s in zip(i, j, values, strict=True) if s >= threshold
    ]
    return sorted(found, key=lambda pair: (-pair[2], pair[0], pair[1]))


def clusters(
    similarity_HH: np.ndarray, threshold: float, labels: Sequence[int] | None = None
) -> tuple[Block, ...]:
    """Return the complete-linkage clusters: in each, *every* pair reaches the threshold.

    Unlike merging pair after pair, this doesn't depend on the pairs' order, and a chain of similar
    pairs doesn't pull unlike heads together.

    Args:
        similarity_HH: symmetric.
        threshold: the least similarity inside a cluster.
        labels: one per head; heads with different labels never share a cluster.

    Returns:
        A partition of all heads, each cluster and their list sorted.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    heads = len(similarity_HH)
    if heads < 2:
        return tuple((h,) for h in range(heads))
    i, j = np.triu_indices(heads, 1)
    # exact near 1 (Sterbenz), so that the comparison below is that of the similarities
    distance = np.maximum(1 - np.asarray(similarity_HH, dtype=float)[i, j], 0)
    if labels is not None:
        marks = np.asarray(labels)
        distance = np.where(marks[i] == marks[j], distance, np.inf)
    # linkage wants finite numbers; what is beyond the threshold is only "too far"
    distance = np.where(distance > 1 - threshold, 4.0, distance)
    assigned = fcluster(linkage(distance, "complete"), 1 - threshold, "distance")
    return canonical([np.flatnonzero(assigned == mark) for mark in np.unique(assigned)])


def canonical(blocks: Sequence[Sequence[int]]) -> tuple[Block, ...]:
    """Return a partition with sorted blocks in the order of their first items."""
    return tuple(sorted(tuple(sorted(int(item) for item in block)) for block in blocks))


def similar_heads(similarity_LHH: np.ndarray, threshold: float) -> dict:
    """Return the content of ``similar_heads_threshold_X.json``, but for model and threshold."""
    analysis, total = {}, 0
    for layer, similarity_HH in enumerate(np.asarray(similarity_LHH, dtype=float)):
        pairs = similar_pairs(similarity_HH, threshold)
        total += len(pairs)
        analysis[str(layer)] = {
            "num_heads": len(similarity_HH),
            "similar_pairs": [list(pair) for pair in pairs],
            "num_similar_pairs": len(pairs),
            "clusters": [list(c) for c in clusters(similarity_HH, threshold) if len(c) > 1],
            "similarity_matrix": similarity_HH.tolist(),
        }
    return {
        "num_layers": len(analysis),
        "layer_analysis": analysis,
        "total_similar_pairs": total,
    }


def resolve_threshold(selection: str, similarity_LHH: np.ndarray) -> float:
    """Return the threshold that ``t0.99`` states or that ``q0.95`` means for this model.

    A quantile is that of the similarities of all pairs i < j of all layers.

    Raises:
        InputError: for anything else, and for a quantile of a model with one head a layer.
    """
    found = re.fullmatch(r"([tq])([01]\.\d+)", selection)
    if not found or float(found[2]) > 1:
        raise InputError(f"recipe part {selection!r}: write t0.99 (threshold) or q0.95 (quantile)")
    if found[1] == "t":
        return float(found[2])
    i, j = np.triu_indices(similarity_LHH.shape[-1], 1)
    if not len(i):
        raise InputError(
            f"recipe part {selection!r}: the model has one head a layer, hence no pairs"
        )
    return float(np.quantile(np.asarray(similarity_LHH, dtype=float)[:, i, j], float(found[2])))


def partition(items: Sequence[int], parts: int, costs: Costs, least: int = 1) -> tuple[Block, ...]:
    """Return the partition of ``items`` into ``parts`` blocks with the least sum of block costs.

    All partitions of at most 6 items are tried; with more, blocks are merged one pair at a time,
    the one that adds least. The same input gives the same partition.

    Args:
        items: what to partition.
        parts: how many blocks.
        costs: the cost of each block of a list; asked once for each.
        least: items that a block must have.

    Raises:
        ValueError: if there are too few items.
    """
    if len(items) < parts * least or parts < 1:
        raise ValueError(f"{len(items)} items don't make {parts} blocks of at least {least}")
    items = tuple(sorted(items))
    if len(items) <= EXHAUSTIVE or parts in (1, len(items)):
        return _best_partition(items, parts, costs, least)
    return _agglomerate(items, parts, costs, least)


def _best_partition(items: Block, parts: int, costs: Costs, least: int) -> tuple[Block, ...]:
    candidates = [p for p in _partitions(items, parts) if min(map(len, p)) >= least]
    blocks = sorted({block for candidate in candidates for block in candidate})
    cost = dict(zip(blocks, costs(blocks), strict=True))
    return canonical(min(candidates, key=lambda candidate: sum(cost[block] for block in candidate)))


def _partitions(items: Block, parts: int) -> Iterator[tuple[Block, ...]]:
    """Yield every partition of sorted items into exactly ``parts`` blocks."""
    if len(items) < parts or (parts == 0 and items):
        return
    if not items:
        yield ()
        return
    *rest, last = items
    for found in _partitions(tuple(rest), parts):
        for place in range(parts):
            yield (*found[:place], (*found[place], last), *found[place + 1 :])
    for found in _partitions(tuple(rest), parts - 1):
        yield (*found, (last,))


def _agglomerate(items: Block, parts: int, costs: Costs, least: int) -> tuple[Block, ...]:
    blocks: list[Block] = [(item,) for item in items]
    cost = dict(zip(blocks, costs(blocks), strict=True))
    while len(blocks) > parts:
        sizes = [len(block) for block in blocks]
        pairs = [
            (a, b)
            for i, j in combinations(range(len(blocks)), 2)
            for a, b in [(blocks[i], blocks[j])]
            if _coverable(_merged_sizes(sizes, i, j), parts, least)
        ]
        unions = {pair: tuple(sorted(pair[0] + pair[1])) for pair in pairs}
        new = sorted({union for union in unions.values() if union not in cost})
        if new:
            cost |= dict(zip(new, costs(new), strict=True))
        a, b = min(pairs, key=lambda p: (cost[unions[p]] - cost[p[0]] - cost[p[1]], p))
        blocks = [block for block in blocks if block not in (a, b)] + [unions[a, b]]
    return canonical(blocks)


def _merged_sizes(sizes: list[int], i: int, j: int) -> list[int]:
    return [size for k, size in enumerate(sizes) if k not in (i, j)] + [sizes[i] + sizes[j]]


def _coverable(sizes: list[int], parts: int, least: int) -> bool:
    """Say whether blocks of these sizes surely still merge into ``parts`` of at least ``least``.

    The largest block is filled up with the smallest ones. Joining the first block that needs
    filling with its first filler keeps the answer, so an agglomeration that starts feasible never
    gets stuck.
    """
    left, bins = sorted(sizes), 0
    while left:
        total = left.pop()
        while total < least and left:
            total += left.pop(0)
        bins += total >= least
    return bins >= parts
