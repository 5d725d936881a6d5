"""Fusing the channels that go into those that stay: one function a method.

Everything is in float64. Shapes: N tokens, D model width, n channels, k kept, p pruned.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from headroom.accumulators import Moments, add_product
from headroom.ffn.layers import FFN, canonical_scale
from headroom.ffn.observe import CHUNK, factored, hidden_gram, hidden_moments

SEQUENTIAL = "_sequential"  # a refit on what the compressed layers before it really give


@dataclass(frozen=True)
class Layer:
    """One dense layer with what it reads on the calibration text; statistics are computed once."""

    dense: FFN  # as the checkpoint stores it
    inputs: Sequence[Tensor]  # (B, T, D) a batch
    ridge: float  # λ of a refit as a share of the mean diagonal of G

    @cached_property
    def scale_n(self) -> Tensor:
        """s of the canonical scale, h' = s·h."""
        return canonical_scale(self.dense)

    @cached_property
    def canonical(self) -> FFN:
        """The same function with each channel's free scale and sign fixed."""
        return self.dense.scaled(self.scale_n)

    @cached_property
    def gram_nn(self) -> Tensor:
        """G = H'ᵀH'; the activations as they are make the products, the scale comes after."""
        return hidden_gram(self.dense, self.inputs) * self.scale_n[:, None] * self.scale_n

    @cached_property
    def moments(self) -> Moments:
        """Mean and spread of h'."""
        return hidden_moments(self.dense, self.inputs).scaled(self.scale_n)

    @cached_property
    def weight(self) -> float:
        """λ = ridge · mean diag G."""
        return self.ridge * float(self.moments.energy_C.mean())

    def correlation(self, kept_k: Tensor) -> Tensor:
        """Return corr(h_i, h_j) of every channel and the kept ones, (n, k); 0 for a constant."""
        moments, kept_k = self.moments, kept_k.to(self.gram_nn.device)
        mean_n, squares_n = moments.mean_C, moments.squares_C
        covered_nk = self.gram_nn[:, kept_k] - moments.count * mean_n[:, None] * mean_n[kept_k]
        spread_nk = (squares_n[:, None] * squares_n[kept_k]).sqrt()
        return torch.where(spread_nk > 0, covered_nk / spread_nk, 0.0).clamp(-1, 1)


@dataclass(frozen=True)
class Transport:
    """A plan from all channels to the kept ones, and the signs that align what it joins."""

    plan_nk: csr_array
    source_n: np.ndarray  # the marginals that were asked for
    target_k: np.ndarray
    sign_nk: csr_array | None = None  # ±1 where the plan has mass; None: all +1


def pruned_of(channels: int, kept_k: Tensor) -> Tensor:
    """Return the channels that don't stay, sorted."""
    gone_n = torch.ones(channels, dtype=torch.bool, device=kept_k.device)
    gone_n[kept_k] = False
    return gone_n.nonzero().flatten()


def drop(layer: Layer, kept_k: Tensor, transport: Transport | None) -> FFN:
    """Keep K and nothing else."""
    return layer.dense.pick(kept_k)


def bias(layer: Layer, kept_k: Tensor, transport: Transport | None) -> FFN:
    """Drop and add the mean of what went: b_d + W_d,P mean(h_P) (FLAP; An et al. 2024)."""
    small = layer.dense.pick(kept_k)
    gone_p = pruned_of(layer.dense.channels, kept_k)
    lost_D = layer.canonical.down_Dn[:, gone_p] @ layer.moments.mean_C[gone_p]
    old = (small.gate_bias_n, small.up_bias_n, small.down_bias_D)
    sizes = (small.channels, small.channels, len(lost_D))
    gate_n, up_n, down_D = (
        lost_D.new_zeros(size) if tensor is None else tensor
        for tensor, size in zip(old, sizes, strict=True)
    )
    return replace(small, gate_bias_n=gate_n, up_bias_n=up_n, down_bias_D=down_D + lost_D)


