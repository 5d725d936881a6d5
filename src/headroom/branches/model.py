"""Llama-shaped models that differ in their rotary turns alone, computed as one: a stack.

Shapes: K members, B samples, S columns, N = B·S positions, P labelled positions, H query and G
key/value heads of size d, F = d/2 pairs, V vocabulary, D hidden size.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from headroom.branches.layout import IGNORED, Batch
from headroom.branches.masks import MASKS, rule, visible
from headroom.branches.rope import Rotary
from headroom.branches.sizes import LOGITS, ffn_width
from headroom.errors import InputError

if TYPE_CHECKING:
    from headroom.branches.runs import Rotation

EPSILON = 1e-5  # of the norms
INITIAL = 0.02  # standard deviation of initial weights, as transformers' Llama
BLOCK = 128  # columns; on a GPU attention works in blocks, and fewer lengths compile less often


class Inputs(NamedTuple):
    """A batch on the model's device, all (B, S)."""

    tokens_BS: Tensor
    labels_BS: Tensor  # IGNORED where nothing is predicted
    flat_BS: Tensor  # place in the interleaved sequence
    time_BS: Tensor
    branch_BS: Tensor
    valid_BS: Tensor  # False at pads


def inputs(batch: Batch, device: str | torch.device) -> Inputs:
    """Move a batch to a device; for a GPU, pads fill the last block of columns."""
    fields = {name: torch.from_numpy(getattr(batch, name)) for name in Inputs._fields}
    if torch.device(device).type == "cuda":
        missing = -batch.tokens_BS.shape[1] % BLOCK
        fills = {"labels_BS": IGNORED}
        fields = {
            name: F.pad(field, (0, missing), value=fills.get(name, 0))
            for name, field in fields.items()
        }
    return Inputs(**{name: field.to(device) for name, field in fields.items()})


def visibility(inputs: Inputs, mask: str) -> Tensor | BlockMask:
    """Return who sees whom in the form that the device's attention reads.

    On a CPU what is added to scores, (B, 1, S, S): 0 or −∞; on a GPU blocks, so that none of the
    scores of a block that nobody sees is computed.
    """
    (samples, length), device = inputs.tokens_BS.shape, inputs.tokens_BS.device
    if device.type == "cuda":
        sees = rule(inputs.time_BS, inputs.branch_BS, inputs.valid_BS, mask)
        return create_block_mask(sees, samples, None, length, length, device, BLOCK_SIZE=BLOCK)
    seen_BSS = visible(inputs.time_BS, inputs.branch_BS, inputs.valid_BS, mask)
    added_BSS = torch.zeros(seen_BSS.shape, device=device).masked_fill(~seen_BSS, -math.inf)
    return added_BSS[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | BlockMask) -> Tensor:
    """Return softmax(q kᵀ / √d) v by a kernel that never holds all scores of a head.

    Args:
        q: (B, K·H, S, d).
        k: (B, K·G, S, d), as v.
        v: what is averaged.
        seen: of :func:`visibility`.
    """
    if isinstance(seen, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary turns are float32 under autocast
    return _compiled_flex()(q, k, v, block_mask=seen, enable_gqa=True)


@functools.cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention)


class _LabelLoss(torch.autograd.Function):
    """−ln softmax at the labels, (K, P), which uses up the logits (K, P, V).

    They are by far the largest tensor of a small model: one buffer of their size, where the stock
    cross-entropy takes four, is a tenth of a step.
    """

    @staticmethod
    def forward(ctx, logits_KPV: Tensor, labels_P: Tensor) -> Tensor:
        """Leave exp(logit − max) in the logits' place."""
        places_P = torch.arange(len(labels_P), device=labels_P.device)
        top_KP1 = logits_KPV.amax(-1, keepdim=True)
        own_KP = logits_KPV[:, places_P, labels_P]
        odds_KPV = logits_KPV.sub_(top_KP1).exp_()
        total_KP1 = odds_KPV.sum(-1, keepdim=True)
        ctx.save_for_backward(odds_KPV, total_KP1, places_P, labels_P)
        return (top_KP1 + total_KP1.log()).squeeze(-1) - own_KP

    @staticmethod
    def backward(ctx, grad_KP: Tensor) -> tuple[Tensor, None]:
        """Return p − 1[label], times what is asked; a second call is refused by autograd."""
        odds_KPV, total_KP1, places_P, labels_P = ctx.saved_tensors
        grad_KPV = odds_KPV.mul_(grad_KP.unsqueeze(-1) / total_KP1)
        grad_KPV[:, places_P, labels_P] -= grad_KP
        return grad_KPV, None


class Layer(nn.Module):
    """Attention and feed-forward weights of all members, [K, in, out]."""

    def __init__(self, members: int, hidden: int, heads: int, kv_heads: int, ffn: int):
        """Allocate; the columns of ``qkv`` are those of q, k and v, of ``gate_up`` gate and up."""
        super().__init__()
        size = hidden // heads
        shapes = {
            "attention_norm": (hidden,),
            "qkv": (hidden, (heads + 2 * kv_heads) * size),
            "output": (heads * size, hidden),
            "feed_norm": (hidden,),
            "gate_up": (hidden, 2 * ffn),
            "down": (ffn, hidden),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(members, *shape)))


