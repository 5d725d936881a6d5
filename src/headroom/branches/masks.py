"""Who sees whom among texts that lie side by side.

B samples, S positions; i is the position that looks, j the one that is looked at.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Rule = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]  # of sample, head, i, j


class Place(NamedTuple):
    """Where positions stand; tensors that broadcast against each other."""

    time: Tensor
    branch: Tensor


Mask = Callable[[Place, Place], Tensor]  # of i and j: whether i sees j, itself left aside


def columns(i: Place, j: Place) -> Tensor:
    """Return whether time_j < time_i: branches see each other's earlier columns."""
    return j.time < i.time


def isolated(i: Place, j: Place) -> Tensor:
    """Return whether j is earlier in the same branch: no branch knows of another."""
    return (j.time < i.time) & (j.branch == i.branch)


MASKS: dict[str, Mask] = {
    "columns": columns,
    "isolated": isolated,
}


def visible(time_BS: Tensor, branch_BS: Tensor, valid_BS: Tensor, mask: str) -> Tensor:
    """Return whether position i (rows) attends to position j, bool (B, S, S).

    As the mask says, and i = j always. A pad sees itself alone, so that its softmax is defined, and
    nobody else sees it.
    """
    i = Place(time_BS[:, :, None], branch_BS[:, :, None])
    j = Place(time_BS[:, None, :], branch_BS[:, None, :])
    seen_BSS = MASKS[mask](i, j) & valid_BS[:, None, :] & valid_BS[:, :, None]
    seen_BSS.diagonal(dim1=1, dim2=2).fill_(True)
    return seen_BSS


def rule(time_BS: Tensor, branch_BS: Tensor, valid_BS: Tensor, mask: str) -> Rule:
    """Return :func:`visible` as FlexAttention asks for it, one pair of positions at a time."""

    def sees(b: Tensor, head: Tensor | None, i: Tensor, j: Tensor) -> Tensor:
        one, other = (Place(time_BS[b, at], branch_BS[b, at]) for at in (i, j))
        return (MASKS[mask](one, other) & valid_BS[b, i] & valid_BS[b, j]) | (i == j)

    return sees
