"""What the heads study reads of a model on calibration text: windows, inputs of attention."""

from pathlib import Path

import torch

from headroom.attention import attention_inputs, check_model
from headroom.checkpoints import geometry, load_model, read_config
from headroom.corpora.tokens import load_stream, windows
from headroom.progress import progress

BATCH = 8  # windows that go through the model at once


def store_attention_inputs(
    checkpoint: str, tokens: str, settings: dict, halvings: int, output: str
) -> None:
    """Write what each layer's self attention reads, so that merges need no forward pass.

    The file holds ``layer.{i}`` of shape (windows, tokens, hidden) in the model's dtype, and
    ``cos``, ``sin`` of shape (tokens, head size).

    Args:
        checkpoint, tokens, settings, halvings, output: as in ``measure.measure_checkpoint``.
    """
    from safetensors.torch import save_file

    calibration = settings["heads"]["calibration"]
    model = load_checkpoint(checkpoint, settings)
    windows_NT = load_windows(tokens, calibration["window"], calibration["inputs"])
    check_model(model, windows_NT.shape[1])
    layers: list[list[torch.Tensor]] = []
    with torch.no_grad():
        batches = windows_NT.split(max(1, BATCH >> halvings))
        for tokens_BT in progress(batches, "inputs of attention", unit="batch"):
            inputs = attention_inputs(model, tokens_BT.to(model.device))
            layers.append([x_BTD.cpu() for x_BTD in inputs.x_BTD])
    stored = {f"layer.{i}": torch.cat(parts) for i, parts in enumerate(zip(*layers, strict=True))}
    stored |= {"cos": inputs.cos_Td.cpu().clone(), "sin": inputs.sin_Td.cpu().clone()}
    save_file(stored, output)


def load_checkpoint(checkpoint: str, settings: dict) -> torch.nn.Module:
    """Return the model as the configuration's ``compute`` says, refusing unserved families."""
    geometry(read_config(checkpoint), f"checkpoint {Path(checkpoint).name}")
    compute = settings["compute"]
    torch.set_num_threads(compute["threads"])
    return load_model(checkpoint, compute["device"], compute["dtype"])


def load_windows(tokens: str, length: int, count: int) -> torch.Tensor:
    """Return the first windows of a token stream, (windows, tokens)."""
    found, _ = windows(load_stream(tokens), length, "heads.calibration.window")
    return torch.from_numpy(found[:count])
