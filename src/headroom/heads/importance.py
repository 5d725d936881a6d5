"""Scores of attention heads by importance, and which heads stay when the lowest go.

Shapes: N tokens, H query heads, G key/value heads, d head size, D model width.
"""

from dataclasses import replace

from torch import Tensor

from headroom.accumulators import Moments
from headroom.heads.weights import AttentionWeights, Calibration, heads_output


def moments(weights: AttentionWeights, calibration: Calibration) -> Moments:
    """Stream the calibration text once through the layer's heads."""
    found = Moments.empty((weights.heads, weights.head_dim), weights.q_HdD.device)
    for x_BTD, cos_Td, sin_Td in calibration.batches(weights.q_HdD):
        found = found.merged(heads_output(weights, x_BTD, cos_Td, sin_Td).flatten(0, 1))
    return found


def wanda_sp(weights: AttentionWeights, observed: Moments) -> Tensor:
    """Return Σ over a head's d columns of mean_j |W_O,j| · ‖z‖₂ by head (Wanda-sp).

    An et al. 2024, section 4.1: the extension of Wanda to structures.
    """
    return (weights.o_HDd.double().abs().mean(1) * observed.energy_C.sqrt()).sum(1)


def flap(weights: AttentionWeights, observed: Moments) -> Tensor:
    """Return the mean over a head's columns of their standardised fluctuation (FLAP), shape (H,).

    fluctuation = var(z_column) · ‖W_O,column‖², standardised over all columns of the layer:
    (f − mean f) / std f. An et al. 2024, section 3.2; the variance is the true one of all tokens
    (N − 1), where the authors' code keeps a running approximation.
    """
    variance_Hd = observed.squares_C / max(observed.count - 1, 1)
    fluctuation_Hd = variance_Hd * weights.o_HDd.double().square().sum(1)
    spread = fluctuation_Hd.std()
    centred_Hd = fluctuation_Hd - fluctuation_Hd.mean()
    return (centred_Hd / spread if spread > 0 else centred_Hd).mean(1)


# A score is one function of a layer's weights and its heads' moments, and one entry here.
SCORES = {
    "wanda_sp": wanda_sp,
    "flap": flap,
}


def kept_heads(
    score_H: Tensor, budget: tuple[int, int], groups: int
) -> tuple[tuple[int, ...], ...]:
    """Return the query heads that stay, by key/value head, both in their old order.

    In each key/value head the n with the highest scores, then the G' key/value heads whose kept
    heads have the highest sum. Of equal ones the first stays.

    Args:
        score_H: higher means more important.
        budget: (G', n) with n ≤ H/G.
        groups: G.
    """
    kept, n = budget
    scores = score_H.tolist()
    each = len(scores) // groups
    best = [
        sorted(range(g * each, (g + 1) * each), key=lambda h: (-scores[h], h))[:n]
        for g in range(groups)
    ]
    value = [sum(scores[h] for h in heads) for heads in best]
    stay = sorted(range(groups), key=lambda g: (-value[g], g))[:kept]
    return tuple(tuple(sorted(best[g])) for g in sorted(stay))


def removed(weights: AttentionWeights, kept: tuple[tuple[int, ...], ...]) -> AttentionWeights:
    """Return the layer with only the kept query heads and their key/value heads."""
    heads = [head for group in kept for head in group]
    groups = [group[0] // weights.per_group for group in kept]

    def _pick(tensor: Tensor | None, rows: list[int]) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    return replace(
        weights,
        q_HdD=weights.q_HdD[heads],
        k_GdD=weights.k_GdD[groups],
        v_GdD=weights.v_GdD[groups],
        o_HDd=weights.o_HDd[heads],
        q_bias_Hd=_pick(weights.q_bias_Hd, heads),
        k_bias_Gd=_pick(weights.k_bias_Gd, groups),
        v_bias_Gd=_pick(weights.v_bias_Gd, groups),
    )
