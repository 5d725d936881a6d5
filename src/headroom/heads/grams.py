"""Gram matrices of attention maps over heads, streamed: no map is ever held whole.

Shapes: B sequences a batch, S sequences a tile, T tokens, t query rows a tile or chunk, J key
columns a tile, c chunks, L layers, H query heads, G key/value heads, n = H / G, d head size,
K columns of a product, X = G·d, r = n·t, Y = c·G.

Cost of a causal sequence and layer, the floor of every pass: T²Hd FLOPs for the scores and T²H² for
the Gram (half of each above the diagonal is skipped), 4·T²H bytes written and twice read in cache.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Floats of one tile of maps: about what a core's share of the cache holds (2 MiB), and what keeps
# a GPU busy. Fewer rows waste less above the diagonal, more rows take fewer calls.
TILE_FLOATS = {"cpu": 1 << 19, "cuda": 1 << 26}
TILE_ROWS = {"cpu": (16, 64), "cuda": (64, 256)}
TRACE_FLOATS = 1 << 22  # of the prefix sums that the trace form holds at once
GRAM_COLUMNS = 4096  # a GPU sums long products in pieces of this length, side by side


class States(NamedTuple):
    """What one layer computed for a batch."""

    layer: int
    module: nn.Module
    q_BHTd: Tensor
    k_BGTd: Tensor
    z_BTHd: Tensor | None  # head outputs; None for Gaussian states
    causal: bool


class Gram:
    """Γ of one layer in float64. The sink's share is kept apart, so that nothing cancels.

    Under a causal mask the first key column holds all of the attention sink: of the first query
    row, only its first column is not masked.
    """

    def __init__(self, heads: int, device: torch.device):
        self.rest_HH = torch.zeros(heads, heads, dtype=torch.float64, device=device)
        self.sink_HH = torch.zeros_like(self.rest_HH)

    @property
    def full_HH(self) -> Tensor:
        """Γ with the sink."""
        return self.rest_HH + self.sink_HH


@dataclass
class Workspace:
    """Settings of a pass and what its tiles share."""

    tile: int | None = None
    form: str = "auto"
    tf32: bool = False
    buffer: Tensor | None = None
    masks: dict = field(default_factory=dict)
    output_grams: dict = field(default_factory=dict)

    def shape(self, states: States) -> tuple[int, int]:
        """Return S and t: the sequences and query rows of a tile."""
        B, H, T, _ = states.q_BHTd.shape
        kind = states.q_BHTd.device.type
        floats = TILE_FLOATS[kind]
        low, high = TILE_ROWS[kind]
        rows = self.tile or min(high, max(low, floats // (H * T) // 16 * 16))
        rows = min(rows, T)
        if kind == "cuda" and rows * T > GRAM_COLUMNS:
            return 1, rows  # `product` cuts a single sequence into pieces
        return max(1, min(B, floats // (H * rows * T))), rows

    def floats(self, count: int, like: Tensor) -> Tensor:
        """Return ``count`` float32 values of scratch memory, the same ones every time."""
        if self.buffer is None or self.buffer.numel() < count:
            self.buffer = torch.empty(count, dtype=torch.float32, device=like.device)
        return self.buffer[:count]

    def lower(self, rows: int, masked: float, like: Tensor) -> Tensor:
        """Return the t x t factor (masked = 0) or summand (masked = -inf) of the causal mask."""
        if (rows, masked) not in self.masks:
            ones_tt = torch.ones(rows, rows, device=like.device).tril_()
            self.masks[rows, masked] = ones_tt if masked == 0 else ones_tt.log_()
        return self.masks[rows, masked]


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Fix the precision of float32 matrix products inside the block, whatever is set outside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact(x: Tensor) -> AbstractContextManager:
    """Allow TF32 for products of what a GPU holds in half precision: ≤ 11 bits, nothing is lost."""
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    return precision(True) if half else nullcontext()


def product(x_SHK: Tensor) -> Tensor:
    """Return Σ_s x xᵀ (H, H) in float64, the matrix products in the tensor's own precision."""
    S, _, K = x_SHK.shape
    if x_SHK.is_cuda and S == 1 and K > GRAM_COLUMNS:
        whole = K // GRAM_COLUMNS * GRAM_COLUMNS
        pieces = x_SHK[0, :, :whole].unflatten(1, (-1, GRAM_COLUMNS)).transpose(0, 1)
        return _product(pieces) + _product(x_SHK[..., whole:])
    return _product(x_SHK)


def _product(x_SHK: Tensor) -> Tensor:
    return torch.bmm(x_SHK, x_SHK.transpose(1, 2)).sum(0, dtype=torch.float64)


