"""What a measurement costs before it starts: passes, FLOPs, memory, disk; how it is laid out.

``stored``: the features of all samples lie on disk and are made once: N + Q backward passes,
however many partitions there are. ``tiled``: they don't fit there. A tile of originals is held in
memory and all queries pass by it, again for each tile and each group of layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from headroom.errors import InputError

GB = 1e9


class Sizes(NamedTuple):
    """What a plan is made of."""

    feature_bytes: Mapping[str, int]  # of one sample, by layer in the model's order
    group_bytes: int  # of one sample, the largest group of layers that shares a file
    pair_flops: float  # of one pair of samples, all layers
    parameters: Mapping[str, int]
    originals: int  # N, of all partitions
    queries: int  # Q
    part: int  # originals of this partition
    tokens: int  # of all samples of both sets
    longest: int  # tokens
    activations: int  # bytes a token that a pass keeps
    element: int  # bytes of a weight
    batch: int
    block: int


class Plan(NamedTuple):
    """How a partition is measured."""

    stored: bool
    groups: list[list[str]]  # layers that are held at once (tiled)
    tile: int  # blocks of originals that are held at once
    passes: int  # backward passes of this partition, those of stored queries in full
    flops: float
    pass_flops: float  # of one backward pass
    memory: int  # bytes
    disk: int

    def said(self) -> str:
        """Return the plan in one line."""
        tiles = f"tiles of {self.tile} blocks, {len(self.groups)} groups of layers"
        way = "features on disk" if self.stored else f"features recomputed, {tiles}"
        return (
            f"plan: {way}; {self.passes:,} backward passes, {self.flops / 1e12:.3g} TFLOP, "
            f"{self.memory / GB:.2g} GB of memory, {self.disk / GB:.2g} GB of disk"
        )


def make_plan(sizes: Sizes, memory_gb: float, disk_gb: float) -> Plan:
    """Return the plan with the fewest passes that fits.

    Args:
        sizes: of the model and the sets.
        memory_gb: for features that are held, beside the model and a batch.
        disk_gb: for features on disk.

    Raises:
        InputError: where not even one layer of one block fits into memory.
    """
    total = sum(sizes.feature_bytes.values())
    disk = (sizes.originals + sizes.queries) * total
    stored, limit = disk <= disk_gb * GB, memory_gb * GB
    most = max(sizes.feature_bytes.values())
    if sizes.block * most > limit:
        raise InputError(
            f"config key gradients.memory_gb is {memory_gb:g}: one layer of one block of "
            f"{sizes.block} originals takes {sizes.block * most / GB:.3g} GB (allowed: more "
            f"memory, a smaller gradients.block, or the backend projection or two_sided)"
        )
    blocks = max(1, -(-sizes.part // sizes.block))
    if stored:
        groups = [[layer] for layer in sizes.feature_bytes]
        tile = int(min(blocks, limit // (sizes.block * most)))
        held, passes = tile * sizes.block * most, sizes.part + sizes.queries
    else:
        groups, tile, held = _tiles(sizes, blocks, limit)
        tiles = -(-blocks // tile)
        passes = len(groups) * (sizes.part + sizes.queries * tiles)
        disk = 0
    return Plan(
        stored=stored,
        groups=groups,
        tile=tile,
        passes=passes,
        flops=pass_flops(sizes) * passes + sizes.part * sizes.queries * sizes.pair_flops,
        pass_flops=pass_flops(sizes),
        memory=_memory(sizes, held, stored),
        disk=disk,
    )


def _tiles(sizes: Sizes, blocks: int, limit: float) -> tuple[list[list[str]], int, int]:
    """Return groups of layers and blocks held at once: the pair with the fewest passes."""
    best = None
    for tile in range(1, blocks + 1):
        groups = _grouped(sizes.feature_bytes, limit / (tile * sizes.block))
        if groups is None:
            break
        passes = len(groups) * (sizes.part + sizes.queries * -(-blocks // tile))
        if best is None or passes < best[0]:
            best = passes, groups, tile
    _, groups, tile = best
    held = (
        tile
        * sizes.block
        * max(sum(sizes.feature_bytes[layer] for layer in group) for group in groups)
    )
    return groups, tile, held


def _grouped(feature_bytes: Mapping[str, int], limit: float) -> list[list[str]] | None:
    """Cut layers, in their order, into groups of at most so many bytes a sample."""
    groups: list[list[str]] = []
    room = -1.0
    for layer, size in feature_bytes.items():
        if size > limit:
            return None
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(layer)
        room -= size
    return groups


def pass_flops(sizes: Sizes) -> float:
    """Return the operations of one backward pass: 6PT."""
    mean = sizes.tokens / (sizes.originals + sizes.queries)
    return 6.0 * sum(sizes.parameters.values()) * mean


def _memory(sizes: Sizes, held: int, stored: bool) -> int:
    """Bytes: weights, what is held, a batch's activations and largest layer, the result."""
    if stored:  # a block is put together from its batches; a batch's group is written from a copy
        held = 2 * held + 2 * sizes.batch * sizes.group_bytes
    largest = max(max(sizes.feature_bytes.values()), 4 * max(sizes.parameters.values()))
    batch = sizes.batch * (sizes.longest * sizes.activations + 2 * largest)
    result = 4 * len(sizes.feature_bytes) * sizes.part * sizes.queries
    # Four times the weights: themselves, and the check against autograd.
    return 4 * sizes.element * sum(sizes.parameters.values()) + held + batch + result


def feature_elements(
    choice: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    embeddings: Mapping[str, bool],
    longest: int,
    settings: Mapping,
) -> dict[str, int]:
    """Return how many numbers (of 4 bytes) one sample's features take, by layer.

    Args:
        choice: backend by layer.
        shapes: of each parameter.
        embeddings: of each embedding, whether it is multiplied too (tied).
        longest: tokens of the longest sample, which a ghost's batch is padded to.
        settings: config section ``gradients``.
    """
    found = {}
    for name, shape in shapes.items():
        elements = math.prod(shape)
        if choice[name] == "ghost" and len(shape) == 2:
            looked_up = longest * (2 + shape[1]) if name in embeddings else 0  # 8 bytes a token
            multiplied = longest * sum(shape) if embeddings.get(name, True) else 0
            elements = looked_up + multiplied
        elif choice[name] == "projection":
            elements = min(elements, settings["projection"]["dimension"])
        elif choice[name] == "two_sided" and len(shape) == 2:
            own = settings["two_sided"]
            elements = min(own["outer"], shape[0]) * min(own["inner"], shape[1])
        found[name] = elements
    return found


def pair_flops(choice: Mapping[str, str], elements: Mapping[str, int], length: float) -> float:
    """Return the operations of one pair: two an element, for ghosts with each of T tokens."""
    return sum(
        2.0 * count * (length if choice[name] == "ghost" else 1) for name, count in elements.items()
    )
