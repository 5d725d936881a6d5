"""The gauge freedom of attention: what can change in the weights while the function stays.

A key/value head g and the query heads that read it can be changed together without any effect:

* values: W_V,g → A W_V,g and W_O,h → W_O,h A⁻¹ for any invertible A (here orthogonal);
* keys: in each rotary plane m, the rows (m, m + d/2) read as one complex number,
  K_m → z_m K_m and Q_m → Q_m / conj(z_m).

Two key/value heads can be the same function in different gauges, so one is moved into the other's
before anything is averaged. Shapes: B sequences, T tokens, N = B·T, H query heads, G key/value
heads, d head size, p = d/2 rotary planes, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from headroom.heads.weights import AttentionWeights, Calibration, affine, normalised


@dataclass(frozen=True)
class Gauge:
    """How to move a key/value head: complex factors of its planes, rotation of its values."""

    planes_p: Tensor  # complex
    values_dd: Tensor  # orthogonal R; v becomes v R

    def keys(self, states: Tensor, dim: int = -1) -> Tensor:
        """Return key states or rows with plane m multiplied by z_m."""
        return scale_planes(states, self.planes_p, dim)

    def queries(self, states: Tensor, dim: int = -1) -> Tensor:
        """Return query states or rows with plane m divided by conj(z_m)."""
        return scale_planes(states, 1 / self.planes_p.conj(), dim)


@dataclass(frozen=True)
class GaugeStatistics:
    """Sums over the calibration tokens that all alignments of one layer need, in float64."""

    keys_GGp: Tensor  # [a, b, m] = Σ_t k_a,m conj(k_b,m), complex; after the norm, before RoPE
    values_GdGd: Tensor  # [a, :, b, :] = V_aᵀ V_b
    free_p: Tensor  # planes that may turn by any angle (others: sign only)
    scaled: bool  # whether the modulus is free (not under a norm of keys)

    @cached_property
    def distances_GG(self) -> Tensor:
        """How unlike key/value heads stay after alignment, shape (G, G); 0 = equal up to gauge.

        (1 − mean_m |⟨k_a,m, k_b,m⟩| / (‖k_a,m‖ ‖k_b,m‖)) + (1 − ‖V_aᵀ V_b‖_* / (‖V_a‖ ‖V_b‖));
        where only the sign of a plane is free, |Re ⟨⟩| takes the place of |⟨⟩|.
        """
        cross_GGp = self.keys_GGp
        reached_GGp = torch.where(self.free_p, cross_GGp.abs(), cross_GGp.real.abs())
        energy_Gp = torch.einsum("ggp->gp", cross_GGp).real
        norm_GGp = (energy_Gp[:, None] * energy_Gp[None]).sqrt()
        keys_GG = torch.where(norm_GGp > 0, reached_GGp / norm_GGp, 0).mean(-1)
        nuclear_GG = torch.linalg.svdvals(self.values_GdGd.transpose(1, 2)).sum(-1)
        norm_GG = nuclear_GG.diagonal().sqrt().outer(nuclear_GG.diagonal().sqrt())
        values_GG = torch.where(norm_GG > 0, nuclear_GG / norm_GG, 0)
        upper_GG = (2 - keys_GG - values_GG).triu(1)
        return upper_GG + upper_GG.T  # exactly symmetric: of two heads neither is nearer


def scale_planes(states: Tensor, factors_p: Tensor, dim: int = -1) -> Tensor:
    """Multiply plane m, the pair (m, m + d/2) of ``dim`` as one complex number, by factor m."""
    shape = [1] * states.dim()
    shape[dim] = -1
    real, imaginary = (t.to(states).reshape(shape) for t in (factors_p.real, factors_p.imag))
    first, second = states.chunk(2, dim)
    return torch.cat((first * real - second * imaginary, first * imaginary + second * real), dim)


def gauge_statistics(weights: AttentionWeights, calibration: Calibration) -> GaugeStatistics:
    """Stream the calibration text once through the layer's keys and values.

    RoPE multiplies k_a,m and k_b,m of a token by the same phase, so that it can be left out.
    With a norm of queries and keys (Qwen3) the modulus does nothing, and a plane may turn freely
    only where both norms' weights agree in m and m + d/2; elsewhere its sign is free.
    """
    groups, d = weights.groups, weights.head_dim
    device = weights.k_GdD.device
    keys_GGp = torch.zeros(groups, groups, d // 2, dtype=torch.complex128, device=device)
    values = torch.zeros(groups * d, groups * d, dtype=torch.float64, device=device)
    for x_BTD, _, _ in calibration.batches(weights.k_GdD):
        k_BTGd = affine(x_BTD, weights.k_GdD, weights.k_bias_Gd)
        k_BTGd = normalised(k_BTGd, weights.k_norm_d, weights.eps).double()
        k_pGN = torch.complex(*k_BTGd.chunk(2, -1)).flatten(0, 1).permute(2, 1, 0)
        keys_GGp += (k_pGN @ k_pGN.mH).permute(1, 2, 0)
        v_NGd = affine(x_BTD, weights.v_GdD, weights.v_bias_Gd).double().flatten(0, 1)
        values += v_NGd.flatten(1).T @ v_NGd.flatten(1)
    free_p = torch.ones(d // 2, dtype=torch.bool, device=device)
    for norm_d in (weights.q_norm_d, weights.k_norm_d):
        if norm_d is not None:
            first, second = norm_d.chunk(2)
            free_p &= first == second
    values_GdGd = values.view(groups, d, groups, d)
    # small decompositions follow, which a GPU is slow at
    return GaugeStatistics(
        keys_GGp.cpu(), values_GdGd.cpu(), free_p.cpu(), scaled=weights.k_norm_d is None
    )


def gauge(statistics: GaugeStatistics, target: int, source: int) -> Gauge:
    """Return what moves key/value head ``source`` into the gauge of ``target``.

    z_m = phase of Σ_t conj(k_b,m) k_a,m times sqrt(Σ|k_a,m|² / Σ|k_b,m|²), and R = U Vᵀ from the
    singular value decomposition of V_bᵀ V_a (orthogonal Procrustes), with a = target, b = source.
    The modulus is the symmetric one, so that aligning b to a undoes aligning a to b; that of least
    squares would blow up the queries where keys are unlike. A head without keys is left alone.
    """
    cross_p = statistics.keys_GGp[target, source]
    planes_p = torch.where(
        statistics.free_p,
        torch.where(cross_p.abs() > 0, torch.sgn(cross_p), 1),
        torch.where(cross_p.real < 0, -1.0, 1.0),
    )
    if statistics.scaled:
        energy_a, energy_b = (statistics.keys_GGp[g, g].real for g in (target, source))
        modulus_p = (energy_a / energy_b).sqrt()
        usable = torch.isfinite(modulus_p) & (modulus_p > 0)
        planes_p = planes_p * torch.where(usable, modulus_p, 1.0)
    u, _, vh = torch.linalg.svd(statistics.values_GdGd[source, :, target, :])
    return Gauge(planes_p, u @ vh)


def identity(weights: AttentionWeights) -> Gauge:
    """Return the gauge change that changes nothing."""
    planes_p = torch.ones(weights.head_dim // 2, dtype=torch.complex128)
    return Gauge(planes_p, torch.eye(weights.head_dim, dtype=torch.float64))


def medoid(statistics: GaugeStatistics, part: Sequence[int]) -> int:
    """Return the key/value head of a part that is nearest to the others.

    The one that all are moved to; chosen by content, so that the order of heads doesn't matter.
    Equally near ones (always so for two) are told apart by the energy of their values.
    """
    if len(part) == 1:
        return part[0]
    members = sorted(part)
    total = statistics.distances_GG[members][:, members].sum(1).tolist()
    energy = torch.einsum("gigi->g", statistics.values_GdGd)[members].tolist()
    return min(zip(total, [-e for e in energy], members, strict=True))[2]


def moved_rows(
    weights: AttentionWeights, heads: Sequence[int], by: Gauge
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return q rows (n, d, D), their biases and o columns (n, D, d) of query heads after a move."""
    heads = list(heads)
    bias_nd = None if weights.q_bias_Hd is None else by.queries(weights.q_bias_Hd[heads])
    o_nDd = weights.o_HDd[heads] @ by.values_dd.to(weights.o_HDd)
    return by.queries(weights.q_HdD[heads], 1), bias_nd, o_nDd


