"""Importance of FFN channels, and which of them stay.

Shapes: L layers, D model width, n channels, k kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from headroom.errors import InputError
from headroom.ffn.layers import FFN


@dataclass(frozen=True)
class Channels:
    """What is known of one layer's channels, in their canonical scale (``layers``)."""

    ffn: FFN  # float64
    activations: Mapping[str, Tensor]  # count, mean, squares, leverage
    gradients: Mapping[str, Tensor]  # "fo.channel", "snip.max", …; empty where nobody asked
    seed: int
    layer: int

    @property
    def count(self) -> float:
        """Calibration tokens."""
        return float(self.activations["count"])

    @property
    def variance_n(self) -> Tensor:
        """Var(h_c) over the calibration tokens, unbiased."""
        return self.activations["squares"] / max(self.count - 1, 1)

    @property
    def norm_n(self) -> Tensor:
        """‖h_c‖₂ over the calibration tokens."""
        return (self.activations["squares"] + self.count * self.activations["mean"] ** 2).sqrt()


Score = Callable[[Channels], Tensor]  # (n,), higher means more important


def standardised(values_n: Tensor) -> Tensor:
    """Return (x − mean x) / std x, unbiased; zeros where nothing varies."""
    centred_n = values_n - values_n.mean()
    spread = (centred_n.square().sum() / max(len(values_n) - 1, 1)).sqrt()
    # the mean of equal numbers is not always that number: a std of rounding errors is none
    varies = len(values_n) > 1 and spread > 1e-14 * values_n.abs().max()
    return centred_n / spread if varies else torch.zeros_like(centred_n)


def random(channels: Channels) -> Tensor:
    """Return uniform random numbers drawn by seed and layer: the baseline of no choice."""
    generator = torch.Generator().manual_seed(channels.seed * 100003 + channels.layer)
    return torch.rand(channels.ffn.channels, generator=generator, dtype=torch.float64)


def magnitude(channels: Channels) -> Tensor:
    """Return ‖(g_c, u_c, d_c)‖₂, the weights of a channel in its canonical scale."""
    ffn = channels.ffn
    parts = ffn.gate_nD.square().sum(1), ffn.up_nD.square().sum(1), ffn.down_Dn.square().sum(0)
    return sum(parts).sqrt()


def wanda_sp(channels: Channels) -> Tensor:
    """Return ‖h_c‖₂ · Σ_j |W_d,jc| (Wanda-sp; An et al. 2024, section 4.1)."""
    return channels.norm_n * channels.ffn.down_Dn.abs().sum(0)


def flap(channels: Channels) -> Tensor:
    """Return Var(h_c) · ‖W_d,c‖², standardised in the layer (FLAP's WIFV; An et al. 2024, 3.2)."""
    return standardised(channels.variance_n * channels.ffn.down_Dn.square().sum(0))


def leverage(channels: Channels) -> Tensor:
    """Return the ridge leverage diag(G (G + λI)⁻¹), G = HᵀH (``observe.leverage``)."""
    return channels.activations["leverage"]


def _both(statistic: str) -> Score:
    """Return z(FO) + z(SNIP) of one statistic of the weights' sensitivities."""

    def score(channels: Channels) -> Tensor:
        found = channels.gradients
        return standardised(found[f"fo.{statistic}"]) + standardised(found[f"snip.{statistic}"])

    return score


# A score is one function of a layer's channels, and one entry in the registry whose measurements
# it reads: weights and activations, or gradients too.
SCORES: dict[str, Score] = {
    "random": random,
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "flap": flap,
    "leverage": leverage,
}
GRADIENT_SCORES: dict[str, Score] = {
    "fo_snip": _both("channel"),
    "abs_fo_snip": _both("channel_abs"),
    "mean": _both("mean"),
    "max": _both("max"),
    "std": _both("std"),
    "p95": _both("p95"),
    "consistency": _both("consistency"),
    "structural": _both("structural"),
    "mutual": _both("mutual"),
    "important_ratio": _both("important_ratio"),
}