def stream(
    states: States,
    gram: Gram,
    work: Workspace,
    function: Callable[[Tensor], Tensor],
    masked: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Add Σ f(scale·S_a) f(scale·S_b) of a batch, tile by tile: memory S·H·t·T, whatever B and T.

    Args:
        states: one layer's q and k; tiles above the diagonal are skipped where they are causal.
        gram: what is added to.
        work: settings and scratch memory.
        function: f; gets scores (S, H, t, J) of whole rows, may change them in place, and must
            return 0 for masked ones.
        masked: what f finds in place of masked scores: 0 or -inf.
        scale: multiplies the scores, at no cost.
    """
    B, H, T, _ = states.q_BHTd.shape
    sequences, rows = work.shape(states)
    for s in range(0, B, sequences):
        q_SHTd = states.q_BHTd[s : s + sequences].float()
        k_SGTd = states.k_BGTd[s : s + sequences].float().contiguous()
        S = len(q_SHTd)
        sink_SHT = q_SHTd.new_zeros(S, H, T)
        for i in range(0, T, rows):
            end = min(i + rows, T)
            J = end if states.causal else T
            with exact(states.q_BHTd):
                scores_SHtJ = _scores(q_SHTd[:, :, i:end], k_SGTd[:, :, :J], scale, work)
            if states.causal:
                diagonal_SHtt = scores_SHtJ[..., i:end]
                mask_tt = work.lower(end - i, masked, scores_SHtJ)
                diagonal_SHtt.mul_(mask_tt) if masked == 0 else diagonal_SHtt.add_(mask_tt)
            maps_SHtJ = function(scores_SHtJ)
            if states.causal:
                sink_SHT[:, :, i:end] = maps_SHtJ[..., 0]
                maps_SHtJ[..., 0] = 0
            gram.rest_HH += product(maps_SHtJ.flatten(2))
        gram.sink_HH += product(sink_SHT)


def _scores(q_SHtd: Tensor, k_SGJd: Tensor, scale: float, work: Workspace) -> Tensor:
    """Return scale · q kᵀ (S, H, t, J) in scratch memory; a group's heads share one product."""
    S, H, t, d = q_SHtd.shape
    _, G, J, _ = k_SGJd.shape
    out = work.floats(S * H * t * J, q_SHtd).view(S * G, H // G * t, J)
    k_XdJ = k_SGJd.reshape(S * G, J, d)  # no copy for one sequence
    q_Xrd = q_SHtd.reshape(S * G, -1, d)
    torch.baddbmm(out, q_Xrd, k_XdJ.transpose(1, 2), beta=0, alpha=scale, out=out)
    return out.view(S, H, t, J)


def trace(states: States, gram: Gram, work: Workspace) -> None:
    """Add the scores' Gram without making maps, by prefix sums over c chunks of t keys.

    Γ_ab = Σ_c tr(Q_a^c M^c_g(a)g(b) Q_b^cᵀ) + diagonal blocks, M^c_gh = Σ_(c' < c) K_g^c'ᵀ K_h^c'.
    Rotated q and k; one sequence at a time, because products of Grams don't add up over sequences.
    """
    B, H, T, d = states.q_BHTd.shape
    G = states.k_BGTd.shape[1]
    rows = min(work.tile or 64, T)
    block = rows * max(1, TRACE_FLOATS // (G * d) ** 2)
    for b in range(B):
        q_HTd = states.q_BHTd[b].float()
        k_GTd = states.k_BGTd[b].float().clone()
        sink_GnT = torch.einsum("gntd,gd->gnt", q_HTd.unflatten(0, (G, -1)), k_GTd[:, 0])
        gram.sink_HH += product(sink_GnT.reshape(1, H, T))
        k_GTd[:, 0] = 0
        past_XX = q_HTd.new_zeros(G * d, G * d)
        for i in range(0, T, block):
            q_cHtd, k_cGtd = (_chunks(x[:, i : i + block], rows) for x in (q_HTd, k_GTd))
            maps_cHtt = _scores(q_cHtd, k_cGtd, 1.0, work)
            maps_cHtt.mul_(work.lower(rows, 0.0, maps_cHtt))
            gram.rest_HH += product(maps_cHtt.flatten(2))
            k_ctX = k_cGtd.transpose(1, 2).flatten(2)
            sums_cXX = torch.bmm(k_ctX.transpose(1, 2), k_ctX)
            past_cXX = torch.cat([past_XX[None], sums_cXX[:-1]]).cumsum(0)
            past_XX = past_cXX[-1] + sums_cXX[-1]
            gram.rest_HH += _past(q_cHtd, past_cXX.unflatten(1, (G, d)))


def _chunks(x_HTd: Tensor, rows: int) -> Tensor:
    """Cut tokens into chunks (c, H, t, d), the last one filled up with zeros, which add nothing."""
    x_HTd = nn.functional.pad(x_HTd, (0, 0, 0, -x_HTd.shape[1] % rows))
    return x_HTd.unflatten(1, (-1, rows)).transpose(0, 1).contiguous()


def _past(q_cHtd: Tensor, past_cGdX: Tensor) -> Tensor:
    """Return Σ_c tr(Q_a M_g(a)g(b) Q_bᵀ) for all a, b (H, H): chunks against all keys before."""
    c, H, t, d = q_cHtd.shape
    G = past_cGdX.shape[1]
    q_Yrd = q_cHtd.reshape(c * G, -1, d)
    q_cGnr = q_cHtd.reshape(c, G, H // G, t * d)
    columns = []
    for h in range(G):
        past_Ydd = past_cGdX[..., h * d : (h + 1) * d].flatten(0, 1)
        moved_cHr = torch.bmm(q_Yrd, past_Ydd).view(c, H, t * d)
        columns.append(torch.bmm(moved_cHr, q_cGnr[:, h].transpose(1, 2)))
    return torch.cat(columns, 2).sum(0, dtype=torch.float64)
