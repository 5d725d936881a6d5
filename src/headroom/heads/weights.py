"""The attention weights of one layer by head, and the attention that they compute.

Shapes: B sequences, T tokens, H query heads, G key/value heads, d head size, D model width.
Query head h reads key/value head h // (H / G). Rotary embedding pairs the rows m and m + d/2 of a
head, as transformers does.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headroom.checkpoints import Geometry
from headroom.errors import InputError


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention, each projection seen by head; what a family lacks is None."""

    q_HdD: Tensor
    k_GdD: Tensor
    v_GdD: Tensor
    o_HDd: Tensor  # the columns of o_proj that read head h
    q_bias_Hd: Tensor | None
    k_bias_Gd: Tensor | None
    v_bias_Gd: Tensor | None
    o_bias_D: Tensor | None
    q_norm_d: Tensor | None  # one weight for all heads (Qwen3)
    k_norm_d: Tensor | None
    eps: float  # of the two norms
    scaling: float  # of the scores, 1/sqrt(d)

    @property
    def heads(self) -> int:
        """H, query heads."""
        return self.q_HdD.shape[0]

    @property
    def groups(self) -> int:
        """G, key/value heads."""
        return self.k_GdD.shape[0]

    @property
    def head_dim(self) -> int:
        """d, the size of a head."""
        return self.q_HdD.shape[1]

    @property
    def per_group(self) -> int:
        """H / G query heads share a key/value head."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Calibration:
    """What one layer's attention reads: the calibration text after the layer's norm."""

    x_STD: Tensor  # S sequences, any dtype, usually in main memory
    cos_Td: Tensor
    sin_Td: Tensor
    batch: int = 4  # sequences at a time

    def batches(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield x_BTD, cos_Td, sin_Td batch by batch, with device and dtype of ``like``."""
        cos_Td, sin_Td = (table.to(like) for table in (self.cos_Td, self.sin_Td))
        for start in range(0, self.x_STD.shape[0], self.batch):
            yield self.x_STD[start : start + self.batch].to(like), cos_Td, sin_Td


def prefix(layer: int) -> str:
    """Return what the names of a layer's attention tensors begin with."""
    return f"model.layers.{layer}.self_attn."


def read(
    tensors: Mapping[str, Tensor],
    geometry: Geometry,
    layer: int,
    config: dict,
    device: str = "cpu",
) -> AttentionWeights:
    """Read one layer's attention, in float32 (float64 where it is stored so).

    Args:
        tensors: by the names that transformers gives them; anything with ``in`` and ``[name]``.
        geometry: the checkpoint's sizes.
        layer: counted from 0.
        config: the checkpoint's ``config.json`` (for the norms' epsilon).
        device: where the weights go.

    Raises:
        InputError: if a tensor is missing or has another shape than the configuration says.
    """
    d, width = geometry.head_dim, geometry.hidden
    counts = {"q": geometry.heads, "k": geometry.groups, "v": geometry.groups}

    def get(name: str, *shape: int) -> Tensor:
        """One tensor of this layer on the device."""
        tensor = _checked(tensors, prefix(layer) + name, shape)
        return tensor.to(device, torch.promote_types(tensor.dtype, torch.float32))

    def bias(letter: str, *shape: int) -> Tensor | None:
        """A projection's bias, if it has one."""
        name = f"{letter}_proj.bias"
        return get(name, math.prod(shape)).view(shape) if prefix(layer) + name in tensors else None

    rows = {p: get(f"{p}_proj.weight", n * d, width).view(n, d, width) for p, n in counts.items()}
    biases = {p: bias(p, n, d) for p, n in counts.items()}
    columns = get("o_proj.weight", width, geometry.heads * d)
    return AttentionWeights(
        *rows.values(),
        columns.unflatten(1, (geometry.heads, d)).transpose(0, 1).contiguous(),
        *biases.values(),
        o_bias_D=bias("o", width),
        q_norm_d=get("q_norm.weight", d) if geometry.qk_norm else None,
        k_norm_d=get("k_norm.weight", d) if geometry.qk_norm else None,
        eps=config.get("rms_norm_eps", 1e-6),
        scaling=d**-0.5,
    )


