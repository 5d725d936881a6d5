"""What the FFN channels of a checkpoint do on calibration text.

Shapes: N windows, T tokens, D model width, n channels.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from headroom.accumulators import Moments, add_product
from headroom.checkpoints import Tensors, load_model, read_config
from headroom.corpora.tokens import load_stream, windows
from headroom.errors import InputError
from headroom.ffn.layers import FFN, canonical_scale, read
from headroom.ffn.stream import LayerStream
from headroom.progress import progress

BATCH = 8  # windows that go through the model at once
CHUNK = 4096  # tokens whose hidden activations are held in float64


def calibration_windows(tokens: str, window: int, sequences: int, seed: int) -> Tensor:
    """Return windows at random places of a token stream, int64 (sequences, window).

    Drawn by the seed, as GPTQ, Wanda and FLAP draw them: other seeds see other text.

    Raises:
        InputError: if the stream is shorter than one window.
    """
    stream = load_stream(tokens).tokens
    if len(stream) < window:
        raise InputError(
            f"config key ffn.calibration.window is {window}: the text has {len(stream)} tokens "
            f"(allowed: 2 to {len(stream)})"
        )
    starts = np.random.default_rng(seed).integers(0, len(stream) - window + 1, sequences)
    return torch.from_numpy(np.stack([stream[i : i + window] for i in starts]).astype(np.int64))


def heldout_windows(tokens: str, window: int, sequences: int) -> Tensor:
    """Return the first windows of a token stream without overlap, int64 (windows, window)."""
    found, _ = windows(load_stream(tokens), window, "ffn.calibration.window")
    return torch.from_numpy(found[:sequences])


def hidden_moments(ffn: FFN, inputs: Iterable[Tensor]) -> Moments:
    """Return the moments of the FFN's hidden activations over all tokens."""
    found = Moments.empty((ffn.channels,), ffn.gate_nD.device)
    for h_Nn in hidden_chunks(ffn, inputs):
        found = found.merged(h_Nn)
    return found


def hidden_gram(ffn: FFN, inputs: Iterable[Tensor]) -> Tensor:
    """Return G = HᵀH of the hidden activations over all tokens, float64 (n, n)."""
    gram_nn = torch.zeros(
        ffn.channels, ffn.channels, dtype=torch.float64, device=ffn.gate_nD.device
    )
    for h_Nn in hidden_chunks(ffn, inputs):
        add_product(gram_nn, h_Nn, h_Nn)
    return gram_nn


def hidden_chunks(ffn: FFN, inputs: Iterable[Tensor]) -> Iterable[Tensor]:
    """Yield the hidden activations of a few thousand tokens at a time, in the inputs' dtype."""
    running: FFN | None = None
    for x_BTD in inputs:
        running = running or ffn.to(x_BTD.dtype)
        for x_ND in x_BTD.flatten(0, 1).split(CHUNK):
            yield running.hidden(x_ND)


def leverage(gram_nn: Tensor, ridge: float) -> Tensor:
    """Return the ridge leverage of each channel: diag(G (G + λI)⁻¹), λ = ridge · mean diag G.

    1 − λ · diag((G + λI)⁻¹); near 1 where no other channel can stand in (Alaoui, Mahoney 2015).
    """
    weight = ridge * gram_nn.diagonal().mean()
    if not weight > 0:
        return torch.zeros_like(gram_nn.diagonal())
    inverse_nn = torch.cholesky_inverse(factored(gram_nn.clone(), weight))
    return 1 - weight * inverse_nn.diagonal()


def factored(gram_nn: Tensor, weight: Tensor | float) -> Tensor:
    """Return the Cholesky factor of G + λI; G is overwritten.

    Raises:
        InputError: if λ is below the rounding errors of G, so that the sum is not positive.
    """
    gram_nn.diagonal().add_(weight)
    factor_nn, failed = torch.linalg.cholesky_ex(gram_nn)
    if failed:
        raise InputError(
            "config key ffn.ridge is below the rounding errors of the activations' Gram matrix "
            "(allowed: a larger ridge, or compute.dtype with more digits)"
        )
    return factor_nn


def angular_distance(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """Return the mean angle between a block's input and output states, in units of π."""
    total, count = 0.0, 0
    for old_BTD, new_BTD in zip(before, after, strict=True):
        cosine = torch.cosine_similarity(old_BTD.double(), new_BTD.double(), dim=-1)
        total += float(torch.arccos(cosine.clamp(-1, 1)).sum()) / torch.pi
        count += cosine.numel()
    return total / count


def observe(
    model: torch.nn.Module,
    tensors: Mapping[str, Tensor],
    config: Mapping,
    windows_NT: Tensor,
    ridge: float,
    batch: int = BATCH,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[dict[str, Tensor]]:
    """Return for each layer the statistics of its channels, in their canonical scale, on the CPU.

    Args:
        model, tensors, config: the loaded checkpoint, its stored tensors, its ``config.json``.
        windows_NT: token numbers.
        ridge: of the leverage, as a share of the mean diagonal of G.

    Returns:
        count (1), mean, squares (Σ_t (h − mean)²), leverage (n), angle (1), all float64.
    """
    stream, found = LayerStream(model, windows_NT, batch), []
    for index in progress(range(config["num_hidden_layers"])):
        ffn = read(tensors, index, config, str(model.device))
        before, scale_n = stream.hidden, canonical_scale(ffn)
        inputs = stream.attend(index)
        moments = hidden_moments(ffn, inputs).scaled(scale_n)
        gram_nn = hidden_gram(ffn, inputs) * scale_n[:, None] * scale_n
        stream.advance(model.base_model.layers[index].mlp)
        angle = angular_distance(before, stream.hidden)
        one = {
            "count": torch.tensor([moments.count]),
            "mean": moments.mean_C,
            "squares": moments.squares_C,
            "leverage": leverage(gram_nn, ridge),
            "angle": torch.tensor([angle], dtype=torch.float64),
        }
        found.append({name: value.double().cpu() for name, value in one.items()})
    return found


def measure_activations(
    checkpoint: str, tokens: str, seed: int, settings: Mapping, halvings: int, output: str
) -> None:
    """Write the channels' statistics of a checkpoint: ``{layer}.{statistic}``.

    Args:
        checkpoint: its folder.
        tokens: token stream of the calibration split.
        seed: of the calibration windows.
        settings: ``compute``, ``ffn.calibration``, ``ffn.ridge`` of the configuration.
        halvings: how often the batch is halved (it changes no number beyond rounding).
        output: the file to write.
    """
    from safetensors.torch import save_file

    compute, calibration = settings["compute"], settings["ffn"]["calibration"]
    torch.set_num_threads(compute["threads"])
    found = observe(
        load_model(checkpoint, compute["device"], compute["dtype"]),
        Tensors(checkpoint),
        read_config(checkpoint),
        calibration_windows(tokens, calibration["window"], calibration["sequences"], seed),
        settings["ffn"]["ridge"],
        batch=max(1, BATCH >> halvings),
        progress=lambda items: progress(items, "layers", unit="layer"),
    )
    flat = {f"{i}.{name}": value for i, layer in enumerate(found) for name, value in layer.items()}
    save_file(flat, output)


def load_statistics(path: str, layer: int) -> dict[str, Tensor]:
    """Return one layer's statistics from a file that a job of this study wrote."""
    from safetensors import safe_open

    prefix = f"{layer}."
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
