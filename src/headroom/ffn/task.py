"""What is pruned, by what text, and what comes out.

Shapes: L layers, n channels as stored, m live ones, N windows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.sparse import csr_array
from torch import Tensor

from headroom.ffn.layers import FFN, live_channels, read
from headroom.recipes import Prune


@dataclass(frozen=True)
class Source:
    """The checkpoint that is pruned and the text it is pruned by; every step has one seed."""

    model: torch.nn.Module
    tensors: Mapping[str, Tensor]
    config: Mapping
    activations: Sequence[Mapping[str, Tensor]]  # a layer each, of all n channels
    gradients: Sequence[Mapping[str, Tensor]] | None
    windows_NT: Tensor  # calibration
    heldout_NT: Tensor  # what functional errors are measured on
    settings: Mapping  # ridge, multiple, transport
    batch: int = 8
    workers: int = 1  # plans that are solved at once

    @property
    def layers(self) -> int:
        """L."""
        return self.config["num_hidden_layers"]

    def dense(self, index: int) -> tuple[FFN, Tensor]:
        """Return a layer's live channels and their numbers as stored."""
        ffn = read(self.tensors, index, self.config, str(self.model.device))
        live_m = live_channels(ffn)
        return ffn.pick(live_m), live_m

    def activations_of(self, index: int, live_m: Tensor) -> dict[str, Tensor]:
        """Return the statistics of a layer's live channels."""
        return {name: _live(v, live_m) for name, v in self.activations[index].items()}

    def gradients_of(self, index: int, live_m: Tensor) -> dict[str, Tensor]:
        """Return the same of gradients; empty where no step reads them."""
        if self.gradients is None:
            return {}
        return {name: _live(v, live_m) for name, v in self.gradients[index].items()}


@dataclass(frozen=True)
class Selection:
    """Which channels of each layer stay, by which scores."""

    scores: list[Tensor]
    kept: list[Tensor]
    width: int  # of the new checkpoint: the widest layer's


@dataclass
class Pruned:
    """What one step makes of a checkpoint."""

    step: Prune
    selection: Selection
    config: dict
    tensors: dict[str, Tensor] = field(default_factory=dict)  # those that differ, as stored
    layers: list[dict] = field(default_factory=list)
    plans: dict[int, csr_array] = field(default_factory=dict)

    @property
    def unchanged(self) -> bool:
        """Whether nothing goes, so that the parent's tensors stay bit for bit."""
        return self.step.keeps_all


def _live(values: Tensor, live_m: Tensor) -> Tensor:
    return values if values.numel() == 1 else values[live_m]
