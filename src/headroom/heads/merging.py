"""Merging the heads of one layer: averaged, aligned first, or with its output refitted.

Shapes: B sequences, T tokens, N tokens in all, H query heads, G key/value heads, d head size,
D model width, C = columns of live heads.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from headroom.errors import InputError
from headroom.heads.alignment import (
    GaugeStatistics,
    gauge,
    gauge_statistics,
    identity,
    medoid,
    move_group,
    moved_rows,
)
from headroom.heads.clustering import Block
from headroom.heads.plans import Plan
from headroom.heads.weights import AttentionWeights, Calibration, heads_output, project


@dataclass(frozen=True)
class Layer:
    """A dense layer and what it reads on the calibration text; statistics are computed once."""

    weights: AttentionWeights
    calibration: Calibration | None
    ridge: float = 1e-3  # of the refit, as a share of the mean diagonal of its Gram

    @property
    def inputs(self) -> Calibration:
        """The calibration inputs.

        Raises:
            InputError: if there are none.
        """
        if self.calibration is None:
            raise InputError(
                "heads.calibration: this merge needs attention inputs of calibration text"
            )
        return self.calibration

    @cached_property
    def statistics(self) -> GaugeStatistics:
        """What alignments of key/value heads need."""
        return gauge_statistics(self.weights, self.inputs)


def tied(weights: AttentionWeights, parts: tuple[Block, ...]) -> AttentionWeights:
    """Return the weights with K, V and biases averaged in each part, in every member's place."""

    def mean(tensor: Tensor | None) -> Tensor | None:
        """Average rows or biases in each part."""
        if tensor is None:
            return None
        tensor = tensor.clone()
        for part in map(list, parts):
            if len(part) > 1:
                tensor[part] = tensor[part].mean(0)
        return tensor

    return replace(
        weights,
        k_GdD=mean(weights.k_GdD),
        v_GdD=mean(weights.v_GdD),
        k_bias_Gd=mean(weights.k_bias_Gd),
        v_bias_Gd=mean(weights.v_bias_Gd),
    )


def reduced(weights: AttentionWeights, plan: Plan) -> AttentionWeights:
    """Return the smaller layer: a cluster's W_Q averaged, its W_O summed, copies deleted.

    The members of a part share one gauge and one K, V already. Summing W_O is what keeps two equal
    heads' contribution; its average would halve it.
    """
    order = [c for part in plan.groups for c in plan.clusters if set(plan.span(c)) <= set(part)]
    firsts = [part[0] for part in plan.groups]

    def pick(tensor: Tensor | None) -> Tensor | None:
        """Keep one key/value head a part."""
        return None if tensor is None else tensor[firsts]

    bias_Hd = weights.q_bias_Hd
    return replace(
        weights,
        q_HdD=torch.stack([weights.q_HdD[list(c)].mean(0) for c in order]),
        k_GdD=weights.k_GdD[firsts],
        v_GdD=weights.v_GdD[firsts],
        o_HDd=torch.stack([weights.o_HDd[list(c)].sum(0) for c in order]),
        q_bias_Hd=None
        if bias_Hd is None
        else torch.stack([bias_Hd[list(c)].mean(0) for c in order]),
        k_bias_Gd=pick(weights.k_bias_Gd),
        v_bias_Gd=pick(weights.v_bias_Gd),
    )


