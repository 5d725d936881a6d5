"""Hidden states of windows on their way through a decoder, one layer at a time.

Only one layer's activations are in memory, and a layer may be left by another FFN than the one it
has, so that a compressed prefix needs no second model. Shapes: N windows, T tokens, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


class LayerStream:
    """The windows' hidden states before a layer; what the layers need beside them is recorded.

    For each layer in turn call :meth:`attend`, look at the FFN's inputs as often as wanted, then
    :meth:`advance`. With the model's own FFNs this computes what its forward pass does.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal language model.
        windows_NT: token numbers without padding.
        batch: windows at once.
    """

    def __init__(self, model: nn.Module, windows_NT: Tensor, batch: int):
        self.layers = model.base_model.layers
        one, self.arguments = _entered(model, windows_NT[:1])
        parts = windows_NT.split(batch)
        self.hidden = [_entered(model, part)[0] for part in parts] if len(windows_NT) > 1 else [one]
        self.inputs: list[Tensor] = []

    @torch.no_grad()
    def attend(self, index: int) -> list[Tensor]:
        """Run a layer up to its FFN and return what the FFN reads, (B, T, D) a batch.

        The layer runs with an FFN of zeros, which leaves its residual stream after attention.
        """
        layer, self.inputs = self.layers[index], []

        def nothing(x_BTD: Tensor) -> Tensor:
            self.inputs.append(x_BTD)
            return torch.zeros_like(x_BTD)

        with _forward(layer.mlp, nothing):
            self.hidden = [layer(part, **self.arguments[index]) for part in self.hidden]
        return self.inputs

    @torch.no_grad()
    def advance(self, ffn: Callable[[Tensor], Tensor]) -> None:
        """Add the FFN's output: the hidden states after the layer that was attended."""
        pairs = zip(self.hidden, self.inputs, strict=True)
        self.hidden = [part + ffn(x_BTD) for part, x_BTD in pairs]
        self.inputs = []


@contextmanager
def _forward(module: nn.Module, function: Callable) -> Iterator[None]:
    """Give a module another forward as long as the block runs."""
    before = module.__dict__.get("forward")  # accelerate sets one where it moves weights about
    module.forward = function
    try:
        yield
    finally:
        del module.forward  # the class's own is behind it
        if before is not None:
            module.forward = before


@torch.no_grad()
def _entered(model: nn.Module, tokens_BT: Tensor) -> tuple[Tensor, list[dict]]:
    """Return the hidden states before the first layer and each layer's other arguments.

    The model runs without its layers, so masks and rotary angles are its own, whatever its family.
    """
    found: list[tuple[Tensor, dict]] = []

    def passing(hidden_BTD: Tensor, **arguments: object) -> Tensor:
        found.append((hidden_BTD, arguments))
        return hidden_BTD

    with ExitStack() as patches:
        for layer in model.base_model.layers:
            patches.enter_context(_forward(layer, passing))
        model.base_model(input_ids=tokens_BT.to(model.device), use_cache=False)
    return found[0][0], [arguments for _, arguments in found]
