"""Features of batches of samples, and dot products of those that are held with those that pass.

Shapes: L layers, n, m samples of a batch, T tokens, H hidden states, D model width.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from headroom.gradients.capture import Batch, Capture, pad
from headroom.gradients.features import FEATURES, Features, Parameter, concatenated, squares
from headroom.gradients.uses import Uses

Samples = Sequence[tuple[Sequence[int], int]]  # tokens, place of the first answer token
Consume = Callable[[str, Features], None]


class Head(NamedTuple):
    """What a batch leaves beside its features."""

    squares_nL: Tensor  # ‖g‖², float64; as the features give it
    losses_n: Tensor
    states_nHD: Tensor  # mean and last token of each hidden state, one after the other; float32


@dataclass
class Measurer:
    """A model, and how each of its layers is measured."""

    capture: Capture
    choice: Mapping[str, str]  # backend by layer
    settings: Mapping  # config section gradients
    size: int  # samples that go through the model at once
    passes: int = field(default=0, init=False)  # samples that went through it

    @property
    def layers(self) -> list[str]:
        """Parameter names in the model's order."""
        return list(self.capture.shapes)

    def measure(self, samples: Samples, consume: Consume, wanted: set[str] | None = None) -> Head:
        """Send a batch through the model and hand over each layer's features.

        A batch that a GPU has no memory for is halved, and so are those after it; what is handed
        over is always the whole batch. A layer without gradient is not handed over. After such a
        failure layers may come a second time.

        Args:
            samples: of the batch.
            consume: called with a layer's name and features, from the last layer to the first.
            wanted: layers to hand over; None: all.
        """
        while True:
            try:
                return self._measure(samples, consume, wanted)
            except torch.cuda.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size = max(1, min(self.size, len(samples)) // 2)
                print(f"out of GPU memory: batch halved to {self.size}", file=sys.stderr)

    def _measure(self, samples: Samples, consume: Consume, wanted: set[str] | None) -> Head:
        parts = [samples[i : i + self.size] for i in range(0, len(samples), self.size)]
        kept: dict[str, list[Features]] = {}
        heads = []
        for part in parts:
            squares_L: dict[str, Tensor] = {}

            def take(layer: str, uses: Uses, squares_L: dict = squares_L) -> None:
                features = self.features(layer, uses)
                squares_L[layer] = squares(features)
                if wanted is not None and layer not in wanted:
                    return
                if len(parts) == 1:
                    consume(layer, features)
                else:
                    kept.setdefault(layer, []).append(features)

            heads.append(self._pass(pad(part, self.device), take, squares_L))
        for layer in list(kept):
            consume(layer, concatenated(kept.pop(layer)))
        return Head(*(torch.cat(tensors) for tensors in zip(*heads, strict=True)))

    def _pass(self, batch: Batch, take: Callable, squares_L: Mapping[str, Tensor]) -> Head:
        losses_n, states = self.capture(batch, take)
        self.passes += len(losses_n)
        zeros_n = torch.zeros(len(losses_n), dtype=torch.float64, device=losses_n.device)
        squares_nL = torch.stack([squares_L.get(layer, zeros_n) for layer in self.layers], dim=1)
        return Head(squares_nL.cpu(), losses_n.cpu(), pooled(states, batch.lengths_n).cpu())

    def features(self, layer: str, uses: Uses) -> Features:
        """Return a layer's features by its backend."""
        parameter = Parameter(layer, self.capture.shapes[layer])
        return FEATURES[self.choice[layer]](parameter, uses, self.settings)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.capture.model.device


def pooled(states: Sequence[Tensor], lengths_n: Tensor) -> Tensor:
    """Return mean and last token of each hidden state of each sample: (n, 2 H, D), float32."""
    T = states[0].shape[1]
    inside_nT1 = (torch.arange(T, device=lengths_n.device) < lengths_n[:, None])[..., None]
    found = []
    for state_nTD in states:
        sums_nD = (state_nTD.float() * inside_nT1).sum(1)
        last_nD = state_nTD[torch.arange(len(lengths_n)), lengths_n - 1].float()
        found += [sums_nD / lengths_n[:, None], last_nD]
    return torch.stack(found, dim=1)


class Block:
    """Features of a block of samples as its batches come, written where they will be read."""

    def __init__(self, size: int):
        """Begin a block of so many samples."""
        self.size, self.start = size, 0
        self.came: set[str] = set()  # layers of the batch at hand
        self.dense: dict[str, Tensor] = {}
        self.parts: dict[str, dict[int, Features]] = {}  # by start, as a batch may come again

    def add(self, layer: str, features: Features) -> None:
        """Take a layer's features of the batch at hand."""
        if not isinstance(features, Tensor):
            self.parts.setdefault(layer, {})[self.start] = features
            return
        self.came.add(layer)
        if len(features) == self.size:  # the block is one batch: nothing to gather
            self.dense[layer] = features
            return
        if layer not in self.dense:
            self.dense[layer] = features.new_empty(self.size, features.shape[1])
            self.dense[layer][: self.start] = 0  # batches before had no gradient here
        self.dense[layer][self.start : self.start + len(features)] = features

    def next(self, size: int) -> None:
        """Go on to the next batch; a layer that did not come has gradient 0."""
        for layer in self.dense.keys() - self.came:
            self.dense[layer][self.start : self.start + size] = 0
        self.came.clear()
        self.start += size

    def features(self) -> dict[str, Features]:
        """Return the block's features by layer."""
        parts = {layer: concatenated(list(found.values())) for layer, found in self.parts.items()}
        return self.dense | parts
