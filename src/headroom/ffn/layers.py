"""A gated FFN layer: its weights, what it computes, and its free scales.

Shapes: B sequences, T tokens, D model width, n channels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from headroom.errors import InputError

PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class FFN:
    """y = W_d h + b_d, h = act(W_g x + b_g) ∘ (W_u x + b_u); a channel is two rows and a column."""

    gate_nD: Tensor
    up_nD: Tensor
    down_Dn: Tensor
    gate_bias_n: Tensor | None
    up_bias_n: Tensor | None
    down_bias_D: Tensor | None
    activation: Callable[[Tensor], Tensor]

    @property
    def channels(self) -> int:
        """n."""
        return self.gate_nD.shape[0]

    def hidden(self, x_BTD: Tensor) -> Tensor:
        """Return h, (B, T, n)."""
        gate_BTn = self.activation(linear(x_BTD, self.gate_nD, self.gate_bias_n))
        return gate_BTn * linear(x_BTD, self.up_nD, self.up_bias_n)

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """Return y, (B, T, D)."""
        return linear(self.hidden(x_BTD), self.down_Dn, self.down_bias_D)

    def pick(self, kept_k: Tensor) -> "FFN":
        """Return the layer with only some of its channels."""
        return self.mapped(lambda rows: rows[kept_k], lambda columns: columns[:, kept_k])

    def mapped(
        self, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]
    ) -> "FFN":
        """Return the layer with a function of W_g, W_u and their biases, and one of W_d."""
        return replace(
            self,
            gate_nD=rows(self.gate_nD),
            up_nD=rows(self.up_nD),
            gate_bias_n=None if self.gate_bias_n is None else rows(self.gate_bias_n),
            up_bias_n=None if self.up_bias_n is None else rows(self.up_bias_n),
            down_Dn=columns(self.down_Dn),
        )

    def to(self, *args: object) -> "FFN":
        """Return the layer with its tensors on another device or in another precision."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "activation"}
        moved = {name: None if t is None else t.to(*args) for name, t in tensors.items()}
        return replace(self, **moved)

    def scaled(self, scale_n: Tensor) -> "FFN":
        """Return the same function with up rows times s and down columns over s: h' = s·h."""
        bias_n = self.up_bias_n
        return replace(
            self,
            up_nD=self.up_nD * scale_n[:, None],
            up_bias_n=None if bias_n is None else bias_n * scale_n,
            down_Dn=self.down_Dn / scale_n,
        )

    def padded(self, width: int) -> "FFN":
        """Return the same function with channels of zeros up to a width."""
        missing = width - self.channels

        def rows(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

        return self.mapped(rows, lambda down: torch.nn.functional.pad(down, (0, missing)))


def canonical_scale(ffn: FFN) -> Tensor:
    """Return s_n that fixes a channel's free scale and sign: u' = s·u, d' = d/s.

    |s| = sqrt(‖d‖/‖u‖), so that both have one norm; its sign makes the largest |entry| of d
    positive. 1 where u or d is zero.
    """
    up_n, down_n = ffn.up_nD.norm(dim=1), ffn.down_Dn.norm(dim=0)
    size_n = (down_n / up_n).sqrt()
    largest_n = ffn.down_Dn.gather(0, ffn.down_Dn.abs().argmax(0, keepdim=True))[0]
    scale_n = torch.where(largest_n < 0, -size_n, size_n)
    return torch.where((up_n > 0) & (down_n > 0), scale_n, torch.ones_like(scale_n))


def live_channels(ffn: FFN) -> Tensor:
    """Return the channels that can say anything: d is not zero, nor are u and its bias.

    Layers padded to one width have others; they must not take part in a choice or a mean.
    """
    heard_n = ffn.up_nD.any(1)
    if ffn.up_bias_n is not None:
        heard_n = heard_n | (ffn.up_bias_n != 0)
    return (heard_n & ffn.down_Dn.any(0)).nonzero().flatten()


def _name(layer: int, part: str, kind: str) -> str:
    return f"model.layers.{layer}.mlp.{part}_proj.{kind}"


def activation_of(config: Mapping) -> Callable[[Tensor], Tensor]:
    """Return the activation function that a ``config.json`` names."""
    from transformers.activations import ACT2FN

    return ACT2FN[config["hidden_act"]]


def read(tensors: Mapping[str, Tensor], layer: int, config: Mapping, device: str = "cpu") -> FFN:
    """Return one layer's FFN in float64.

    Args:
        tensors: a checkpoint's, by name.
        config: its ``config.json``.

    Raises:
        InputError: if the layer has no gate, up and down projection.
    """
    found: dict[str, Tensor | None] = {}
    for part in PARTS:
        if _name(layer, part, "weight") not in tensors:
            raise InputError(
                f"layer {layer} has no {_name(layer, part, 'weight')}: the ffn study serves gated "
                f"FFNs with gate_proj, up_proj and down_proj"
            )
        for kind in ("weight", "bias"):
            name = _name(layer, part, kind)
            present = kind == "weight" or name in tensors
            found[f"{part}_{kind}"] = tensors[name].to(device).double() if present else None
    return FFN(
        gate_nD=found["gate_weight"],
        up_nD=found["up_weight"],
        down_Dn=found["down_weight"],
        gate_bias_n=found["gate_bias"],
        up_bias_n=found["up_bias"],
        down_bias_D=found["down_bias"],
        activation=activation_of(config),
    )


def named(ffn: FFN, layer: int) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's tensors by their names in a checkpoint."""
    tensors = (
        ("gate", ffn.gate_nD, ffn.gate_bias_n),
        ("up", ffn.up_nD, ffn.up_bias_n),
        ("down", ffn.down_Dn, ffn.down_bias_D),
    )
    for part, weight, bias in tensors:
        yield _name(layer, part, "weight"), weight
        if bias is not None:
            yield _name(layer, part, "bias"), bias
