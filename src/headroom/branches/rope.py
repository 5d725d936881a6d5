"""Two-dimensional rotary embedding: which pairs of a head turn with which coordinate.

Shapes: K members of a stack, B samples, S columns, d head size, F = d/2 pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headroom.branches.runs import BANDS, COORDINATES, Rotation
from headroom.errors import InputError

FLAT, TIME, BRANCH = range(3)  # what a pair turns with


def pair_kinds(head_size: int, ratio: float, coordinate: str = "flat", band: str = "low") -> Tensor:
    """Return what each pair turns with, int64 (F,): 0 flat index, 1 time, 2 branch.

    n = round(F · ratio) pairs are two-dimensional, those of the lowest (or highest) frequencies;
    with falling frequency the 1st, 3rd, … of them turn with the branch, the 2nd, 4th, … with time.

    Args:
        head_size: d, even.
        ratio: share of two-dimensional pairs, 0 to 1; at 0 this is ordinary RoPE.
        coordinate: ``flat`` or ``time``, of the other pairs.
        band: ``low`` or ``high``, of the two-dimensional pairs.

    Raises:
        InputError: for a value that is none of these.
    """
    for key, value, allowed in (
        ("coordinate", coordinate, COORDINATES),
        ("band", band, BANDS),
    ):
        if value not in allowed:
            raise InputError(f"rotation {key} is {value!r} (allowed: {', '.join(allowed)})")
    if head_size % 2 or not 0 <= ratio <= 1:
        raise InputError(
            f"rotation ratio {ratio} of head size {head_size} (allowed: a ratio of 0 to 1 of an "
            f"even head size)"
        )
    pairs = head_size // 2
    turned = round(pairs * ratio)
    first = pairs - turned if band == "low" else 0
    kinds_F = torch.full((pairs,), FLAT if coordinate == "flat" else TIME)
    kinds_F[first : first + turned : 2] = BRANCH
    kinds_F[first + 1 : first + turned : 2] = TIME
    return kinds_F


def frequencies(head_size: int, theta: float) -> Tensor:
    """Return θ^(−2j/d) for j = 0 … F−1, float32 (F,), to the bit as transformers' Llama."""
    return 1.0 / (theta ** (torch.arange(0, head_size, 2, dtype=torch.float) / head_size))


class Rotary(nn.Module):
    """cos and sin of the angles f_j · coordinate, each member with coordinates of its own.

    A coordinate's table is made once and shared by the members that turn with it.
    """

    frequencies_F: Tensor
    places_KF: Tensor

    def __init__(self, head_size: int, theta: float, rotations: Sequence[Rotation]):
        """Note which table each pair of each member reads.

        Args:
            head_size: d.
            theta: base of the frequencies.
            rotations: one a member: ratio, coordinate, band and stride of the branch coordinate.

        Raises:
            InputError: for a rotation that :func:`pair_kinds` refuses.
        """
        super().__init__()
        self.tables: list[tuple[int, int]] = []  # kind of coordinate, factor
        self.members = len(rotations)
        places = []
        for own in rotations:
            kinds = pair_kinds(head_size, own.ratio, own.coordinate, own.band).tolist()
            wanted = [(kind, own.stride if kind == BRANCH else 1) for kind in kinds]
            self.tables += [table for table in dict.fromkeys(wanted) if table not in self.tables]
            places += [self.tables.index(table) * len(kinds) + j for j, table in enumerate(wanted)]
        # Not saved: both follow from the configuration.
        self.register_buffer("frequencies_F", frequencies(head_size, theta), persistent=False)
        self.register_buffer("places_KF", torch.tensor(places), persistent=False)

    def forward(self, flat_BS: Tensor, time_BS: Tensor, branch_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the angles, (K, B, S, F) float32."""
        coordinates = (flat_BS, time_BS, branch_BS)
        angles = [
            (coordinates[kind] * factor)[..., None].float() * self.frequencies_F
            for kind, factor in self.tables
        ]
        return self._by_member([a.cos() for a in angles]), self._by_member(
            [a.sin() for a in angles]
        )

    def _by_member(self, tables: list[Tensor]) -> Tensor:
        chosen = torch.cat(tables, -1).index_select(-1, self.places_KF)
        return chosen.unflatten(-1, (self.members, -1)).permute(2, 0, 1, 3)
