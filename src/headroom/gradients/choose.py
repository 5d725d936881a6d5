"""Exact or ghost dot products: the cheaper one for each layer, the same in every job.

Written-out gradients cost 2p[(N + Q)(T + W) + NQ] operations (p = o·i elements; W is what it costs
to write one and read it again, in products of tokens), ghost products 2NQT²(o + i), of which a
machine does fewer a second: they are short products that are over when their tokens have been read.
Ghost wins where T²(o + i) < c·o·i·[1 + (T + W)(1/N + 1/Q)].
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

WRITTEN = 64  # W: measured (benchmarks/gradients.py); a gradient is p numbers that come and go


class Work(NamedTuple):
    """How many samples meet, and how long they are."""

    originals: int  # N
    queries: int  # Q
    length: float  # T, mean tokens of a sample


def exact_cost(shape: Sequence[int], work: Work) -> float:
    """Operations of all pairs by written-out gradients, forming them included."""
    N, Q, T = work
    return 2 * math.prod(shape) * ((N + Q) * (T + WRITTEN) + N * Q)


def ghost_cost(shape: Sequence[int], work: Work, speed: float, lookup: bool = False) -> float:
    """The same by products between tokens, in operations of written-out ones.

    Args:
        shape: rows and columns of the parameter.
        work: samples and their length.
        speed: c, operations of ghost products a second to those of large matrix products.
        lookup: an embedding that is only looked up: its rows are compared, not multiplied.
    """
    rows, columns = shape
    N, Q, T = work
    return 2 * N * Q * T * T * ((0 if lookup else rows) + columns) / speed


def choose(
    backend: str,
    shapes: Mapping[str, Sequence[int]],
    lookups: Sequence[str],
    work: Work,
    speed: float,
) -> dict[str, str]:
    """Return the backend of each layer: ``auto`` takes the cheaper of exact and ghost.

    Args:
        backend: of the configuration.
        shapes: of each parameter.
        lookups: parameters that are looked up and not multiplied (embeddings that are not tied).
        work: samples and their length.
        speed: ``gradients.ghost_speed``.
    """
    if backend != "auto":
        return dict.fromkeys(shapes, backend)
    found = {}
    for name, shape in shapes.items():
        ghost = len(shape) == 2 and ghost_cost(shape, work, speed, name in lookups) < exact_cost(
            shape, work
        )
        found[name] = "ghost" if ghost else "exact"
    return found