def score_channels(name: str, channels: Channels) -> Tensor:
    """Return a registered score of one layer, float64 (n,).

    Raises:
        InputError: if the score has another shape or is not finite.
    """
    score_n = (SCORES | GRADIENT_SCORES)[name](channels)
    if score_n.shape != (channels.ffn.channels,) or not bool(score_n.isfinite().all()):
        raise InputError(
            f"score {name}: layer {channels.layer} gives shape {tuple(score_n.shape)}, finite: "
            f"{bool(score_n.isfinite().all())} (allowed: {channels.ffn.channels} finite numbers)"
        )
    return score_n.double().cpu()


def kept_channels(score_n: Tensor, width: int) -> Tensor:
    """Return the channels with the highest scores in their old order; of equal ones the first."""
    return score_n.argsort(descending=True, stable=True)[:width].sort().values


def widths(
    selection: str, scores: Sequence[Tensor], angles: Sequence[float], multiple: int, channels: int
) -> list[int]:
    """Return how many channels each layer keeps.

    ``r0.30`` takes floor(0.3 n) from every layer. ``g0.30`` takes as many in all, the lowest of all
    layers' standardised scores (FLAP). ``a0.30`` gives layers that turn their input more a larger
    share: keep_l ∝ σ(z(angle_l)), as many in all, at most n (after CFSP; its slope of 10⁻⁴ per unit
    of an unscaled importance is replaced by the standardised angle).

    Args:
        selection: ``r``, ``g`` or ``a`` and the pruning ratio as a recipe writes it.
        scores: of each layer's live channels.
        angles: of each layer, its mean angular change of the residual stream.
        multiple: widths are rounded up to it (8 or 128 suit hardware).
        channels: n, the width of every layer as stored.

    Raises:
        InputError: if a layer keeps no channel, or rounding up to ``multiple`` keeps them all.
    """
    kind, ratio = selection[0], Fraction(selection[1:])
    layers, uniform = len(scores), channels - int(channels * ratio)
    if ratio == 0 or kind == "r":
        kept = [uniform] * layers
    elif kind == "g":
        flat = torch.cat([standardised(score_n) for score_n in scores])
        owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
        chosen = flat.argsort(descending=True, stable=True)[: layers * uniform]
        kept = torch.bincount(owner[chosen], minlength=layers).tolist()
    else:
        share = torch.sigmoid(standardised(torch.tensor(angles, dtype=torch.float64)))
        kept = _apportioned(share.tolist(), layers * uniform, channels)
    if min(kept) < 1:
        raise InputError(
            f"ratio {selection}: layer {kept.index(0)} would keep no channel (allowed: a smaller "
            f"ratio, or r{selection[1:]}, which takes as many from every layer)"
        )
    found = [
        min(-(-width // multiple) * multiple, len(score_n))
        for width, score_n in zip(kept, scores, strict=True)
    ]
    if sum(kept) < sum(map(len, scores)) == sum(found):
        raise InputError(
            f"config key ffn.multiple is {multiple}: at ratio {selection} every layer would keep "
            f"all of its {channels} channels (allowed: a smaller one, 1 for none)"
        )
    return found


def _apportioned(shares: Sequence[float], total: int, most: int) -> list[int]:
    """Return whole numbers proportional to shares, none above ``most``, with the given sum."""
    quota = [0.0] * len(shares)
    free, left = set(range(len(shares))), float(total)
    while free:
        scale = left / sum(shares[i] for i in free)
        full = {i for i in free if shares[i] * scale >= most}
        for i in full or free:
            quota[i] = min(float(most), shares[i] * scale)
        free, left = (free - full, left - most * len(full)) if full else (set(), 0.0)
    found = [int(value) for value in quota]
    by_rest = sorted(range(len(shares)), key=lambda i: (found[i] - quota[i], i))
    for i in [i for i in by_rest if found[i] < most][: total - sum(found)]:
        found[i] += 1
    return found
