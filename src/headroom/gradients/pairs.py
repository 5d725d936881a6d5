"""What retrieval looks at: dot products and norms of queries with their candidates, by layer.

Shapes: L layers, Q queries, N originals, C candidates a query.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headroom.errors import InputError
from headroom.gradients.dots import Dots

COMPONENTS = (
    *("embed", "position", "q", "k", "v", "qkv", "o", "gate", "up", "down"),
    *("norm", "bias", "head", "other"),
)
MODULES = {
    "embed_tokens": "embed",
    "embed_in": "embed",
    "wte": "embed",
    "wpe": "position",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "c_attn": "qkv",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "c_fc": "up",
    "dense_h_to_4h": "up",
    "down_proj": "down",
    "dense_4h_to_h": "down",
    "lm_head": "head",
    "embed_out": "head",
}
FULL = ("full", "full")


@dataclass(frozen=True)
class Pairs:
    """A pool of candidates for each query, with dot products by layer and squared norms."""

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    queries: tuple[str, ...]
    originals: tuple[str, ...]
    dot_LQC: np.ndarray
    query_LQ: np.ndarray
    original_LN: np.ndarray
    candidate_QC: np.ndarray  # int, place among the originals
    truth_Q: np.ndarray  # place among the query's candidates; −1 where the truth is not in the pool

    def __post_init__(self):
        L, Q, N = len(self.layers), len(self.queries), len(self.originals)
        C = self.candidate_QC.shape[1]
        shapes = (self.dot_LQC.shape, self.query_LQ.shape, self.original_LN.shape)
        places = (self.candidate_QC.shape, self.truth_Q.shape)
        if shapes != ((L, Q, C), (L, Q), (L, N)) or places != ((Q, C), (Q,)):
            raise ValueError(f"{L} layers, {Q} queries, {N} originals; shapes {shapes}, {places}")

    @property
    def shared_pool(self) -> bool:
        """Return whether every query has all originals as its candidates, in the same order."""
        every = np.arange(len(self.originals))
        same = self.candidate_QC.shape[1] == len(every)
        return bool(same and (self.candidate_QC == every).all())


def truths(queries: Sequence[str], originals: Sequence[str]) -> np.ndarray:
    """Return each query's place among the originals: that of the same id; −1 without one, (Q,).

    Raises:
        InputError: if an id comes twice.
    """
    for name, ids in (("queries", queries), ("originals", originals)):
        twice = len(ids) - len({*ids})
        if twice:
            raise InputError(f"{twice} ids of the {name} come twice (allowed: each id once)")
    place = {name: index for index, name in enumerate(originals)}
    return np.array([place.get(name, -1) for name in queries], dtype=np.int64)


def from_dots(dots: Dots, candidate_QC: np.ndarray | None = None) -> Pairs:
    """Return the pairs of a result.

    Args:
        dots: all queries with all originals.
        candidate_QC: places among the originals, no place twice in a row; None: all originals.

    Raises:
        InputError: if an id comes twice.
    """
    truth_Q = truths(dots.queries, dots.originals)
    Q, N = len(dots.queries), len(dots.originals)
    if candidate_QC is None:
        candidate_QC = np.broadcast_to(np.arange(N), (Q, N))
        dot_LQC = dots.dot_LQN
    else:
        dot_LQC = np.empty((len(dots.layers), *candidate_QC.shape), dots.dot_LQN.dtype)
        for layer, dot_QN in enumerate(dots.dot_LQN):
            dot_LQC[layer] = np.take_along_axis(dot_QN, candidate_QC, axis=1)
        truth_Q = places_in(candidate_QC, truth_Q)
    names = (dots.layers, dots.sizes, dots.queries, dots.originals)
    return Pairs(*names, dot_LQC, dots.query_LQ, dots.original_LN, candidate_QC, truth_Q)


def places_in(candidate_QC: np.ndarray, truth_Q: np.ndarray) -> np.ndarray:
    """Return where each query's truth lies among its candidates, −1 where it does not, (Q,)."""
    found_QC = (candidate_QC == truth_Q[:, None]) & (truth_Q[:, None] >= 0)
    return np.where(found_QC.any(1), found_QC.argmax(1), -1)


def similarity(pairs: Pairs, layers: Sequence[int] | None = None) -> np.ndarray:
    """Cosine of the concatenation of layers: Σ_l dot / √(Σ_l ‖q‖² Σ_l ‖o‖²), 0 where a norm is 0.

    Args:
        pairs: of queries with candidates.
        layers: places of layers; None: all.

    Returns:
        float64 (Q, C).

    Raises:
        InputError: if a value is not finite.
    """
    layers = range(len(pairs.layers)) if layers is None else layers
    if not len(layers):
        raise ValueError("a similarity needs at least one layer")
    dot_QC = np.zeros(pairs.candidate_QC.shape)
    query_Q, original_N = np.zeros(len(pairs.queries)), np.zeros(len(pairs.originals))
    for layer in layers:  # one at a time: (L, Q, C) in float64 would not fit
        dot_QC += pairs.dot_LQC[layer]
        query_Q += pairs.query_LQ[layer]
        original_N += pairs.original_LN[layer]
    found_QC = cosine(dot_QC, query_Q, original_N[pairs.candidate_QC])
    if not np.isfinite(found_QC).all():
        names = ", ".join(pairs.layers[layer] for layer in layers[:3])
        raise InputError(f"dot products or norms of {names} are not finite: measure them anew")
    return found_QC


def cosine(dot_QC: np.ndarray, query_Q: np.ndarray, original_QC: np.ndarray) -> np.ndarray:
    """Return dot / √(‖q‖² ‖o‖²), 0 where a norm is 0; the norms are squared."""
    # Roots before the product: squares of squares leave the range of float64.
    scale_QC = np.sqrt(np.maximum(original_QC, 0))
    scale_QC *= np.sqrt(np.maximum(query_Q, 0))[:, None]
    return np.divide(dot_QC, scale_QC, out=np.zeros(dot_QC.shape), where=scale_QC != 0)


def component(name: str) -> str:
    """Return what a parameter does in its block, one of ``COMPONENTS``; any bias is ``bias``."""
    parts = name.split(".")
    if parts[-1] == "bias":
        return "bias"
    if parts[-1] == "weight" and len(parts) > 1:
        parts = parts[:-1]
    module, parent = parts[-1], parts[-2] if len(parts) > 1 else ""
    if module in MODULES:
        return MODULES[module]
    if module == "c_proj":  # GPT-2 names both output projections so
        return "o" if "attn" in parent else "down"
    if module == "dense" and "attention" in parent:
        return "o"
    if "norm" in module or re.match(r"ln(_|\d|$)", module):
        return "norm"
    return "other"


def block(name: str) -> int | None:
    """Return the decoder layer's number in a parameter's name, None outside of the layers."""
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.", name)
    return int(found[1]) if found else None


def groups(pairs: Pairs) -> dict[tuple[str, str], list[int]]:
    """Return places of layers by (kind, name): full, then components, then blocks.

    Kinds are ``full``, ``component`` and ``block``; what lies in no block is in no block's group.
    """
    found: dict[tuple[str, str], list[int]] = {FULL: list(range(len(pairs.layers)))}
    kinds = [component(name) for name in pairs.layers]
    for kind in COMPONENTS:
        places = [place for place, own in enumerate(kinds) if own == kind]
        if places:
            found["component", kind] = places
    blocks = [block(name) for name in pairs.layers]
    for number in sorted({own for own in blocks if own is not None}):
        found["block", str(number)] = [p for p, own in enumerate(blocks) if own == number]
    return found