class Stack(nn.Module):
    """K Llamas of one size that read the same batches, each with a rotation of its own.

    A member's bits are those it would have alone (on a CPU, with one thread): products are batched
    over members and nothing is summed across them.
    """

    def __init__(
        self, sizes: Mapping, rotations: "Sequence[Rotation]", mask: str = "columns", seed: int = 0
    ):
        """Draw one member's weights and give them to all.

        Args:
            sizes: vocabulary, hidden, heads, kv_heads, layers, theta.
            rotations: one a member.
            mask: of :data:`headroom.branches.masks.MASKS`.
            seed: of the weights.

        Raises:
            InputError: if head counts don't divide, or the mask or a rotation is unknown.
        """
        super().__init__()
        if mask not in MASKS:
            raise InputError(f"mask is {mask!r} (allowed: {', '.join(MASKS)})")
        hidden, heads, kv_heads = sizes["hidden"], sizes["heads"], sizes["kv_heads"]
        if hidden % (2 * heads) or heads % kv_heads:
            raise InputError(
                f"config key branches.kv_heads: hidden {hidden}, {heads} heads, {kv_heads} "
                f"key/value heads (allowed: an even head size, and heads a multiple of kv_heads)"
            )
        self.sizes, self.mask, self.rotations = dict(sizes), mask, tuple(rotations)
        self.members, self.head_size = len(self.rotations), hidden // heads
        self.ffn = ffn_width(hidden)
        self.rotary = Rotary(self.head_size, sizes["theta"], self.rotations)
        self.embedding = nn.Parameter(torch.empty(self.members, sizes["vocabulary"], hidden))
        self.layers = nn.ModuleList(
            Layer(self.members, hidden, heads, kv_heads, self.ffn) for _ in range(sizes["layers"])
        )
        self.norm = nn.Parameter(torch.empty(self.members, hidden))
        drawn = _draw(self._shapes(), seed)
        for k in range(self.members):
            self.load_member(k, drawn)

    @property
    def parameters_of_one(self) -> int:
        """Number of parameters of a member; embedding and output are one."""
        return sum(parameter[0].numel() for parameter in self.parameters())

    def losses(self, inputs: Inputs) -> Tensor:
        """Return −ln p(label) of all P labelled positions of the batch in order, (K, P) float32."""
        places_P = (inputs.labels_BS.flatten() != IGNORED).nonzero().squeeze(1)
        labels_P = inputs.labels_BS.flatten()[places_P]
        hidden_KPD = self._normed(self._hidden(inputs).index_select(1, places_P), self.norm)
        whole = max(1, len(labels_P))
        portion = max(1, LOGITS // (self.members * self.embedding.shape[1]))
        size = whole if torch.is_grad_enabled() else portion
        parts = zip(hidden_KPD.split(size, 1), labels_P.split(size), strict=True)
        return torch.cat([self._nll(hidden, labels) for hidden, labels in parts], 1)

    def logits(self, inputs: Inputs) -> Tensor:
        """Return all logits, (K, B, S, V)."""
        hidden_KND = self._normed(self._hidden(inputs), self.norm)
        logits_KNV = torch.bmm(hidden_KND, self.embedding.mT)
        return logits_KNV.unflatten(1, inputs.tokens_BS.shape)

    def _nll(self, hidden_KPD: Tensor, labels_P: Tensor) -> Tensor:
        return _LabelLoss.apply(torch.bmm(hidden_KPD, self.embedding.mT).float(), labels_P)

    def _hidden(self, inputs: Inputs) -> Tensor:
        """Return what the last layer leaves, (K, N, D)."""
        seen = visibility(inputs, self.mask)
        turns = torch.complex(*self.rotary(inputs.flat_BS, inputs.time_BS, inputs.branch_BS))
        hidden_KND = self._embedded(inputs.tokens_BS)
        for layer in self.layers:
            normed_KND = self._normed(hidden_KND, layer.attention_norm)
            qkv_KNW = torch.bmm(normed_KND, layer.qkv)
            heads_KNW = self._attention(qkv_KNW, turns[:, :, :, None], seen)
            hidden_KND = hidden_KND + torch.bmm(heads_KNW, layer.output)
            normed_KND = self._normed(hidden_KND, layer.feed_norm)
            gate, up = torch.bmm(normed_KND, layer.gate_up).chunk(2, -1)
            hidden_KND = hidden_KND + torch.bmm(F.silu(gate) * up, layer.down)
        return hidden_KND

    def _embedded(self, tokens_BS: Tensor) -> Tensor:
        first_K = torch.arange(self.members, device=tokens_BS.device) * self.embedding.shape[1]
        rows_KN = tokens_BS.flatten() + first_K[:, None]
        return F.embedding(rows_KN, self.embedding.flatten(0, 1))

    @staticmethod
    def _normed(hidden_KND: Tensor, weight_KD: Tensor) -> Tensor:
        return F.rms_norm(hidden_KND, hidden_KND.shape[-1:], eps=EPSILON) * weight_KD[:, None]

    def _attention(self, qkv_KNW: Tensor, turns_KBS1F: Tensor, seen: Tensor | BlockMask) -> Tensor:
        """Turn queries and keys and attend, members folded into the heads' dimension."""
        heads, groups = self.sizes["heads"], self.sizes["kv_heads"]
        members, samples, length = turns_KBS1F.shape[:3]
        by_head = qkv_KNW.view(members, samples, length, -1, self.head_size)
        qk, v = by_head.split((heads + groups, groups), 3)
        # A pair's two columns lie side by side (see _interleaved): a turn is a complex product.
        pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turns_KBS1F).flatten(-2)
        q, k, v = (
            t.permute(1, 0, 3, 2, 4).reshape(samples, -1, length, self.head_size)
            for t in (*turned.split((heads, groups), 3), v)
        )
        out = attend(q, k, v, seen).unflatten(1, (members, heads))
        return out.permute(1, 0, 3, 2, 4).reshape(members, samples * length, -1)

    def member(self, k: int) -> dict[str, Tensor]:
        """Return copies of a member's weights, named and shaped as those of LlamaForCausalLM."""
        heads, groups, size = self.sizes["heads"], self.sizes["kv_heads"], self.head_size
        found = {"model.embed_tokens.weight": self.embedding[k], "model.norm.weight": self.norm[k]}
        for number, layer in enumerate(self.layers):
            split = layer.qkv[k].split((heads * size, groups * size, groups * size), 1)
            q, key = (_halves(t, size) for t in split[:2])
            gate, up = layer.gate_up[k].chunk(2, 1)
            own = {
                "input_layernorm": layer.attention_norm[k],
                "self_attn.q_proj": q.T,
                "self_attn.k_proj": key.T,
                "self_attn.v_proj": split[2].T,
                "self_attn.o_proj": layer.output[k].T,
                "post_attention_layernorm": layer.feed_norm[k],
                "mlp.gate_proj": gate.T,
                "mlp.up_proj": up.T,
                "mlp.down_proj": layer.down[k].T,
            }
            found |= {f"model.layers.{number}.{name}.weight": t for name, t in own.items()}
        return {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in found.items()
        }

    @torch.no_grad()
    def load_member(self, k: int, tensors: Mapping[str, Tensor]) -> None:
        """Put weights in a member's place, named and shaped as those of LlamaForCausalLM.

        Raises:
            InputError: naming a weight that is missing, unknown or of another shape.
        """
        shapes = self._shapes()
        for name in sorted(shapes.keys() ^ tensors.keys()):
            raise InputError(f"{name} is {'missing' if name in shapes else 'no weight'} of a run")
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                raise InputError(f"{name} is {tuple(tensors[name].shape)} (allowed: {shape})")
        self.embedding[k] = tensors["model.embed_tokens.weight"]
        self.norm[k] = tensors["model.norm.weight"]
        for number, layer in enumerate(self.layers):
            own = {
                name: tensors[f"model.layers.{number}.{name}.weight"].t()
                for name in _layer_shapes(self.sizes, self.ffn)
            }
            q, key = (
                _interleaved(own[f"self_attn.{name}"], self.head_size)
                for name in ("q_proj", "k_proj")
            )
            layer.attention_norm[k] = own["input_layernorm"]
            layer.qkv[k] = torch.cat((q, key, own["self_attn.v_proj"]), 1)
            layer.output[k] = own["self_attn.o_proj"]
            layer.feed_norm[k] = own["post_attention_layernorm"]
            layer.gate_up[k] = torch.cat((own["mlp.gate_proj"], own["mlp.up_proj"]), 1)
            layer.down[k] = own["mlp.down_proj"]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a member's weights by their names, in the order of the layers."""
        hidden = self.sizes["hidden"]
        found = {"model.embed_tokens.weight": (self.sizes["vocabulary"], hidden)}
        for number in range(self.sizes["layers"]):
            own = _layer_shapes(self.sizes, self.ffn)
            found |= {f"model.layers.{number}.{name}.weight": own[name] for name in own}
        return found | {"model.norm.weight": (hidden,)}


def _layer_shapes(sizes: Mapping, ffn: int) -> dict[str, tuple[int, ...]]:
    hidden = sizes["hidden"]
    keys = hidden // sizes["heads"] * sizes["kv_heads"]
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def _draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Return initial weights: ones for norms, else normal, in the order of the names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.empty(shape).normal_(0.0, INITIAL, generator=generator)
        for name, shape in shapes.items()
    }


def _interleaved(columns: Tensor, size: int) -> Tensor:
    """Bring a pair's columns j and j + d/2 of each head, (in, heads · d), side by side."""
    return columns.unflatten(1, (-1, 2, size // 2)).transpose(2, 3).flatten(1)


def _halves(columns: Tensor, size: int) -> Tensor:
    """Undo :func:`_interleaved`."""
    return columns.unflatten(1, (-1, size // 2, 2)).transpose(2, 3).flatten(1)
