"""How one parameter's gradient is made of activations, sample by sample.

A linear layer's gradient is Σ_t b_t a_tᵀ with its inputs a and its outputs' gradients b; an
embedding's has rows of b at the tokens it looked up; a norm's or a bias' is short enough to be
written out. A parameter that is used more than once (tied embeddings) has several uses, and its
gradient is their sum. Keeping the parts apart allows dot products without ever forming a gradient.

Shapes: n, m samples, T, S tokens, o and i rows and columns of the parameter, p = o·i.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

SCRATCH = 1 << 20  # elements of a block of token pairs; about what a core's cache holds
SHORT = 1 << 11  # elements whose squares are summed in their own precision
COLUMNS = 1 << 11  # of a product in the features' own precision before it is added in float64


class Outer(NamedTuple):
    """G = Σ_t left_t right_tᵀ: a linear layer (nn.Linear: left = b, right = a)."""

    left_nTo: Tensor
    right_nTi: Tensor


class Lookup(NamedTuple):
    """G[index_t] += right_t: an embedding."""

    index_nT: Tensor
    right_nTi: Tensor


class Vector(NamedTuple):
    """G itself: of a bias or a norm."""

    value_np: Tensor


Use = Outer | Lookup | Vector
Uses = tuple[Use, ...]


def materialise(uses: Uses, shape: Sequence[int]) -> Tensor:
    """Return the gradients (n, p) that uses of a parameter of this shape add up to.

    bfloat16 and float16 are multiplied as float32.
    """
    outers = [use for use in uses if isinstance(use, Outer)]
    total_np = _outer(outers[0]) if outers else None
    for use in outers[1:]:
        total_np += _outer(use)
    for use in uses:
        if isinstance(use, Vector):
            value_np = wide(use.value_np).flatten(1)
            total_np = value_np if total_np is None else total_np.add_(value_np)
        elif isinstance(use, Lookup):
            total_np = _add_rows(total_np, use, shape[0])
    return total_np


def _outer(use: Outer) -> Tensor:
    return torch.bmm(wide(use.left_nTo).mT, wide(use.right_nTi)).flatten(1)


def _add_rows(total_np: Tensor | None, use: Lookup, rows: int) -> Tensor:
    """Add an embedding's gradient in place: a table for each sample is large."""
    right_nTi = wide(use.right_nTi)
    n, T, i = right_nTi.shape
    if total_np is None:
        total_np = right_nTi.new_zeros(n, rows * i)
    place_nT = use.index_nT + torch.arange(n, device=total_np.device)[:, None] * rows
    total_np.view(n * rows, i).index_add_(0, place_nT.flatten(), right_nTi.reshape(n * T, i))
    return total_np


def is_vector(uses: Uses) -> bool:
    """Whether a part of the gradient is already written out, so that the rest may as well be."""
    return any(isinstance(use, Vector) for use in uses)


def dense_dots(first_np: Tensor, second_mp: Tensor) -> Tensor:
    """Return ⟨g_i, h_j⟩ of written-out gradients: (n, m) in float64.

    Products of column blocks in the gradients' own precision, summed in float64, so that the error
    doesn't grow with the size of the parameter.
    """
    total_nm = torch.zeros(len(first_np), len(second_mp), dtype=torch.float64)
    total_nm = total_nm.to(first_np.device)
    for start in range(0, first_np.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        total_nm += first_np[:, columns] @ second_mp[:, columns].T
    return total_nm


def ghost_dots(first: Uses, second: Uses) -> Tensor:
    """Return ⟨G_i, H_j⟩ = Σ_t,s (left_it · left_js)(right_it · right_js): (n, m) in float64.

    No gradient is formed. Token pairs are worked off in blocks that fit a cache.

    Source: Goodfellow 2015 (arXiv:1510.01799) for norms, here between samples.
    """
    return sum(_ghost(a, b) for a, b in product(first, second))


def ghost_squares(uses: Uses) -> Tensor:
    """Return ‖G_i‖² of each sample by the same sums: (n,) in float64."""
    T = max(use[1].shape[1] for use in uses)
    found = []
    for rows in _chunks(len(uses[0][0]), max(1, SCRATCH // T**2)):
        some = [type(use)(*(part[rows] for part in use)) for use in uses]
        found.append(sum(_own_dots(first, second) for first, second in product(some, some)))
    return torch.cat(found)


def _own_dots(first: Outer | Lookup, second: Outer | Lookup) -> Tensor:
    """Dots of each sample's use with its own other use: (n,) in float64."""
    pairs_nTS = torch.bmm(wide(first[1]), wide(second[1]).mT)
    pairs_nTS *= _own_lefts(first, second)
    return pairs_nTS.sum(2).sum(1, dtype=torch.float64)


def _own_lefts(first: Outer | Lookup, second: Outer | Lookup) -> Tensor:
    """As :func:`_lefts`, of tokens of the same sample: (n, T, S)."""
    own, other = first[0], second[0]
    if isinstance(first, Outer) and isinstance(second, Outer):
        return torch.bmm(wide(own), wide(other).mT)
    if isinstance(first, Outer):
        return wide(own).gather(2, other[:, None].expand(-1, own.shape[1], -1))
    if isinstance(second, Outer):
        return _own_lefts(second, first).mT
    return own[:, :, None] == other[:, None]


def dense_squares(gradient_np: Tensor) -> Tensor:
    """Return ‖g_i‖² of written-out gradients: (n,) in float64."""
    whole = gradient_np.shape[1] // SHORT * SHORT
    # No wider copy of the gradient: sums of short pieces lose next to nothing.
    pieces = gradient_np[:, :whole].unflatten(1, (-1, SHORT)), gradient_np[:, whole:]
    norms = (torch.linalg.vector_norm(piece, dim=-1).double().square() for piece in pieces)
    return next(norms).sum(1) + next(norms)


def _ghost(first: Outer | Lookup, second: Outer | Lookup) -> Tensor:
    n, T = first[1].shape[:2]
    m, S = second[1].shape[:2]
    if isinstance(first, Lookup) and isinstance(second, Outer):
        return _ghost(second, first).T
    left_mSo, right_mSi = second[0].flatten(0, 1), wide(second[1]).flatten(0, 1)
    found = []
    for rows in _chunks(n, max(1, SCRATCH // max(1, T * m * S))):
        pairs = wide(first[1][rows]).flatten(0, 1) @ right_mSi.T  # (rows·T, m·S)
        pairs *= _lefts(first, second, rows, left_mSo)
        sums = pairs.view(-1, T, m, S).sum(3).sum(1, dtype=torch.float64)
        found.append(sums)
    return torch.cat(found)


def _lefts(first: Outer | Lookup, second: Outer | Lookup, rows: slice, left_mSo: Tensor) -> Tensor:
    """Products of the left sides of all token pairs: a dot, one element, or whether equal."""
    own = first[0][rows].flatten(0, 1)
    if isinstance(first, Lookup):
        return own[:, None] == left_mSo[None]
    if isinstance(second, Lookup):
        return wide(own)[:, left_mSo]
    return wide(own) @ wide(left_mSo).T


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor, as float32 where it is narrower."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
