"""Which attention heads copy one another: one H x H Gram matrix of attention maps a layer.

    Γ_ab = Σ_sequences Σ_(i,j in mask) f(S_a,ij) f(S_b,ij),  S_h = q_h k_g(h)ᵀ,  g(h) = ⌊h n⁻¹⌋
    similarity_ab = Γ_ab / √(Γ_aa Γ_bb)

Shapes: N windows, B sequences a batch, S sequences a tile, T tokens, t query rows a tile, J key
columns a tile, L layers, H query heads, G key/value heads, n = H / G, d head size, D model width,
X = H·d, Y = B·T.

A metric is a function ``(states, gram, work)`` that adds one layer's batch to its Gram, and an
entry in ``METRICS``; one that is elementwise or row by row calls ``stream`` with its f.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headroom.attention import attention_modules, check_family, check_model, stopping, tapped
from headroom.errors import InputError
from headroom.heads.grams import Gram, States, Workspace, exact, precision, stream, trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG2E = 1 / math.log(2)


def relu(states: States, gram: Gram, work: Workspace) -> None:
    """f = max(0, S): which keys a query agrees with. Any positive scale cancels in the cosine."""
    stream(states, gram, work, torch.relu_)


def softmax(states: States, gram: Gram, work: Workspace) -> None:
    """f = the attention probabilities themselves."""
    scale = states.module.scaling
    if states.q_BHTd.is_cuda:
        stream(states, gram, work, lambda s: torch.softmax(s, -1), -math.inf, scale)
        return
    longest_q, longest_k = (x.norm(dim=-1).max().item() for x in (states.q_BHTd, states.k_BGTd))
    # Cauchy-Schwarz: below this bound no exponential over- or underflows without its row's maximum.
    safe = longest_q * longest_k * scale * LOG2E < 100

    def probabilities(scores_SHtJ: Tensor) -> Tensor:
        if not safe:
            scores_SHtJ -= scores_SHtJ.amax(-1, keepdim=True)
        scores_SHtJ.exp2_()  # three times as fast as exp on a CPU
        return scores_SHtJ.mul_(scores_SHtJ.sum(-1, keepdim=True).reciprocal_())

    stream(states, gram, work, probabilities, -math.inf, scale * LOG2E)


def trace_pays(heads: int, groups: int, head_dim: int, length: int) -> bool:
    """Whether the trace form of causal ``scores`` takes fewer FLOPs than the direct form.

    A token costs 2HGd² + 2H²d + 2G²d² against T(Hd + H²).
    """
    H, G, d = heads, groups, head_dim
    return length * (H * d + H * H) > 2 * d * (H * G * d + H * H + G * G * d)


def scores(states: States, gram: Gram, work: Workspace) -> None:
    """f = identity, in the form (direct or trace) that takes fewer FLOPs."""
    _, H, T, d = states.q_BHTd.shape
    pays = trace_pays(H, states.k_BGTd.shape[1], d, T)
    if work.form == "trace" or (work.form == "auto" and pays):
        trace(states, gram, work)
    else:
        stream(states, gram, work, lambda s: s)


def output(states: States, gram: Gram, work: Workspace) -> None:
    """Cosine of the heads' contributions to the residual stream, z_h W_O,h.

    Γ_ab = Σ_tokens ⟨z_a W_a, z_b W_b⟩ = ⟨Z_aᵀ Z_b, W_a W_bᵀ⟩_F with W_h (d, D) of W_O's columns.
    """
    _, _, H, d = states.z_BTHd.shape
    if states.layer not in work.output_grams:
        weight_DX = states.module.o_proj.weight.float()
        work.output_grams[states.layer] = weight_DX.T @ weight_DX
    z_YX = states.z_BTHd.flatten(2).flatten(0, 1).float()
    with exact(states.z_BTHd):
        terms_XX = (z_YX.T @ z_YX).mul_(work.output_grams[states.layer])
    gram.rest_HH += terms_XX.view(H, d, H, d).sum((1, 3), dtype=torch.float64)


@dataclass(frozen=True)
class Metric:
    """A way to compare heads."""

    add: Callable[[States, Gram, Workspace], None]
    gaussian: bool = False  # states of random inputs instead of a corpus
    sink: bool = True  # also reported without the attention sink


METRICS: dict[str, Metric] = {
    "relu": Metric(relu),
    "relu_random": Metric(relu, gaussian=True, sink=False),
    "softmax": Metric(softmax),
    "scores": Metric(scores),
    "output": Metric(output, sink=False),
}


def similarity_pass(
    model: "PreTrainedModel",
    windows_NT: Tensor,
    metric: str,
    *,
    tile: int | None = None,
    batch: int = 8,
    form: str = "auto",
    tf32: bool = False,
    generator: torch.Generator | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict:
    """Return the Gram matrices of all layers from one forward pass over the windows.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 model in evaluation mode.
        windows_NT: token numbers without padding; ``relu_random`` takes only its shape.
        metric: a name of ``METRICS``.
        tile: query rows a tile; by default as many as the cache (or the GPU) likes.
        batch: sequences a forward pass; the result does not depend on it.
        form: of ``scores``: ``direct``, ``trace``, or ``auto`` for the one with fewer FLOPs.
        tf32: round to TF32 on a GPU (about 1e-3) also where it is not exact.
        generator: of ``relu_random``, on the CPU; by default seeded with 0.
        progress: wraps the iteration over batches (over layers for ``relu_random``).

    Returns:
        ``gram_LHH``, ``gram_nosink_LHH`` (only where the metric has it), both float64 on the CPU,
        ``tokens``, ``sequences``.

    Raises:
        InputError: for an unknown metric or family, a sliding window, values that are not finite.
    """
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is unknown (allowed: {', '.join(METRICS)})")
    entry = METRICS[metric]
    if entry.gaussian:  # no text, no positions: any length will do
        check_family(model)
    else:
        check_model(model, windows_NT.shape[1])
    work = Workspace(tile=tile, form=form, tf32=tf32)
    layers = len(attention_modules(model))
    grams = [Gram(model.config.num_attention_heads, model.device) for _ in range(layers)]
    with torch.no_grad():
        if entry.gaussian:
            generator = generator or torch.Generator().manual_seed(0)
            _gaussian_pass(model, windows_NT.shape, entry, grams, work, generator, progress)
        else:
            _corpus_pass(model, windows_NT.split(batch), entry, grams, work, progress)
    return _result(grams, entry, windows_NT)


def _corpus_pass(model, batches_BT, entry: Metric, grams, work: Workspace, progress) -> None:
    """Show the states of each layer to the metric while the model reads the batches."""
    modules = [module for _, module in attention_modules(model)]
    layer_of = {module: layer for layer, module in enumerate(modules)}

    def add(module, q_BHTd, k_BGTd, v_BGTd, z_BTHd):
        layer = layer_of[module]
        with precision(work.tf32):
            entry.add(States(layer, module, q_BHTd, k_BGTd, z_BTHd, True), grams[layer], work)
        if module is modules[-1]:
            stop()  # the rest of the last layer and the vocabulary are not needed

    with tapped(model, add):
        for tokens_BT in progress(batches_BT):
            with stopping() as stop:
                model.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)


def _gaussian_pass(
    model, shape, entry: Metric, grams, work: Workspace, generator, progress
) -> None:
    """Show Gaussian states to the metric: x ~ N(0, 1), q = x W_Qᵀ, k = x W_Kᵀ, all heads one x."""
    N, T = shape
    d = attention_modules(model)[0][1].head_dim
    for layer, (_, module) in enumerate(progress(attention_modules(model))):
        weights = [getattr(module, name).weight.float() for name in ("q_proj", "k_proj")]
        for _ in range(N):
            x_TD = torch.randn(T, weights[0].shape[1], generator=generator).to(model.device)
            q_BHTd, k_BGTd = (
                (x_TD @ weight.T).unflatten(1, (-1, d)).transpose(0, 1)[None] for weight in weights
            )
            with precision(work.tf32):
                entry.add(States(layer, module, q_BHTd, k_BGTd, None, False), grams[layer], work)


def _result(grams: list[Gram], entry: Metric, windows_NT: Tensor) -> dict:
    """Gather the layers' Gram matrices, exactly symmetric."""
    found = {"gram_LHH": torch.stack([gram.full_HH for gram in grams])}
    if entry.sink:
        found["gram_nosink_LHH"] = torch.stack([gram.rest_HH for gram in grams])
    for name, gram_LHH in found.items():
        if not gram_LHH.isfinite().all():
            layer = (~gram_LHH.isfinite()).flatten(1).any(1).nonzero()[0].item()
            raise InputError(f"layer {layer} of the checkpoint gives values that are not finite")
        found[name] = ((gram_LHH + gram_LHH.transpose(1, 2)) / 2).cpu()
    return {**found, "tokens": windows_NT.numel(), "sequences": len(windows_NT)}


