"""Hard-concrete gates (Louizos et al. 2018): L0 penalties that gradient descent can follow.

A gate is a number in [0, 1] that multiplies one attention head's output before W_O. β is the
temperature, (γ, ζ) the interval that is clipped to [0, 1], log_a the parameter, H heads.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1
THRESHOLD = -math.log(-ZETA / GAMMA)  # of log_a: above it the gate is open, -ln 11
SHUT, WIDE = -10.0, 10.0  # log_a of gates that are exactly 0 and 1
TINIEST = 1e-6  # distance of a uniform draw from 0 and 1


def sample(log_a_H: Tensor, uniform_H: Tensor, beta: float) -> Tensor:
    """Return gates drawn from the hard-concrete distribution, differentiable in log_a.

    s = σ((ln u − ln(1 − u) + log_a) / β), g = clip(s (ζ − γ) + γ, 0, 1).

    Args:
        log_a_H: parameters.
        uniform_H: u from [0, 1]; finite at both ends.
        beta: temperature.
    """
    u_H = uniform_H.clamp(TINIEST, 1 - TINIEST)
    s_H = torch.sigmoid((u_H.log() - (-u_H).log1p() + log_a_H) / beta)
    return (s_H * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def gate(log_a_H: Tensor) -> Tensor:
    """Return the gates that a model is judged with: clip(σ(log_a) (ζ − γ) + γ, 0, 1)."""
    return (torch.sigmoid(log_a_H) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def p_open(log_a_H: Tensor, beta: float) -> Tensor:
    """Return the probability that a drawn gate is above 0: σ(log_a − β ln(−γ/ζ))."""
    return torch.sigmoid(log_a_H - beta * math.log(-GAMMA / ZETA))


def mean_heads(p_open_LH: Sequence[Tensor]) -> Tensor:
    """Return Σ_layers mean_heads p_open: the penalty that this study grew from."""
    return torch.stack([p_H.mean() for p_H in p_open_LH]).sum()


def sum_heads(p_open_LH: Sequence[Tensor]) -> Tensor:
    """Return mean_layers Σ_heads p_open (Voita et al. 2019)."""
    return torch.stack([p_H.sum() for p_H in p_open_LH]).mean()


Penalty = Callable[[Sequence[Tensor]], Tensor]  # p_open of each gated attention -> a number

PENALTIES: dict[str, Penalty] = {
    "seed": mean_heads,
    "voita": sum_heads,
}


def strongest(log_a_LH: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return which heads have the ``count`` highest values over all layers (ties: the first).

    Returns:
        one Boolean tensor a layer, ``count`` of them true in all.
    """
    flat = torch.cat([values.detach().flatten() for values in log_a_LH])
    order = flat.sort(descending=True, stable=True).indices
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[order[:count]] = True
    return list(chosen.split([values.numel() for values in log_a_LH]))
