"""Dot products of a partition as they fill up, and its files.

Shapes: L layers, Q queries, N originals of the partition, n, m samples of a batch or block,
H hidden states, D model width.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from headroom.gradients.dots import Dots, write_part
from headroom.gradients.features import Features, dots
from headroom.gradients.setup import Setup
from headroom.gradients.similarity import Head


class Result:
    """Dot products as they fill up: queries in the corpus's order, originals in the grid's."""

    def __init__(self, setup: Setup):
        """Make room for a partition."""
        self.setup, self.layers = setup, setup.measurer.layers
        L, Q, N = len(self.layers), len(setup.queries.encoded.ids), len(setup.rows)
        wide = setup.measurer.capture.model.dtype == torch.float64
        self.dot_LQN = np.zeros((L, Q, N), np.float64 if wide else np.float32)
        self.query_QL, self.original_NL = np.zeros((Q, L)), np.zeros((N, L))
        self.query_states: dict[int, Tensor] = {}  # by place in the corpus
        self.original_states: dict[int, Tensor] = {}  # by place in the partition
        self.place = {layer: number for number, layer in enumerate(self.layers)}

    def queries(self, rows: range) -> list[int]:
        """Places in the corpus of queries at places of the grid."""
        return [self.setup.queries.grid.order[row] for row in rows]

    def add(self, layer: str, queries: range, originals: range, held: Features, passing: Features):
        """Fill in a layer's products of held originals and passing queries."""
        start = self.setup.rows.start
        columns = slice(originals.start - start, originals.stop - start)
        found_mn = dots(held, passing).T.cpu().numpy()
        self.dot_LQN[self.place[layer], self.queries(queries), columns] = found_mn

    def take_queries(self, rows: range, head: Head) -> None:
        """Fill in norms and hidden states of queries."""
        places = self.queries(rows)
        self.query_QL[places] = head.squares_nL.numpy()
        self.query_states |= dict(zip(places, head.states_nHD, strict=True))

    def take_originals(self, rows: range, head: Head) -> None:
        """Fill in norms and hidden states of originals."""
        places = [row - self.setup.rows.start for row in rows]
        self.original_NL[places] = head.squares_nL.numpy()
        self.original_states |= dict(zip(places, head.states_nHD, strict=True))

    def write(self, outputs: Mapping[str, str]) -> None:
        """Write the partition's files."""
        setup = self.setup
        shapes = setup.measurer.capture.shapes
        gradients = (
            self.layers,
            [int(np.prod(shapes[layer])) for layer in self.layers],
            self.dot_LQN,
            self.query_QL.T,
            self.original_NL.T,
        )
        self._write(outputs["dots"], *gradients)
        self._write(outputs["states"], *self._states())

    def _states(self) -> tuple:
        """Dot products of pooled hidden states, in float64."""
        first, second = (
            _ordered(found, count)
            for found, count in (
                (self.query_states, len(self.query_QL)),
                (self.original_states, len(self.original_NL)),
            )
        )
        config = self.setup.measurer.capture.model.config
        H, D = 2 * (config.num_hidden_layers + 1), config.hidden_size
        names = [f"{number // 2}.{('mean', 'last')[number % 2]}" for number in range(H)]
        if not len(second):
            empty = np.zeros((H, len(self.query_QL), 0))
            return names, [D] * H, empty, np.zeros(empty.shape[:2]), empty[:, 0]
        dot_HQN = np.empty((H, len(first), len(second)))
        query_HQ, original_HN = np.empty((H, len(first))), np.empty((H, len(second)))
        for h in range(H):  # one at a time in float64: all of them are large
            query_QD, original_ND = first[:, h].double().numpy(), second[:, h].double().numpy()
            dot_HQN[h] = query_QD @ original_ND.T
            query_HQ[h], original_HN[h] = np.square(query_QD).sum(1), np.square(original_ND).sum(1)
        return names, [D] * H, dot_HQN, query_HQ, original_HN

    def _write(self, path: str, layers, sizes, dot_LQN, query_LQ, original_LN) -> None:
        setup = self.setup
        order = [setup.originals.grid.order[row] for row in setup.rows]
        ids = setup.originals.encoded.ids
        notes = setup.identity | {
            "originals": setup.originals.digest,
            "queries": setup.queries.digest,
            "skipped": {
                "originals": setup.originals.encoded.skips,
                "queries": setup.queries.encoded.skips,
            },
        }
        found = Dots(
            tuple(layers),
            tuple(sizes),
            tuple(setup.queries.encoded.ids),
            tuple(ids[place] for place in order),
            dot_LQN,
            np.ascontiguousarray(query_LQ),
            np.ascontiguousarray(original_LN),
            notes,
        )
        write_part(path, found, setup.rows.start, setup.rows.stop, len(ids), order)


def _ordered(found: Mapping[int, Tensor], count: int) -> Tensor:
    return torch.stack([found[place] for place in range(count)]) if found else torch.zeros(0)