def cosine(gram_LHH: Tensor) -> Tensor:
    """Return Γ_ab / √(Γ_aa Γ_bb) in float64 for Gram matrices (..., H, H).

    A head whose maps are all zero has similarity 0 to others; the diagonal is 1.
    """
    gram_LHH = gram_LHH.double()
    norm_LH = gram_LHH.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse_LH = torch.where(norm_LH > 0, 1 / norm_LH, 0.0)
    similarity_LHH = gram_LHH * (inverse_LH[..., :, None] * inverse_LH[..., None, :])
    similarity_LHH = similarity_LHH.clamp(-1, 1)
    similarity_LHH.diagonal(dim1=-2, dim2=-1).fill_(1)
    return similarity_LHH


def arccos_kernel(rho: Tensor) -> Tensor:
    """Return κ(ρ) = [√(1 − ρ²) + ρ(π − arccos ρ)] / π, what ``relu_random`` tends to as d → ∞.

    ρ_ab is the cosine of M_a and M_b, M_h = W_Q,hᵀ W_K,g(h). Cho and Saul 2009, arc-cosine kernel
    of order 1. κ(0) = 1/π: heads that have nothing in common.
    """
    rho = torch.as_tensor(rho, dtype=torch.float64).clamp(-1, 1)
    return ((1 - rho**2).sqrt() + rho * (math.pi - rho.arccos())) / math.pi
