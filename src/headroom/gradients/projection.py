"""Random projections of gradients that keep dot products in expectation, and their errors.

A projector belongs to a parameter: it hangs on a seed and the SHA-256 of the parameter's name, so
every process, partition and machine projects alike. Each block is scaled by its own 1/√k: left out,
blocks of unequal k would weigh by their size, and the cosine of the concatenation with them.

Shapes: n samples, p elements of a parameter, k dimensions of its projection.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

ROWS = 1 << 9  # of a projector drawn at a time: at k = 1024, 2 MB, which a cache holds
SIGNS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) * np.float32(2) - 1


def project(gradient_np: Tensor, name: str, dimension: int, seed: int) -> Tensor:
    """Return g P / √k with P of independent signs (Rademacher), or g itself where k ≥ p.

    E⟨gP, hP⟩/k = ⟨g, h⟩, with variance ≤ (‖g‖²‖h‖² + ⟨g, h⟩²)/k.
    Source: Achlioptas 2003, JCSS 66:671.
    """
    n, p = gradient_np.shape
    if dimension >= p:
        return gradient_np
    total_nk = gradient_np.new_zeros(n, dimension)
    for start, signs_rk in _signs(name, p, dimension, seed):
        part_nr = gradient_np[:, start : start + len(signs_rk)]
        total_nk += part_nr @ torch.from_numpy(signs_rk).to(part_nr)
    return total_nk / dimension**0.5


def _signs(name: str, p: int, dimension: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield rows of ±1, ROWS at a time, each block from a stream of its own.

    The next block overwrites the last one.
    """
    eights = np.empty((-(-ROWS * dimension // 8), 8), np.float32)
    for block, start in enumerate(range(0, p, ROWS)):
        rows = min(ROWS, p - start)
        count = -(-rows * dimension // 8)
        rng = np.random.Generator(np.random.SFC64(_entropy(name, seed, block)))
        drawn = np.frombuffer(rng.bytes(count), np.uint8)
        # A byte is eight signs by a table: what costs is to write them, not to draw them.
        np.take(SIGNS, drawn, axis=0, out=eights[:count], mode="clip")
        yield start, eights.reshape(-1)[: rows * dimension].reshape(rows, dimension)


@lru_cache(maxsize=1024)
def gaussian(name: str, size: int, dimension: int, seed: int) -> Tensor:
    """Return a (size, k) matrix of N(0, 1/k), in float64; used for one side of a layer."""
    rng = np.random.Generator(np.random.PCG64(_entropy(name, seed, 0)))
    return torch.from_numpy(rng.standard_normal((size, dimension)) / dimension**0.5)


def _entropy(name: str, seed: int, block: int) -> int:
    """A seed of 256 bits that is the same in every process (``hash`` of a text is not)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{block}/{name}".encode()).digest(), "big")


def projected_error(
    query_QL: np.ndarray, original_NL: np.ndarray, dimension_L: np.ndarray, exact_L: np.ndarray
) -> float:
    """Return the rms error of projected cosines, were all pairs orthogonal.

    Of a pair √(Σ_l ‖g_l‖²‖h_l‖²/k_l) / (‖g‖ ‖h‖), 1/√k for one block; at a cosine ρ about (1 − ρ²)
    times that.

    Args:
        query_QL, original_NL: squared norms by layer.
        dimension_L: k by layer.
        exact_L: layers that are kept whole (k ≥ p) and add no error.
    """
    weight_L = np.where(exact_L, 0.0, 1 / dimension_L)
    sides = np.atleast_2d(query_QL), np.atleast_2d(original_NL)
    shares = [part / part.sum(1, keepdims=True) for part in sides]
    return float(np.sqrt(((shares[0] * weight_L) @ shares[1].T).mean()))


def two_sided_variance(concentration: float, inner: int | None, outer: int | None) -> float:
    """Return the relative variance of ‖P_oᵀ G P_i‖² for Gaussian sides.

    2τ(1/k_i + 1/k_o) + 2(1 + τ)/(k_i k_o), τ = ‖GGᵀ‖²_F / ‖G‖⁴_F in [1/rank, 1]; a side that is
    kept whole (None) is k = ∞.
    """
    inner_part = 0.0 if inner is None else 1 / inner
    outer_part = 0.0 if outer is None else 1 / outer
    both = inner_part * outer_part
    return 2 * concentration * (inner_part + outer_part) + 2 * (1 + concentration) * both


def concentration(gradient_noi: Tensor) -> Tensor:
    """Return τ = ‖GGᵀ‖²_F / ‖G‖⁴_F of each matrix: 1/r for r equal singular values."""
    wide_noi = gradient_noi.double()
    if wide_noi.shape[1] > wide_noi.shape[2]:
        wide_noi = wide_noi.mT
    gram_noo = wide_noi @ wide_noi.mT
    return gram_noo.square().sum((1, 2)) / gram_noo.diagonal(dim1=1, dim2=2).sum(1).square()
