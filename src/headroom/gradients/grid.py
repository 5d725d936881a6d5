"""The fixed order in which samples go through the model: by length, in batches and blocks.

Whatever is computed of a sample is computed in the same slot of the same shapes, however many
partitions there are and wherever a job stopped before. Partitions are made of whole blocks, a block
of whole batches.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Grid(NamedTuple):
    """Places of samples in the order of their lengths, and how they are cut."""

    order: tuple[int, ...]  # of the places in the corpus, shortest first
    batch: int  # samples that go through the model at once
    block: int  # samples of a tile of dot products; a multiple of the batch

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-len(self.order) // self.block)

    def block_rows(self, number: int) -> range:
        """Places of a block in the grid."""
        return range(number * self.block, min((number + 1) * self.block, len(self.order)))

    def number(self, rows: range) -> int:
        """Number of a batch."""
        return rows.start // self.batch

    def batches(self, rows: range) -> list[range]:
        """Batches of places in the grid that begin at a batch's start."""
        return [
            range(start, min(start + self.batch, rows.stop))
            for start in range(rows.start, rows.stop, self.batch)
        ]


def make_grid(lengths: Sequence[int], batch: int, block: int) -> Grid:
    """Return the grid of samples of these lengths; of equal lengths the first comes first."""
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    return Grid(tuple(order), batch, block)


def partition(blocks: int, part: int, parts: int) -> range:
    """Return the blocks of a partition: contiguous, as even as can be, maybe none."""
    return range(blocks * part // parts, blocks * (part + 1) // parts)
