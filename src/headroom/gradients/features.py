"""What is kept of a sample's gradient, and dot products of it: one function a backend.

A feature is a matrix (n, k) whose rows' dot products are (or estimate) those of the gradients, or
the uses themselves, from which dots are taken without forming a gradient.

Shapes: n, m samples, o and i rows and columns of a parameter, p = o·i.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headroom.gradients.projection import gaussian, project
from headroom.gradients.uses import (
    Lookup,
    Outer,
    Uses,
    Vector,
    dense_dots,
    dense_squares,
    ghost_dots,
    ghost_squares,
    is_vector,
    materialise,
    wide,
)

Features = Tensor | Uses


class Parameter(NamedTuple):
    """What a backend is told about a layer."""

    name: str
    shape: tuple[int, ...]


# A backend: (parameter, its uses, config section gradients) -> features.
Backend = Callable[[Parameter, Uses, Mapping], Features]


def exact(parameter: Parameter, uses: Uses, settings: Mapping) -> Features:
    """Return the gradients themselves: (n, p)."""
    return materialise(uses, parameter.shape)


def ghost(parameter: Parameter, uses: Uses, settings: Mapping) -> Features:
    """Return inputs and output gradients; what is short, or written out anyway, is written out."""
    return materialise(uses, parameter.shape) if is_vector(uses) else uses


def projection(parameter: Parameter, uses: Uses, settings: Mapping) -> Features:
    """Return g P/√k with random signs: (n, k), or the gradient where it is no longer than k."""
    own = settings["projection"]
    gradient_np = materialise(uses, parameter.shape)
    return project(gradient_np, parameter.name, own["dimension"], own["seed"])


def two_sided(parameter: Parameter, uses: Uses, settings: Mapping) -> Features:
    """Return (B P_o)ᵀ(A P_i), as LoGra does (Choe et al. 2024, arXiv:2405.13954): (n, k_o·k_i).

    A side no longer than its k is kept whole; biases and norms are kept as they are.
    """
    if is_vector(uses):
        return materialise(uses, parameter.shape)
    own = settings["two_sided"]
    sides, shape = [], []
    for side, size in zip(("outer", "inner"), parameter.shape, strict=True):
        kept = min(own[side], size)
        name = f"{parameter.name}/{side}"
        sides.append(None if kept == size else gaussian(name, size, kept, own["seed"]))
        shape.append(kept)
    return materialise(tuple(_thinned(use, *sides) for use in uses), shape)


def _thinned(use: Outer | Lookup | Vector, outer: Tensor | None, inner: Tensor | None):
    right = use[1] if inner is None else _project(use[1], inner)
    if isinstance(use, Outer):
        return Outer(use.left_nTo if outer is None else _project(use.left_nTo, outer), right)
    if outer is None:
        return Lookup(use[0], right)
    return Outer(outer.to(right)[use[0]], right)


def _project(values: Tensor, side: Tensor) -> Tensor:
    values = wide(values)
    return values @ side.to(values)


FEATURES: dict[str, Backend] = {
    "exact": exact,
    "ghost": ghost,
    "projection": projection,
    "two_sided": two_sided,
}


def dots(first: Features, second: Features) -> Tensor:
    """Return the dot products of two batches' features: (n, m) in float64."""
    if isinstance(first, Tensor):
        return dense_dots(first, second)
    return ghost_dots(first, second)


def squares(features: Features) -> Tensor:
    """Return the squared norms of a batch's features: (n,) in float64."""
    return dense_squares(features) if isinstance(features, Tensor) else ghost_squares(features)


def concatenated(parts: Sequence[Features]) -> Features:
    """Return the features of several batches as one batch's; shorter samples get rows of zeros."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    longest = max(part[0][1].shape[1] for part in parts)
    return tuple(
        type(use)(*(_stacked([part[place][side] for part in parts], longest) for side in (0, 1)))
        for place, use in enumerate(first)
    )


def _stacked(tensors: list[Tensor], length: int) -> Tensor:
    padded = [
        torch.nn.functional.pad(t, (0,) * (2 * (t.dim() - 2)) + (0, length - t.shape[1]))
        for t in tensors
    ]
    return torch.cat(padded)


def packed(name: str, features: Features) -> dict[str, Tensor]:
    """Return features as named tensors, to be stored."""
    if isinstance(features, Tensor):
        return {name: features.contiguous()}
    return {
        f"{name}#{place}.{type(use).__name__}.{side}": part.clone(
            memory_format=torch.contiguous_format
        )  # layers that read the same share it, files don't
        for place, use in enumerate(features)
        for side, part in zip(use._fields, use, strict=True)
    }


def unpacked(name: str, tensors: Mapping[str, Tensor]) -> Features | None:
    """Return a layer's features from named tensors; None where it has none."""
    if name in tensors:
        return tensors[name]
    found: dict[str, list[Tensor]] = {}
    for key in sorted(key for key in tensors if key.startswith(f"{name}#")):
        found.setdefault(key.rpartition(".")[0], []).append(tensors[key])
    kinds = {"Outer": Outer, "Lookup": Lookup}
    # Fields in alphabetical order are those of the tuples: index or left, then right.
    return tuple(kinds[key.rpartition(".")[2]](*parts) for key, parts in found.items()) or None
