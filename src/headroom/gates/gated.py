"""A model whose attention heads are multiplied by gates.

Gates go in through the taps of attention, never by editing a model, so a decoder-only model is
gated as a translator is. H heads of an attention module, B sequences.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from headroom.attention import attention_modules, head_count, tapped
from headroom.errors import InputError
from headroom.gates import hard_concrete


def attention_kind(name: str) -> str:
    """Return ``encoder``, ``decoder`` or ``cross`` for an attention module's name.

    A decoder-only model has ``decoder`` ones.
    """
    if name.endswith("encoder_attn"):
        return "cross"
    return "encoder" if ".encoder." in f".{name}" else "decoder"


def attention_layer(name: str) -> int:
    """Return the layer of an attention module by its name, from 1."""
    return 1 + next(int(part) for part in name.split(".") if part.isdigit())


def gated_modules(model: nn.Module, attentions: Sequence[str]) -> dict[str, nn.Module]:
    """Return the attention modules of the given kinds by name, in the order of the model.

    Raises:
        InputError: where the model has none of a kind.
    """
    every = dict(attention_modules(model))
    kinds = dict.fromkeys(map(attention_kind, every))
    for kind in attentions:
        if kind not in kinds:
            raise InputError(
                f"config key gates.attentions: {kind} is not among this model's attentions "
                f"(allowed: {', '.join(kinds)})"
            )
    return {name: module for name, module in every.items() if attention_kind(name) in attentions}


class Gated(nn.Module):
    """A model, one parameter log_a a head, and the two multipliers of a constrained run.

    The gates that a forward pass uses are set by :meth:`draw` or :meth:`settle`; they act inside
    :meth:`hooked`.
    """

    def __init__(self, model: nn.Module, attentions: Sequence[str], beta: float, log_a: float):
        """Gate the heads of the given attentions, every gate at ``log_a``."""
        super().__init__()
        modules = gated_modules(model, attentions)
        self.model, self.beta = model, beta
        self.names = list(modules)
        self.log_a = nn.ParameterList(
            nn.Parameter(torch.full((head_count(part),), float(log_a))) for part in modules.values()
        )
        self.multipliers = nn.Parameter(torch.zeros(2))
        self._order = tuple(modules.values())
        self._gates: dict[int, Tensor] = {}
        self.to(next(model.parameters()).device)

    @property
    def heads(self) -> int:
        """All gated heads."""
        return sum(len(values) for values in self.log_a)

    def draw(self, uniform: Sequence[Tensor]) -> None:
        """Set the gates of the next forward passes from uniform numbers, one tensor a module."""
        for module, log_a_H, u_H in zip(self._order, self.log_a, uniform, strict=True):
            self._gates[id(module)] = hard_concrete.sample(log_a_H, u_H, self.beta)

    @torch.no_grad()
    def settle(self) -> None:
        """Set the gates to those that the model is judged with."""
        for module, log_a_H in zip(self._order, self.log_a, strict=True):
            self._gates[id(module)] = hard_concrete.gate(log_a_H)

    def p_open(self) -> list[Tensor]:
        """Probability of each head's gate to be open, one tensor an attention module."""
        return [hard_concrete.p_open(values, self.beta) for values in self.log_a]

    @torch.no_grad()
    def gates(self) -> dict[str, Tensor]:
        """The gates that the model is judged with, by attention module."""
        pairs = zip(self.names, self.log_a, strict=True)
        return {name: hard_concrete.gate(values.detach()).cpu() for name, values in pairs}

    @torch.no_grad()
    def fix(self, kept: Sequence[Tensor]) -> None:
        """Open the kept heads wholly and close the others, for good."""
        wide, shut = hard_concrete.WIDE, hard_concrete.SHUT
        for values, keep in zip(self.log_a, kept, strict=True):
            values.copy_(torch.where(keep.to(values.device), wide, shut))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Multiply the heads by their gates as long as the block runs."""
        with tapped(self.model, self._multiply):
            yield

    def _multiply(self, module: nn.Module, q, k, v, z_BTHd: Tensor) -> Tensor | None:
        gates_H = self._gates.get(id(module))
        return None if gates_H is None else z_BTHd * gates_H.to(z_BTHd.dtype)[:, None]

    @contextmanager
    def judged(self) -> Iterator[nn.Module]:
        """Give the model in evaluation mode with the gates that it is judged with (hooked)."""
        before, training = dict(self._gates), self.model.training
        self.model.eval()
        try:
            self.settle()
            yield self.model
        finally:
            self._gates = before
            self.model.train(training)


def kept_heads(gates: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the numbers (from 0) of the open heads by attention module."""
    return {name: (values > 0).nonzero().flatten().tolist() for name, values in gates.items()}