def _matrix(map_kn: csr_array, like: Tensor) -> Tensor:
    """Return a sparse matrix as torch's, on a tensor's device."""
    found = map_kn.tocoo()
    pairs = torch.from_numpy(np.stack([found.row, found.col]).astype(np.int64))
    values = torch.from_numpy(np.asarray(found.data, dtype=np.float64))
    matrix = torch.sparse_coo_tensor(pairs, values, map_kn.shape, check_invariants=False)
    return matrix.to(like.device).coalesce()


def normalised(plan_nk: csr_array, side: str) -> csr_array:
    """Return Tᵀ (k, n), rows (targets) or columns (sources) summing to one; zeros stay zeros."""
    sums = np.asarray(plan_nk.sum(axis=0 if side == "rows" else 1)).ravel()
    inverse = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)
    scaled = plan_nk.multiply(inverse[None, :] if side == "rows" else inverse[:, None])
    return csr_array(scaled.T)


def _fused(map_kn: Tensor, rows: Tensor | None) -> Tensor | None:
    """Return a sparse map times rows or a bias."""
    if rows is None:
        return None
    flat = rows.reshape(len(rows), -1)
    return torch.sparse.mm(map_kn, flat).reshape(-1, *rows.shape[1:])


def _transported(layer: Layer, transport: Transport, sides: tuple[str, str]) -> FFN:
    """Return the canonical layer with its rows and its columns mapped by a plan.

    A source of the other sign goes in as (−u, −d), which is the same channel.

    Args:
        sides: how the map of gate and up, and that of down, are normalised.
    """
    ffn, signs = layer.canonical, transport.sign_nk
    rows_kn, columns_kn = (normalised(transport.plan_nk, side) for side in sides)
    signed = [m if signs is None else csr_array(m.multiply(signs.T)) for m in (rows_kn, columns_kn)]
    by_gate, by_up, by_down = (_matrix(m, ffn.gate_nD) for m in (rows_kn, *signed))
    return replace(
        ffn,
        gate_nD=_fused(by_gate, ffn.gate_nD),
        gate_bias_n=_fused(by_gate, ffn.gate_bias_n),
        up_nD=_fused(by_up, ffn.up_nD),
        up_bias_n=_fused(by_up, ffn.up_bias_n),
        down_Dn=_fused(by_down, ffn.down_Dn.T).T.contiguous(),
    )


def ot_column(layer: Layer, kept_k: Tensor, transport: Transport) -> FFN:
    """Apply Tᵀ with columns (sources) summing to one to all three matrices: the seed's fusion.

    A channel that takes in another becomes their sum in gate, up and down, so that equal channels
    come out wrong; it is kept to be measured.
    """
    return _transported(layer, transport, ("columns", "columns"))


def ot_mass(layer: Layer, kept_k: Tensor, transport: Transport) -> FFN:
    """Average gate and up by received mass, diag(1/b)Tᵀ; sum down by sent mass, Tᵀdiag(1/a).

    Lossless where channels with mass on one target are equal and the target takes all they send.
    """
    return _transported(layer, transport, ("rows", "columns"))


def ridge(layer: Layer, kept_k: Tensor, transport: Transport | None) -> FFN:
    """Drop, then W_d = W_d,K + W_d,P G_PK (G_KK + λI)⁻¹: ridge regression on the correction.

    The least-squares best W_d for the kept channels as λ → 0.
    """
    if not layer.weight > 0:  # no channel says anything
        return layer.dense.pick(kept_k)
    gone_p = pruned_of(layer.dense.channels, kept_k)
    gram_nn, down_Dn = layer.gram_nn, layer.canonical.down_Dn
    factor_kk = factored(gram_nn[kept_k][:, kept_k], layer.weight)
    rest_kD = gram_nn[kept_k][:, gone_p] @ down_Dn[:, gone_p].T
    change_kD = torch.cholesky_solve(rest_kD, factor_kk)
    small = layer.dense.pick(kept_k)
    return replace(small, down_Dn=small.down_Dn + change_kD.T * layer.scale_n[kept_k])