def move_group(weights: AttentionWeights, group: int, by: Gauge) -> AttentionWeights:
    """Return the same function with a key/value head and all its query heads in another gauge.

    Biases move with their rows.
    """
    rotation_dd = by.values_dd.to(weights.v_GdD)
    k_GdD, v_GdD = weights.k_GdD.clone(), weights.v_GdD.clone()
    k_GdD[group] = by.keys(k_GdD[group], 0)
    v_GdD[group] = rotation_dd.T @ v_GdD[group]
    k_bias_Gd, v_bias_Gd = weights.k_bias_Gd, weights.v_bias_Gd
    if k_bias_Gd is not None:
        k_bias_Gd = k_bias_Gd.clone()
        k_bias_Gd[group] = by.keys(k_bias_Gd[group])
    if v_bias_Gd is not None:
        v_bias_Gd = v_bias_Gd.clone()
        v_bias_Gd[group] = v_bias_Gd[group] @ rotation_dd
    own = slice(group * weights.per_group, (group + 1) * weights.per_group)
    q_HdD, o_HDd, q_bias_Hd = weights.q_HdD.clone(), weights.o_HDd.clone(), weights.q_bias_Hd
    q_HdD[own], bias_nd, o_HDd[own] = moved_rows(weights, range(weights.heads)[own], by)
    if q_bias_Hd is not None:
        q_bias_Hd = q_bias_Hd.clone()
        q_bias_Hd[own] = bias_nd
    return replace(
        weights,
        q_HdD=q_HdD,
        k_GdD=k_GdD,
        v_GdD=v_GdD,
        o_HDd=o_HDd,
        q_bias_Hd=q_bias_Hd,
        k_bias_Gd=k_bias_Gd,
        v_bias_Gd=v_bias_Gd,
    )
