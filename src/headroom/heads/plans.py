"""Plans: which heads of a layer become one, and the controls that they are held against.

Shapes: H query heads, G key/value heads, r = H / G. Only numpy here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from headroom.heads.clustering import Block, Costs, canonical, clusters, partition

# For a part (key/value heads that become one), the costs of clusters of its query heads.
PartCosts = Callable[[Block], Costs]
TIE = 1e-6  # weight of what decides only between plans of equal cost
RESTARTS = 4  # of the hill climbing towards the most dissimilar heads


@dataclass(frozen=True)
class Plan:
    """What becomes one in a layer: a partition of the G key/value heads and one of the H heads."""

    groups: tuple[Block, ...]
    clusters: tuple[Block, ...]
    reduce: bool  # whether copies go (the shape shrinks) or stay

    @property
    def heads(self) -> int:
        """H, query heads before."""
        return sum(map(len, self.clusters))

    @property
    def heads_per_group(self) -> int:
        """r = H / G before."""
        return self.heads // sum(map(len, self.groups))

    @property
    def changes(self) -> bool:
        """Whether anything becomes one."""
        return any(len(block) > 1 for block in self.groups + self.clusters)

    def span(self, cluster: Block) -> Block:
        """The key/value heads that a cluster's heads read."""
        return tuple(sorted({head // self.heads_per_group for head in cluster}))

    def part(self, group: int) -> Block:
        """The part of key/value heads that a group belongs to."""
        return next(part for part in self.groups if group in part)

    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of heads that share a cluster, sorted."""
        return sorted(pair for cluster in self.clusters for pair in combinations(cluster, 2))

    def within_parts(self) -> "Plan":
        """The plan with clusters cut where key/value heads stay apart (averaging has no gauge)."""
        cut = [
            [head for head in cluster if head // self.heads_per_group in part]
            for cluster in self.clusters
            for part in self.groups
        ]
        return Plan(self.groups, canonical([block for block in cut if block]), self.reduce)


def threshold_plan(
    similarity_HH: np.ndarray, threshold: float, groups: int, cross_group: str = "merge"
) -> Plan:
    """Return the plan that merges complete-linkage clusters and keeps the layer's shape.

    Key/value heads become one only where that touches no other head: every query head of theirs
    lies in a cluster that spans exactly these key/value heads (always so where G = H).

    Args:
        similarity_HH: symmetric.
        threshold: the least similarity inside a cluster.
        groups: G.
        cross_group: ``refuse`` keeps clusters inside a key/value head where G < H.
    """
    heads = len(similarity_HH)
    each = heads // groups
    apart = cross_group == "refuse" and each > 1
    labels = [head // each for head in range(heads)] if apart else None
    found = clusters(similarity_HH, threshold, labels)
    plan = Plan(tuple((g,) for g in range(groups)), found, reduce=False)
    spans = {head: plan.span(cluster) for cluster in found for head in cluster}
    united = {
        span
        for span in spans.values()
        if all(spans[head] == span for g in span for head in range(g * each, (g + 1) * each))
    }
    lone = {(g,) for g in range(groups)} - {(g,) for span in united for g in span}
    return Plan(canonical([*united, *lone]), found, reduce=False)


def pair_costs(similarity_HH: np.ndarray, groups: int) -> PartCosts:
    """Return the cost of clusters by a similarity: Σ over their pairs of (1 − similarity).

    Where every head stays (key/value heads merge, query heads don't), all choices would cost the
    same; then the unlikeness of the part's heads across key/value heads decides.
    """
    distance_HH = 1 - np.asarray(similarity_HH, dtype=float)
    each = len(distance_HH) // groups

    def part_costs(part: Block) -> Costs:
        """Costs of clusters of the heads of one part."""
        heads = [g * each + h for g in part for h in range(each)]
        owner = np.repeat(part, each)
        across = distance_HH[np.ix_(heads, heads)][owner[:, None] != owner].sum() / 2
        share = TIE * across / len(heads)

        def costs(blocks: list[Block]) -> np.ndarray:
            inside = [np.triu(distance_HH[np.ix_(b, b)], 1).sum() for b in blocks]
            return np.array([cost + share * len(b) for cost, b in zip(inside, blocks, strict=True)])

        return costs

    return part_costs


def plan_cost(plan: Plan, part_costs: PartCosts) -> float:
    """Return the sum of the cluster costs of a plan whose clusters lie inside its parts."""
    inner = [
        (part, [c for c in plan.clusters if set(plan.span(c)) <= set(part)]) for part in plan.groups
    ]
    return float(sum(part_costs(part)(blocks).sum() for part, blocks in inner))


def budget_plan(
    part_costs: PartCosts, budget: tuple[int, int], heads: int, groups: int, worst: bool = False
) -> Plan:
    """Return the plan that brings a layer to G' key/value heads with n query heads each.

    Key/value heads are partitioned by what their query heads cost when n clusters of them remain,
    each such set of query heads by the costs of its clusters.

    Args:
        part_costs: what clusters cost.
        budget: (G', n), feasible (``clustering.resolve_budget``).
        heads, groups: H and G.
        worst: look for the highest cost instead (the control ``dissimilar``).
    """
    kept, n = budget
    each = heads // groups
    sign = -1.0 if worst else 1.0
    inner: dict[Block, tuple[Block, ...]] = {}

    def cost_of(part: Block) -> float:
        """What a part costs with its best n clusters, which are kept."""
        costs = part_costs(part)
        members = [g * each + h for g in part for h in range(each)]
        known: dict[Block, float] = {}

        def signed(blocks: list[Block]) -> np.ndarray:
            values = sign * np.asarray(costs(blocks), dtype=float)
            known.update(zip(blocks, values, strict=True))
            return values

        # a part with fewer than n heads is on its way; its key/value merge already costs
        inner[part] = partition(members, min(n, len(members)), signed)
        return sum(known[block] for block in inner[part])

    def group_costs(parts: list[Block]) -> np.ndarray:
        """Costs of parts of key/value heads."""
        return np.array([cost_of(part) for part in parts])

    parts = partition(range(groups), kept, group_costs, least=-(-n // each))
    return Plan(parts, canonical([c for part in parts for c in inner[part]]), reduce=True)


def random_budget_plan(
    budget: tuple[int, int], heads: int, groups: int, generator: np.random.Generator
) -> Plan:
    """Return a random plan of the same shape: random parts, in them random clusters."""
    kept, n = budget
    each = heads // groups
    parts = _random_blocks(range(groups), kept, -(-n // each), generator)
    found = []
    for part in parts:
        members = [g * each + h for g in part for h in range(each)]
        found += _random_blocks(members, n, 1, generator)
    return Plan(canonical(parts), canonical(found), reduce=True)


def _random_blocks(
    items: Iterable[int], parts: int, least: int, generator: np.random.Generator
) -> list[list[int]]:
    order = [int(item) for item in generator.permutation(list(items))]
    sure = parts * least
    blocks = [order[i * least : (i + 1) * least] for i in range(parts)]
    for item, place in zip(
        order[sure:], generator.integers(parts, size=len(order) - sure), strict=True
    ):
        blocks[place].append(item)
    return blocks


def relabelled(plan: Plan, heads_to: np.ndarray) -> Plan:
    """Return the plan's image under a permutation of heads that keeps key/value heads together.

    Args:
        plan: any.
        heads_to: for each head, the one that takes its place.
    """
    each = plan.heads_per_group
    moved = canonical([[heads_to[head] for head in cluster] for cluster in plan.clusters])
    parts = canonical([[heads_to[g * each] // each for g in part] for part in plan.groups])
    return Plan(parts, moved, plan.reduce)


def _swaps(heads: int, groups: int) -> list[np.ndarray]:
    """Return the permutations that swap two key/value heads, or two query heads of one."""
    each = heads // groups
    found = []
    for a, b in combinations(range(groups), 2):
        order = np.arange(heads).reshape(groups, each)
        order[[a, b]] = order[[b, a]]
        found.append(order.ravel())
    for group in range(groups):
        for a, b in combinations(range(group * each, (group + 1) * each), 2):
            order = np.arange(heads)
            order[[a, b]] = order[[b, a]]
            found.append(order)
    return found


def has_control(plan: Plan) -> bool:
    """Say whether some relabelling of heads changes the plan (swaps generate them all)."""
    groups = sum(map(len, plan.groups))
    return any(relabelled(plan, swap) != plan for swap in _swaps(plan.heads, groups))


def _random_relabelling(heads: int, groups: int, generator: np.random.Generator) -> np.ndarray:
    each = heads // groups
    order = [group * each + generator.permutation(each) for group in generator.permutation(groups)]
    return np.concatenate(order)


def random_control(plan: Plan, generator: np.random.Generator) -> Plan:
    """Return a random other plan with the same sizes and spans of clusters, if there is one."""
    if not has_control(plan):
        return plan
    groups = sum(map(len, plan.groups))
    while True:
        image = relabelled(plan, _random_relabelling(plan.heads, groups, generator))
        if image != plan:
            return image


def dissimilar_control(
    plan: Plan, similarity_HH: np.ndarray, generator: np.random.Generator
) -> Plan:
    """Return the relabelled plan with the largest Σ over merged pairs of (1 − similarity).

    Found by hill climbing over swaps of heads, from the plan itself and from random relabellings.

    Args:
        plan: a threshold plan.
        similarity_HH: symmetric.
        generator: draws the starting points.
    """
    if not has_control(plan):
        return plan
    groups = sum(map(len, plan.groups))
    swaps_SH = np.stack(_swaps(plan.heads, groups))
    first, second = np.array(plan.pairs()).T
    distance_HH = 1 - np.asarray(similarity_HH, dtype=float)

    def cost(heads_to_SH: np.ndarray) -> np.ndarray:
        """Costs of many relabellings at once."""
        return distance_HH[heads_to_SH[:, first], heads_to_SH[:, second]].sum(1)

    best = np.arange(plan.heads)
    starts = [best] + [_random_relabelling(plan.heads, groups, generator) for _ in range(RESTARTS)]
    for now in starts:
        value = cost(now[None])[0]
        while True:
            candidates_SH = swaps_SH[:, now]
            values_S = cost(candidates_SH)
            if values_S.max() <= value + 1e-12:
                break
            now, value = candidates_SH[values_S.argmax()], values_S.max()
        best = now if value > cost(best[None])[0] else best
    return relabelled(plan, best)


def overlap(plan: Plan, chosen: Plan) -> float | None:
    """Return the share of a chosen plan's merged pairs that another plan merges too.

    Pairs of query heads and pairs of key/value heads count alike; None where nothing was merged.
    """

    def pairs(of: Plan) -> set:
        """What a plan makes one, pair by pair."""
        shared = {("kv", *pair) for part in of.groups for pair in combinations(part, 2)}
        return shared | set(of.pairs())

    wanted = pairs(chosen)
    return len(wanted & pairs(plan)) / len(wanted) if wanted else None