def _checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that is there and has the shape that the configuration says."""
    if name not in tensors:
        raise InputError(f"checkpoint: there is no tensor {name}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"checkpoint: {name} has shape {tuple(tensor.shape)}, config.json says {shape}"
        )
    return tensor


def named(
    weights: AttentionWeights, layer: int, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the tensors by the names that transformers gives them, the inverse of :func:`read`.

    Args:
        weights: one layer.
        layer: counted from 0.
        dtype: what to store; None keeps the weights' own.
    """
    width = weights.o_HDd.shape[1]
    found = {
        "q_proj.weight": weights.q_HdD.reshape(-1, width),
        "k_proj.weight": weights.k_GdD.reshape(-1, width),
        "v_proj.weight": weights.v_GdD.reshape(-1, width),
        "o_proj.weight": weights.o_HDd.transpose(0, 1).reshape(width, -1),
        "q_proj.bias": weights.q_bias_Hd,
        "k_proj.bias": weights.k_bias_Gd,
        "v_proj.bias": weights.v_bias_Gd,
        "o_proj.bias": weights.o_bias_D,
        "q_norm.weight": weights.q_norm_d,
        "k_norm.weight": weights.k_norm_d,
    }
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    flat = {name: t.flatten() if name.endswith("bias") else t for name, t in kept.items()}
    return {prefix(layer) + name: t.to(dtype or t.dtype).contiguous() for name, t in flat.items()}


def affine(x_BTD: Tensor, rows_NdD: Tensor, bias_Nd: Tensor | None) -> Tensor:
    """Return x Wᵀ + b by head, shape (B, T, N, d)."""
    y_BTNd = (x_BTD @ rows_NdD.flatten(0, 1).T).unflatten(-1, rows_NdD.shape[:2])
    return y_BTNd if bias_Nd is None else y_BTNd + bias_Nd


def normalised(states_BTNd: Tensor, weight_d: Tensor | None, eps: float) -> Tensor:
    """Return w · x / sqrt(mean x² + eps) over a head's size; x itself where w is None."""
    if weight_d is None:
        return states_BTNd
    square = states_BTNd.square().mean(-1, keepdim=True)
    return states_BTNd * torch.rsqrt(square + eps) * weight_d


def rotated(states_BTNd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Return the states turned by their positions' angles (planes (m, m + d/2), as RoPE does)."""
    first, second = states_BTNd.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states_BTNd * cos_Td[:, None, :] + turned * sin_Td[:, None, :]


def attend(q_BTHd: Tensor, k_BTHd: Tensor, v_BTHd: Tensor, scaling: float) -> Tensor:
    """Return softmax(scaling · q kᵀ, causal) v by head, shape (B, T, H, d).

    One key/value head for all query heads (size 1) is expanded without a copy.
    """
    k_BTHd, v_BTHd = k_BTHd.expand_as(q_BTHd), v_BTHd.expand_as(q_BTHd)
    q, k, v = (states.transpose(1, 2) for states in (q_BTHd, k_BTHd, v_BTHd))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2)


def heads_output(
    weights: AttentionWeights, x_BTD: Tensor, cos_Td: Tensor, sin_Td: Tensor
) -> Tensor:
    """Return z_BTHd, what o_proj reads: the same as the stock model's on unpadded causal input.

    Args:
        weights: one layer, float32 or float64.
        x_BTD: after the layer's norm, of the weights' dtype and device.
        cos_Td, sin_Td: the rotary tables of the T positions, likewise.
    """
    q_BTHd = affine(x_BTD, weights.q_HdD, weights.q_bias_Hd)
    k_BTGd = affine(x_BTD, weights.k_GdD, weights.k_bias_Gd)
    v_BTGd = affine(x_BTD, weights.v_GdD, weights.v_bias_Gd)
    q_BTHd = rotated(normalised(q_BTHd, weights.q_norm_d, weights.eps), cos_Td, sin_Td)
    k_BTGd = rotated(normalised(k_BTGd, weights.k_norm_d, weights.eps), cos_Td, sin_Td)
    # repeated by hand: the GQA option has no memory-efficient kernel in float32 on a GPU
    k_BTHd, v_BTHd = (t.repeat_interleave(weights.per_group, 2) for t in (k_BTGd, v_BTGd))
    return attend(q_BTHd, k_BTHd, v_BTHd, weights.scaling)


def project(weights: AttentionWeights, z_BTHd: Tensor, bias: bool = True) -> Tensor:
    """Return the attention's output y_BTD = Σ_h z_h W_O,hᵀ (+ bias)."""
    width = weights.o_HDd.shape[1]
    y_BTD = z_BTHd.flatten(-2) @ weights.o_HDd.transpose(1, 2).reshape(-1, width)
    return y_BTD + weights.o_bias_D if bias and weights.o_bias_D is not None else y_BTD
