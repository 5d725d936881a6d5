"""What a merge truly costs: the squared error of the attention output on the calibration text.

Map similarities never see V, so a budget can be chosen by this instead. Shapes: S sequences,
T tokens, N = S·T, H query heads, G key/value heads, d head size, D model width, M query heads of a
part, C candidate clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headroom.heads.alignment import Gauge, gauge, identity, medoid
from headroom.heads.clustering import Block, Costs
from headroom.heads.merging import Layer
from headroom.heads.weights import affine, attend, normalised, rotated

CHUNK = 2**28  # elements of one tensor of candidates' states


@dataclass(frozen=True)
class _Part:
    """One set of key/value heads merged into one, in the gauge of its medoid."""

    members: list[int]  # query heads
    k_ST1d: Tensor  # merged, after norm and RoPE
    v_ST1d: Tensor
    gauges: dict[int, Gauge]  # by query head
    output_MdMd: Tensor  # [a, :, b, :] = W_O,aᵀ W_O,b of the moved columns, float64
    heads_MdMd: Tensor  # [a, :, b, :] = Z_aᵀ Z_b of the moved dense outputs, float64


class ErrorCosts:
    """Costs of clusters by the error of what they contribute to the attention output.

    cost(C) = ‖Σ_h∈C Z_h W_O,hᵀ − Z̃ (Σ_h∈C W_O,h)ᵀ‖², with Z̃ the output of one head whose query is
    the members' average, on the part's merged K and V. Q, K and V of a merge are averages of the
    members' own, so that nothing is projected anew; with M_h = Z̃ᵀZ_h and P_h = W̃ᵀW_h the error is
    Σ_hh' ⟨Z_hᵀZ_h', W_hᵀW_h'⟩ − 2 Σ_h ⟨M_h, P_h⟩ + ⟨Z̃ᵀZ̃, Σ_h P_h⟩: nothing of width D.

    Keeps (2H + 2G)·d float32 a calibration token on the layer's device. Call it with a part of
    key/value heads, then with lists of clusters of its query heads (``plans.PartCosts``).

    Args:
        layer: a dense layer with calibration inputs.
        align: whether members are moved to the medoid's gauge first.
        refit: whether each cluster's W_O is refitted (its own columns alone, with the layer's
            ridge) before its error counts.
    """

    def __init__(self, layer: Layer, align: bool = True, refit: bool = False):
        self.layer, self.align, self.refit = layer, align, refit
        weights, found = layer.weights, ([], [], [], [])
        for x_BTD, cos_Td, sin_Td in layer.inputs.batches(weights.q_HdD):
            q_BTHd = affine(x_BTD, weights.q_HdD, weights.q_bias_Hd)
            k_BTGd = affine(x_BTD, weights.k_GdD, weights.k_bias_Gd)
            v_BTGd = affine(x_BTD, weights.v_GdD, weights.v_bias_Gd)
            turned_q, turned_k = (
                rotated(normalised(states, norm_d, weights.eps), cos_Td, sin_Td)
                for states, norm_d in ((q_BTHd, weights.q_norm_d), (k_BTGd, weights.k_norm_d))
            )
            k_BTHd, v_BTHd = (t.repeat_interleave(weights.per_group, 2) for t in (turned_k, v_BTGd))
            z_BTHd = attend(turned_q, k_BTHd, v_BTHd, weights.scaling)
            for kept, states in zip(found, (q_BTHd, k_BTGd, v_BTGd, z_BTHd), strict=True):
                kept.append(states)
        self.q_STHd, self.k_STGd, self.v_STGd, self.z_STHd = (torch.cat(kept) for kept in found)
        self.cos_Td, self.sin_Td = cos_Td, sin_Td
        self.heads_HdHd = self._gram()
        columns_DC = weights.o_HDd.double().transpose(0, 1).flatten(1)
        shape = (weights.heads, weights.head_dim) * 2
        self.output_HdHd = (columns_DC.T @ columns_DC).view(shape)

    def _gram(self) -> Tensor:
        heads, d = self.layer.weights.heads, self.layer.weights.head_dim
        gram = torch.zeros(heads * d, heads * d, dtype=torch.float64, device=self.z_STHd.device)
        for z_THd in self.z_STHd:
            z_TC = z_THd.flatten(1).double()
            gram += z_TC.T @ z_TC
        return gram.view(heads, d, heads, d)

    def energy(self) -> float:
        """Return ‖Y‖² of the dense layer's output, its bias left out: what costs compare to."""
        return float((self.heads_HdHd * self.output_HdHd).sum())

    def __call__(self, part: Block) -> Costs:
        """Return the costs of clusters of the query heads of one part of key/value heads."""
        merged = self._part(part)

        def costs(blocks: Sequence[Block]) -> np.ndarray:
            size = self.q_STHd.shape[0] * self.q_STHd.shape[1] * self.q_STHd.shape[3]
            step = max(1, CHUNK // size)
            chunks = [blocks[start : start + step] for start in range(0, len(blocks), step)]
            return np.concatenate([self._costs(merged, chunk) for chunk in chunks])

        return costs

    def _part(self, part: Block) -> _Part:
        weights = self.layer.weights
        by_group = dict.fromkeys(part, identity(weights))
        if self.align and len(part) > 1:
            target = medoid(self.layer.statistics, part)
            moves = [group for group in part if group != target]
            by_group |= {group: gauge(self.layer.statistics, target, group) for group in moves}
        keys = [by_group[group].keys(self.k_STGd[:, :, group]) for group in part]
        values = [self.v_STGd[:, :, g] @ by_group[g].values_dd.to(self.v_STGd) for g in part]
        k_ST1d = torch.stack(keys).mean(0)[:, :, None]
        k_ST1d = rotated(
            normalised(k_ST1d, weights.k_norm_d, weights.eps), self.cos_Td, self.sin_Td
        )
        each = weights.per_group
        members = [group * each + head for group in part for head in range(each)]
        gauges = {head: by_group[head // each] for head in members}
        turn_Mdd = torch.stack([gauges[head].values_dd for head in members]).to(self.heads_HdHd)

        def moved(gram: Tensor) -> Tensor:
            own = gram[members][:, :, members]
            return torch.einsum("aij,aibk,bkl->ajbl", turn_Mdd, own, turn_Mdd)

        v_ST1d = torch.stack(values).mean(0)[:, :, None]
        output, heads = moved(self.output_HdHd), moved(self.heads_HdHd)
        return _Part(members, k_ST1d, v_ST1d, gauges, output, heads)

    def _costs(self, part: _Part, blocks: Sequence[Block]) -> np.ndarray:
        weights = self.layer.weights
        moved = {
            h: part.gauges[h].queries(self.q_STHd[:, :, h]) for h in {h for b in blocks for h in b}
        }
        q_STCd = torch.stack([sum(moved[h] for h in b) / len(b) for b in blocks], dim=2)
        q_STCd = rotated(
            normalised(q_STCd, weights.q_norm_d, weights.eps), self.cos_Td, self.sin_Td
        )
        z_STCd = attend(q_STCd, part.k_ST1d, part.v_ST1d, weights.scaling)
        errors = [self._error(part, b, z_STCd[:, :, place]) for place, b in enumerate(blocks)]
        return torch.stack(errors).clamp_min(0).cpu().numpy()

    def _error(self, part: _Part, block: Block, z_STd: Tensor) -> Tensor:
        own = [part.members.index(head) for head in block]
        output, heads = part.output_MdMd[own][:, :, own], part.heads_MdMd[own][:, :, own]
        z_Nd = z_STd.flatten(0, 1).double()
        seen_dd = z_Nd.T @ z_Nd
        turn_hdd = torch.stack([part.gauges[head].values_dd for head in block]).to(z_Nd)
        dense_NC = self.z_STHd[:, :, list(block)].flatten(2).flatten(0, 1).double()
        both_hdd = (z_Nd.T @ dense_NC).unflatten(1, (len(block), -1)).transpose(0, 1) @ turn_hdd
        with_sum_hdd = output.sum(0).transpose(0, 1)  # W̃ᵀ W_h
        error = (heads * output).sum() - 2 * (both_hdd * with_sum_hdd).sum()
        error = error + (seen_dd * with_sum_hdd.sum(0)).sum()
        return error - self._gain(seen_dd, both_hdd - seen_dd, output) if self.refit else error

    def _gain(self, seen_dd: Tensor, rest_hdd: Tensor, output_hdhd: Tensor) -> Tensor:
        """Return how much a ridge refit of the cluster's W_O takes off its error.

        With F = Z̃ᵀE = Σ_h (M_h − Z̃ᵀZ̃) W_hᵀ, A = Z̃ᵀZ̃, S = (A + λI)⁻¹: 2 tr(S FFᵀ) − tr(S A S FFᵀ).
        """
        weight = self.layer.ridge * seen_dd.diagonal().mean()
        if not weight > 0:
            return torch.zeros_like(weight)
        outer_dd = torch.einsum("aij,ajbl,bkl->ik", rest_hdd, output_hdhd, rest_hdd)
        eye_dd = torch.eye(len(seen_dd), dtype=seen_dd.dtype, device=seen_dd.device)
        inverse_dd = torch.linalg.inv(seen_dd + weight * eye_dd)
        return ((2 * inverse_dd - inverse_dd @ seen_dd @ inverse_dd) * outer_dd).sum()
