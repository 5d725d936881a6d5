"""What two losses' gradients say about FFN channels: first-order and weight-level statistics.

Shapes: N windows, T tokens a window, D model width, n FFN channels, V vocabulary. The 3 matrices of
a channel are always in the order down, up, gate.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from headroom.checkpoints import geometry, load_model, read_config
from headroom.errors import InputError
from headroom.ffn.observe import calibration_windows
from headroom.progress import progress

KINDS = ("fo", "snip")
STATISTICS = (
    "channel",
    "channel_abs",
    "mean",
    "max",
    "std",
    "p95",
    "consistency",
    "structural",
    "mutual",
    "important_ratio",
)
ENTRIES = 2**26  # of a correlation matrix, or sorted at once: 256 MiB in float32

# What gets a layer's saliencies: (layer, kind, S_n3D) -> None. S is not kept after the call.
Receive = Callable[[int, str, Tensor], None]


def measure_gradients(checkpoint: str, tokens: str, seed: int, settings: dict, output: str) -> None:
    """Write every layer's channel statistics of a checkpoint, ``{layer}.{kind}.{statistic}``.

    Args:
        checkpoint: its folder.
        tokens: a token stream of the calibration split.
        seed: draws the windows.
        settings: ``compute`` and ``ffn.calibration`` of the configuration.
        output: the safetensors file to write.

    Raises:
        InputError: for a family that is not served, or gradients that are not finite.
    """
    from safetensors.torch import save_file

    geometry(read_config(checkpoint), f"checkpoint {Path(checkpoint).name}")
    compute, calibration = settings["compute"], settings["ffn"]["calibration"]
    torch.set_num_threads(compute["threads"])
    windows_NT = calibration_windows(
        tokens, calibration["window"], calibration["gradient_sequences"], seed
    )
    found = channel_statistics(
        load_model(checkpoint, compute["device"], compute["dtype"]),
        windows_NT,
        progress=lambda items: progress(items, "gradients", unit="window"),
    )
    save_file(
        {f"{layer}.{name}": value_n for layer, part in enumerate(found)
         for name, value_n in part.items()},
        output,
    )  # fmt: skip


def channel_statistics(
    model: nn.Module,
    windows_NT: Tensor,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> list[dict[str, Tensor]]:
    """Return each layer's statistics of W∘∂L/∂W for both losses, as means over windows.

    A window is one batch, and a figure is the mean of the windows' own (so is an absolute value:
    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning").

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal language model in evaluation mode.
        windows_NT: token numbers without padding.
        progress: wraps the windows, one at a time.

    Returns:
        One dictionary a layer: ``{kind}.{statistic}`` of ``KINDS`` and ``STATISTICS``, float64 (n,)
        on the CPU.

    Raises:
        InputError: if a gradient is not finite.
    """
    sums: list[dict[str, Tensor]] = [{} for _ in model.base_model.layers]

    def add(layer: int, kind: str, S_n3D: Tensor) -> None:
        if not S_n3D.isfinite().all():
            raise InputError(
                f"the checkpoint gives gradients that are not finite on the calibration text "
                f"(layer {layer}, {kind})"
            )
        for name, value_n in weight_statistics(S_n3D).items():
            value_n, key = value_n.double().cpu(), f"{kind}.{name}"
            sums[layer][key] = sums[layer][key] + value_n if key in sums[layer] else value_n

    for tokens_1T in progress(windows_NT.split(1)):
        visit_saliencies(model, tokens_1T, add)
    return [
        {name: value_n / len(windows_NT) for name, value_n in sorted(part.items())} for part in sums
    ]


def visit_saliencies(model: nn.Module, tokens_1T: Tensor, receive: Receive) -> None:
    """Give ``receive`` each layer's S = W∘∂L/∂W for both losses of one sequence.

    S_n3D holds a channel's down column, up row and gate row, in float32 at least. One forward pass
    and two backward passes; weight gradients live for one layer at a time. The losses are "fo", the
    sum over decoder layers of :func:`mean_singular_value` of their outputs, and "snip",
    :func:`next_token_loss`. The model is left as it was.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal language model in evaluation mode.
        tokens_1T: token numbers without padding.
        receive: called as ``receive(layer, kind, S_n3D)``, the last layer first.
    """
    kind = ""
    outputs: list[Tensor] = []

    def take(layer: int, S_n3D: Tensor) -> None:
        receive(layer, kind, S_n3D)

    with torch.enable_grad(), _frozen(model), ExitStack() as hooks:
        for layer, module in enumerate(model.base_model.layers):
            handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
            hooks.callback(handle.remove)
            _tap(hooks, layer, module.mlp, take)
        tokens_1T = tokens_1T.to(model.device)
        # No parameter wants a gradient, so the graph has to start at the embeddings.
        x_1TD = model.get_input_embeddings()(tokens_1T).detach().requires_grad_()
        logits_1TV = model(inputs_embeds=x_1TD, use_cache=False).logits
        kind = "fo"
        total = torch.stack([mean_singular_value(Y_BTD) for Y_BTD in outputs]).sum()
        torch.autograd.grad(total, x_1TD, retain_graph=True)
        kind = "snip"
        torch.autograd.grad(next_token_loss(logits_1TV, tokens_1T), x_1TD)


def mean_singular_value(Y_BTD: Tensor) -> Tensor:
    """Return the mean singular value of a batch of one, reshaped to (1, T·D): ‖Y‖_F.

    A matrix of one row has one singular value, its Euclidean norm, so no decomposition is needed.
    Computed in float32 at least.

    Raises:
        ValueError: for a batch of several, where the two differ.
    """
    if len(Y_BTD) != 1:
        raise ValueError(f"a batch of {len(Y_BTD)} (allowed: 1)")
    return torch.linalg.vector_norm(Y_BTD, dtype=_wide(Y_BTD))


def next_token_loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Return the mean cross entropy (nats) of each token given those before it.

    It is what ``model(input_ids, labels=input_ids).loss`` is, except that float64 stays float64.
    """
    logits_BTV = logits_BTV[:, :-1].to(_wide(logits_BTV))
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