def carrier(layer: Layer, cluster: Block) -> int:
    """Return the head that carries a cluster's output where the shape stays.

    The first one in the medoid of the cluster's key/value heads.
    """
    each = layer.weights.per_group
    span = sorted({head // each for head in cluster})
    home = span[0] if len(span) == 1 else medoid(layer.statistics, span)
    return min(head for head in cluster if head // each == home)


def shared(layer: Layer, weights: AttentionWeights, plan: Plan) -> AttentionWeights:
    """Return the layer of the old shape in which each cluster's first head does its work.

    The carrier gets the average of W_Q and the sum of W_O in its own gauge, the others W_O = 0.
    Followers that read the same keys get the carrier's W_Q too. No other head changes.

    Args:
        layer: the dense layer.
        weights: the same with united key/value heads aligned and tied.
        plan: a threshold plan.
    """
    q_HdD, o_HDd, bias_Hd = weights.q_HdD.clone(), weights.o_HDd.clone(), weights.q_bias_Hd
    bias_Hd = None if bias_Hd is None else bias_Hd.clone()
    each = weights.per_group
    for cluster in (c for c in plan.clusters if len(c) > 1):
        chief = carrier(layer, cluster)
        same = plan.part(chief // each)
        rows = []
        for head in cluster:
            near = head // each in same
            by = identity(weights) if near else gauge(layer.statistics, chief // each, head // each)
            rows.append(moved_rows(weights, [head], by))
        near = [head for head in cluster if head // each in same]
        q_HdD[near] = torch.cat([row[0] for row in rows]).mean(0)
        if bias_Hd is not None:
            bias_Hd[near] = torch.cat([row[1] for row in rows]).mean(0)
        o_HDd[list(cluster)] = 0
        o_HDd[chief] = torch.cat([row[2] for row in rows]).sum(0)
    return replace(weights, q_HdD=q_HdD, o_HDd=o_HDd, q_bias_Hd=bias_Hd)


def average(layer: Layer, plan: Plan) -> AttentionWeights:
    """Merge without alignment: every copy of a cluster gets the average of W_Q and of W_O.

    K and V are averaged where key/value heads become one. Σ W_O is conserved while all copies
    stay; where a budget deletes copies, W_O is summed. Clusters end at the border of key/value
    heads that stay apart.
    """
    weights = tied(layer.weights, plan.groups)
    if plan.reduce:
        return reduced(weights, plan)
    q_HdD, o_HDd, bias_Hd = weights.q_HdD.clone(), weights.o_HDd.clone(), weights.q_bias_Hd
    bias_Hd = None if bias_Hd is None else bias_Hd.clone()
    for cluster in (list(c) for c in plan.within_parts().clusters if len(c) > 1):
        q_HdD[cluster] = q_HdD[cluster].mean(0)
        o_HDd[cluster] = o_HDd[cluster].mean(0)
        if bias_Hd is not None:
            bias_Hd[cluster] = bias_Hd[cluster].mean(0)
    return replace(weights, q_HdD=q_HdD, o_HDd=o_HDd, q_bias_Hd=bias_Hd)


def aligned(layer: Layer, plan: Plan) -> AttentionWeights:
    """Merge after bringing key/value heads to the gauge of their medoid; W_O is summed."""
    weights = layer.weights
    for part in (part for part in plan.groups if len(part) > 1):
        target = medoid(layer.statistics, part)
        for group in part:
            if group != target:
                weights = move_group(weights, group, gauge(layer.statistics, target, group))
    weights = tied(weights, plan.groups)
    return reduced(weights, plan) if plan.reduce else shared(layer, weights, plan)


def refit(layer: Layer, plan: Plan) -> AttentionWeights:
    """Merge aligned, then refit W_O to the dense layer's output on the calibration text."""
    return refit_output(layer.weights, aligned(layer, plan), layer.inputs, layer.ridge)


# A method is one function of a layer and a plan, and one entry here.
METHODS = {
    "average": average,
    "aligned": aligned,
    "refit": refit,
}


def merge_layer(
    weights: AttentionWeights,
    plan: Plan,
    method: str,
    calibration: Calibration | None = None,
    ridge: float = 1e-3,
) -> AttentionWeights:
    """Return one layer merged by a plan and a method of ``METHODS``.

    Raises:
        InputError: if the method needs calibration inputs and there are none.
    """
    return METHODS[method](Layer(weights, calibration, ridge), plan)


def live_heads(weights: AttentionWeights) -> list[int]:
    """Return the heads whose output counts: W_O is not zero."""
    return weights.o_HDd.flatten(1).any(1).nonzero().flatten().tolist()


def refit_output(
    dense: AttentionWeights,
    merged: AttentionWeights,
    calibration: Calibration,
    ridge: float,
) -> AttentionWeights:
    """Return the merged layer with W_O refitted to the dense layer's attention output Y.

    W = W₀ + Δ minimises ‖Y − Z Wᵀ‖² + λ ‖Δ‖², with the merged heads' output Z and W₀ their summed
    W_O: Δᵀ = (ZᵀZ + λI)⁻¹ Zᵀ(Y − Z W₀ᵀ). Never worse than W₀ on the same text, and Δ = 0 where the
    merge lost nothing. Only columns of live heads take part.

    Args:
        dense, merged: the layer before and after.
        calibration: streamed once; two accumulators of C² and C·D float64.
        ridge: λ as a share of the mean diagonal of ZᵀZ, above 0.
    """
    live = live_heads(merged)
    columns, width = len(live) * merged.head_dim, merged.o_HDd.shape[1]
    options = {"dtype": torch.float64, "device": merged.o_HDd.device}
    gram_CC, rest_CD = (
        torch.zeros(columns, columns, **options),
        torch.zeros(columns, width, **options),
    )
    for x_BTD, cos_Td, sin_Td in calibration.batches(dense.q_HdD):
        z_BTHd = heads_output(merged, x_BTD, cos_Td, sin_Td)
        wanted_BTD = project(dense, heads_output(dense, x_BTD, cos_Td, sin_Td), bias=False)
        missing_BTD = wanted_BTD - project(merged, z_BTHd, bias=False)
        z_NC = z_BTHd[:, :, live].flatten(2).flatten(0, 1).double()
        gram_CC += z_NC.T @ z_NC
        rest_CD += z_NC.T @ missing_BTD.flatten(0, 1).double()
    weight = ridge * gram_CC.diagonal().mean() if live else 0.0
    if not weight > 0:  # no head says anything
        return merged
    gram_CC.diagonal().add_(weight)
    change_CD = torch.cholesky_solve(rest_CD, torch.linalg.cholesky(gram_CC))
    o_HDd = merged.o_HDd.clone()
    o_HDd[live] += change_CD.unflatten(0, (len(live), -1)).transpose(1, 2).to(o_HDd)
    return replace(merged, o_HDd=o_HDd)


def relative_error(
    dense: AttentionWeights, merged: AttentionWeights, calibration: Calibration
) -> float:
    """Return ‖Y − Y'‖ / ‖Y‖ of the layer's attention output on the calibration text.

    The output's bias, which both share, is left out. 0 where both are zero.
    """
    error = torch.zeros(2, dtype=torch.float64, device=dense.q_HdD.device)
    for x_BTD, cos_Td, sin_Td in calibration.batches(dense.q_HdD):
        y_BTD = project(dense, heads_output(dense, x_BTD, cos_Td, sin_Td), bias=False).double()
        other_BTD = project(merged, heads_output(merged, x_BTD, cos_Td, sin_Td), bias=False)
        error += torch.stack([(y_BTD - other_BTD).square().sum(), y_BTD.square().sum()])
    missed, whole = error.sqrt().tolist()
    return missed / whole if whole > 0 else missed
