"""Which texts stand side by side: in a step of training, and in evaluation."""

import itertools

import numpy as np

from headroom.errors import InputError

LEAST = 4  # texts a branch
BLOCK = 1024  # steps whose branch counts are drawn at once
COUNTS, ORDER, OFFSETS = range(3)  # streams of random numbers that must not meet


class Draws:
    """Samples of a step and the offsets of their texts: step → both, of seed and step alone.

    A step draws samples of n ~ U{low … high} texts until there are ``texts_a_step`` or more. The
    texts come in a new random order each epoch, each once an epoch; an epoch may end within a
    sample. Of one seed, the order of the texts is the same whatever the branches, up to a few
    places at the border of two epochs.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        train_branch: tuple[int, int],
        texts_a_step: int,
        seed: int,
        offsets: bool,
    ):
        """Draw nothing yet.

        Args:
            lengths: tokens of each text, (M,).
            train_branch: fewest and most texts of a sample.
            texts_a_step: least number of texts of a step.
            seed: not negative.
            offsets: whether a text begins at a time ~ U{0 … its length} rather than 0.

        Raises:
            InputError: for so few texts that a sample would meet one again.
        """
        self.lengths = np.asarray(lengths)
        self.low, self.high = train_branch
        least = LEAST * self.high
        if self.high > 1 and len(self.lengths) < least:
            raise InputError(
                f"config key branches: training on {self.high} branches of {len(self.lengths)} "
                f"texts (allowed: at least {least} texts, so that none meets itself)"
            )
        self.texts_a_step, self.seed, self.offsets = texts_a_step, seed, offsets
        self.block_starts = [0]  # texts that the steps before each block take
        self.blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # the latest
        self.orders: dict[int, np.ndarray] = {}  # the latest

    def step(self, number: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return the texts of each sample of a step, and the time at which each begins."""
        counts, start = self._counts(number)
        texts = self._texts(start, sum(counts))
        times = np.zeros_like(texts)
        if self.offsets:
            times = self._draw(OFFSETS, number).integers(self.lengths[texts] + 1)
        ends = np.cumsum([0, *counts]).tolist()
        bounds = list(itertools.pairwise(ends))
        flat, begun = texts.tolist(), times.tolist()
        return [flat[i:j] for i, j in bounds], [begun[i:j] for i, j in bounds]

    def _draw(self, stream: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream, number])

    def _counts(self, number: int) -> tuple[list[int], int]:
        """Return the branches of each sample of a step, and the texts that earlier steps take."""
        block, row = divmod(number, BLOCK)
        while len(self.block_starts) <= block:
            before = len(self.block_starts) - 1
            self.block_starts.append(self.block_starts[before] + int(self._block(before)[1].sum()))
        counts, totals = self._block(block)
        reached = np.cumsum(counts[row])
        samples = int(np.searchsorted(reached, self.texts_a_step)) + 1
        return counts[row, :samples].tolist(), self.block_starts[block] + int(totals[:row].sum())

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return counts for as many samples as a step can need, and each step's number of texts."""
        if block not in self.blocks:
            most = -(-self.texts_a_step // self.low)
            shape = BLOCK, most
            counts = self._draw(COUNTS, block).integers(self.low, self.high, shape, endpoint=True)
            reached = np.cumsum(counts, axis=1)
            samples = np.argmax(reached >= self.texts_a_step, axis=1)
            self.blocks = {block: (counts, reached[np.arange(BLOCK), samples])}
        return self.blocks[block]

    def _texts(self, start: int, count: int) -> np.ndarray:
        """Return the texts at so many places of the endless sequence of epochs."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self.lengths))
        needed = range(int(epochs[0]), int(epochs[-1]) + 1)
        self.orders = {epoch: self._order(epoch) for epoch in needed}
        return np.concatenate([self.orders[e][places[epochs == e]] for e in needed])

    def _order(self, epoch: int) -> np.ndarray:
        """Return the texts in an epoch's order.

        A sample that reaches into it must not meet a text again that it has from the epoch before:
        side by side, one would read its tokens in the other.
        """
        if epoch in self.orders:
            return self.orders[epoch]
        order = self._draw(ORDER, epoch).permutation(len(self.lengths))
        if epoch and self.high > 1:
            before = self._draw(ORDER, epoch - 1).permutation(len(self.lengths))
            head = order[: 2 * self.high]
            again = np.isin(head, before[-self.high :])
            order[: 2 * self.high] = np.concatenate([head[~again], head[again]])
        return order


def micro_batch(micro_texts: int, low: int, high: int) -> int:
    """Return how many samples of U{low … high} texts hold about ``micro_texts``; at least 1.

    max(1, ⌊micro_texts / ⌈(low + high) / 2⌉⌋)
    """
    return max(1, micro_texts // -(-(low + high) // 2))