def ot_ridge(layer: Layer, kept_k: Tensor, transport: Transport) -> FFN:
    """Fuse gate and up as ``ot_mass``, then refit W_d to the dense output."""
    return refitted(layer, ot_mass(layer, kept_k, transport), layer.inputs)


def refitted(layer: Layer, small: FFN, seen: Iterable[Tensor]) -> FFN:
    """Return a smaller FFN with W_d refitted to the dense layer's output Y.

    Δᵀ = (ZᵀZ + λI)⁻¹ Zᵀ(Y − Z W_dᵀ) with Z the smaller layer's hidden activations, λ the dense
    layer's. Biases take part in Y and in what is missing of it.

    Args:
        layer: the dense layer and its inputs.
        small: any FFN of fewer channels.
        seen: what the smaller layer reads for the same tokens (behind a compressed prefix: other
            states than the dense layer reads).
    """
    if not layer.weight > 0:
        return small
    size, width = small.channels, small.down_Dn.shape[0]
    gram_kk, rest_kD = small.gate_nD.new_zeros(size, size), small.gate_nD.new_zeros(size, width)
    for x_BTD, other_BTD in zip(layer.inputs, seen, strict=True):
        dense, own = layer.dense.to(x_BTD.dtype), small.to(x_BTD.dtype)
        pairs = zip(*(x.flatten(0, 1).split(CHUNK) for x in (x_BTD, other_BTD)), strict=True)
        for x_ND, other_ND in pairs:
            z_Nk = own.hidden(other_ND)
            wide = torch.promote_types(z_Nk.dtype, torch.float32)
            missing_ND = dense(x_ND).double() - _output(small, z_Nk)
            add_product(gram_kk, z_Nk, z_Nk)
            add_product(rest_kD, z_Nk, missing_ND.to(wide))
    scale_k = canonical_scale(small)  # so that λ means the same for every channel
    gram_kk *= scale_k[:, None] * scale_k
    factor_kk = factored(gram_kk, layer.weight)
    change_kD = torch.cholesky_solve(rest_kD * scale_k[:, None], factor_kk)
    return replace(small, down_Dn=small.down_Dn + change_kD.T * scale_k)


def _output(small: FFN, z_Nk: Tensor) -> Tensor:
    """Return the smaller layer's output for its hidden activations, in float64."""
    wide = torch.promote_types(z_Nk.dtype, torch.float32)
    y_ND = (z_Nk.to(wide) @ small.down_Dn.to(wide).T).double()
    return y_ND if small.down_bias_D is None else y_ND + small.down_bias_D


Fusion = Callable[[Layer, Tensor, Transport | None], FFN]

# A fusion is one function of a layer, its kept channels and (names in ``ot_``) a transport plan.
FUSIONS: dict[str, Fusion] = {
    "drop": drop,
    "bias": bias,
    "ot_column": ot_column,
    "ot_mass": ot_mass,
    "ridge": ridge,
    "ot_ridge": ot_ridge,
}
# Those that refit, and can do so behind a compressed prefix (``ridge_sequential``).
START: dict[str, Fusion] = {
    "ridge": drop,
    "ot_ridge": ot_mass,
}


def fuse(
    name: str,
    layer: Layer,
    kept_k: Tensor,
    transport: Transport | None,
    seen: Iterable[Tensor] | None = None,
) -> FFN:
    """Return one layer fused by a method of ``FUSIONS``, refitting on ``seen`` if sequential.

    Where nothing goes there is no transport, and the layer stays as it is.
    """
    if transport is None and name.startswith("ot_"):
        name = "ridge" + SEQUENTIAL if name.endswith(SEQUENTIAL) else "drop"
    if name.endswith(SEQUENTIAL):
        return refitted(layer, START[name.removesuffix(SEQUENTIAL)](layer, kept_k, transport), seen)
    return FUSIONS[name](layer, kept_k, transport)