@torch.no_grad()
def weight_statistics(S_n3D: Tensor) -> dict[str, Tensor]:
    """Return the ``STATISTICS`` of one layer's S = W∘∂L/∂W, (n,) each.

    - channel: (1/D) Σ_j Σ_m S_cmj, signed; channel_abs: its absolute value
    - mean, max (signed), std (unbiased), p95 (linear quantile) of a channel's 3·D entries
    - consistency: −mean_j of the unbiased std over the three matrices
    - structural: the largest singular value of the 3×D slice
    - mutual: mean over the other channels of |Pearson correlation| of the 3·D entries
    - important_ratio: share of a channel's entries above the layer's mean + (unbiased) std
    """
    S_nM = S_n3D.flatten(1)
    mean_n = S_nM.mean(1)
    threshold = S_nM.mean() + S_nM.std()
    return {
        "channel": 3 * mean_n,
        "channel_abs": 3 * mean_n.abs(),
        "mean": mean_n,
        "max": S_nM.amax(1),
        "std": S_nM.std(1),
        "p95": _quantile(S_nM, 0.95),
        "consistency": -S_n3D.std(1).mean(1),
        "structural": _largest_singular_value(S_n3D),
        "mutual": _mutual(S_nM),
        "important_ratio": (S_nM > threshold).double().mean(1),
    }


def _largest_singular_value(S_n3D: Tensor) -> Tensor:
    """Return √λ_max(S_c S_cᵀ): a 3×3 Gram a channel in place of a decomposition of 3×D."""
    gram_n33 = (S_n3D @ S_n3D.mT).double()
    return torch.linalg.eigvalsh(gram_n33)[:, -1].clamp(min=0).sqrt()


def _quantile(S_nM: Tensor, share: float) -> Tensor:
    """Return the linear quantile of each row, by selection: ``torch.quantile`` refuses 2^24."""
    place = share * (S_nM.shape[1] - 1)
    below = int(place)
    parts = []
    for part_nM in S_nM.split(max(1, ENTRIES // S_nM.shape[1])):
        low_n = part_nM.kthvalue(below + 1).values
        high_n = part_nM.kthvalue(min(below + 2, S_nM.shape[1])).values
        parts.append(low_n.lerp(high_n, place - below))
    return torch.cat(parts)


def _mutual(S_nM: Tensor) -> Tensor:
    """Return each row's mean |correlation| with the others; a constant row correlates with none."""
    n, M = S_nM.shape
    # A nearly dead channel's squares would underflow, so each row is first brought to a peak of 1.
    peak_n1 = torch.linalg.vector_norm(S_nM, math.inf, dim=1, keepdim=True)
    Z_nM = S_nM / torch.where(peak_n1 > 0, peak_n1, 1)
    Z_nM -= Z_nM.mean(1, keepdim=True)
    norm_n1 = torch.linalg.vector_norm(Z_nM, dim=1, keepdim=True)
    # The mean of equal numbers is not exactly that number: what is left over is rounding.
    rounding = 4 * torch.finfo(S_nM.dtype).eps * M**0.5
    Z_nM *= torch.where(norm_n1 > rounding, 1 / norm_n1, 0)
    parts = []
    for start in range(0, n, rows := max(1, ENTRIES // n)):
        correlation_cn = (Z_nM[start : start + rows] @ Z_nM.T).abs_()
        correlation_cn.diagonal(start).zero_()
        parts.append(correlation_cn.sum(1, dtype=torch.float64))
    return torch.cat(parts) / max(1, n - 1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter want a gradient as long as the block runs."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _tap(hooks: ExitStack, layer: int, mlp: nn.Module, take: Callable[[int, Tensor], None]) -> None:
    """Give ``take`` the layer's S whenever a backward pass has been through its FFN.

    Args:
        hooks: undoes what is registered here.
        layer: the layer's number.
        mlp: its FFN.
        take: called as ``take(layer, S_n3D)``.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    names = ("gate_proj", "up_proj", "down_proj")

    def keep(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output
            if name == "down_proj":  # the last of the three
                found = register_multi_grad_hook([outputs.pop(name) for name in names], arrive)
                hooks.callback(found.remove)

        return hook

    @torch.no_grad()
    def arrive(gradients: Sequence[Tensor | None]) -> None:
        gate_1Tn, up_1Tn, down_1TD = gradients
        x_1TD, h_1Tn = inputs["gate_proj"], inputs["down_proj"]
        wide = _wide(x_1TD)
        S_n3D = torch.empty(h_1Tn.shape[-1], 3, x_1TD.shape[-1], dtype=wide, device=x_1TD.device)
        pairs = (
            (h_1Tn, down_1TD, mlp.down_proj.weight.T),
            (up_1Tn, x_1TD, mlp.up_proj.weight),
            (gate_1Tn, x_1TD, mlp.gate_proj.weight),
        )
        for place, (left_1Tn, right_1TD, weight_nD) in enumerate(pairs):
            gradient_nD = left_1Tn[0].to(wide).T @ right_1TD[0].to(wide)
            torch.mul(gradient_nD, weight_nD, out=S_n3D[:, place])
        take(layer, S_n3D)

    for name in names:
        hooks.callback(getattr(mlp, name).register_forward_hook(keep(name)).remove)


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the tensor's dtype, or float32 where that is narrower."""
    return torch.promote_types(tensor.dtype, torch.float32)
