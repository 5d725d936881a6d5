"""The one place that reaches inside attention: taps on q, k, v and head outputs, inputs of layers.

Shapes: B sequences, T tokens, H query heads, G key/value heads, d head size, D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headroom.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TAPPABLE = (*FAMILIES, "marian")
IMPLEMENTATION = "headroom"

# What a tap calls: (module, q_BHTd, k_BGTd, v_BGTd, z_BTHd) -> None, or a replacement for z_BTHd.
Tap = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor | None]

# The taps of each attention module, the outermost first. One registered function looks them up, so
# nothing piles up in transformers' registry and several models can be tapped at once.
_TAPS: WeakKeyDictionary[nn.Module, list[Tap]] = WeakKeyDictionary()


class AttentionInputs(NamedTuple):
    """What each layer's self attention reads."""

    x_BTD: list[Tensor]  # after the layer's norm, one tensor a layer
    cos_Td: Tensor
    sin_Td: Tensor


class _Stop(Exception):
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def stopping() -> Iterator[Callable[[], None]]:
    """Give a function that ends the forward pass inside this block when it is called."""
    mark = _Stop()

    def stop() -> None:
        raise mark

    try:
        yield stop
    except _Stop as found:
        if found is not mark:
            raise


def attention_modules(model: "PreTrainedModel") -> list[tuple[str, nn.Module]]:
    """Return the attention modules with their names, in the order of the layers.

    A decoder has one a layer. Marian has encoder, decoder and cross attention, which their names
    tell apart (``…encoder.layers.0.self_attn``, ``…decoder.layers.0.encoder_attn``).

    Raises:
        InputError: for a family that is not served.
    """
    family = model.config.model_type
    if family not in TAPPABLE:
        raise InputError(f"model_type {family!r} is not served (allowed: {', '.join(TAPPABLE)})")
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "q_proj") and hasattr(module, "scaling")
    ]


def head_count(module: nn.Module) -> int:
    """H, the query heads of an attention module."""
    return module.q_proj.out_features // module.head_dim


def check_family(model: "PreTrainedModel") -> None:
    """Refuse a model whose attention is not that of a served decoder.

    Raises:
        InputError: naming the families that are allowed.
    """
    if model.config.model_type not in FAMILIES:
        allowed = ", ".join(FAMILIES)
        raise InputError(
            f"model_type {model.config.model_type!r} is not served (allowed: {allowed})"
        )


def check_model(model: "PreTrainedModel", length: int) -> None:
    """Refuse what the maps would not be right for.

    Raises:
        InputError: for another family, or a sliding window shorter than the windows of text.
    """
    check_family(model)
    config = model.config
    if length > config.max_position_embeddings:
        raise InputError(
            f"config key heads.calibration.window: {length} tokens (allowed: at most "
            f"{config.max_position_embeddings}, the model's max_position_embeddings)"
        )
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and window < length and "sliding_attention" in kinds:
        raise InputError(
            f"sliding_window {window} is shorter than the text windows (allowed: ≤ {window} tokens)"
        )


@contextmanager
def tapped(model: "PreTrainedModel", function: Tap) -> Iterator[None]:
    """Call ``function`` wherever the model computes attention, as long as the block runs.

    Attention itself stays transformers' ``sdpa`` with its mask. Taps nest: the inner one gets the z
    that the outer one returned. What was set before is set again, also after an exception.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3 or Marian model (with or without its head).
        function: gets ``(module, q_BHTd, k_BGTd, v_BGTd, z_BTHd)``, q and k normed and rotated,
            and returns None or what is to take z's place. On a padded batch it sees padding too.

    Raises:
        InputError: for a family that is not served.
    """
    modules = [module for _, module in attention_modules(model)]
    _register()
    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(IMPLEMENTATION)
        for module in modules:
            taps = _TAPS.setdefault(module, [])
            taps.append(function)
            undo.callback(taps.pop)
        yield


def _register() -> None:
    """Tell transformers about the tapped implementation (again is harmless)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(IMPLEMENTATION, _tapped_attention)
    # Without the mask of sdpa, padded batches would be wrong, and silently so.
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _tapped_attention(
    module: nn.Module, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Compute attention as sdpa does and show it to the module's taps."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    z_BTHd, _ = sdpa(module, q_BHTd, k_BGTd, v_BGTd, mask, **kwargs)
    for function in _TAPS.get(module, ()):
        replaced = function(module, q_BHTd, k_BGTd, v_BGTd, z_BTHd)
        z_BTHd = z_BTHd if replaced is None else replaced
    return z_BTHd, None


@torch.no_grad()
def attention_inputs(model: "PreTrainedModel", tokens_BT: Tensor) -> AttentionInputs:
    """Return what the self attention of each decoder layer reads for these tokens.

    With the layer's weights, x, cos and sin give its q, k, v and head outputs without a model.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 model.
        tokens_BT: token numbers without padding, on the model's device.

    Raises:
        InputError: for another family.
    """
    check_family(model)
    modules = [module for _, module in attention_modules(model)]
    found: list[Tensor] = []
    rotary: list[Tensor] = []

    with stopping() as stop, ExitStack() as hooks:

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            if module is modules[-1]:
                rotary.extend(table[0] for table in kwargs["position_embeddings"])
                stop()  # the last layer's own work is not needed

        for module in modules:
            handle = module.register_forward_pre_hook(keep, with_kwargs=True)
            hooks.callback(handle.remove)
        model.base_model(input_ids=tokens_BT, use_cache=False)
    return AttentionInputs(found, *rotary)


@contextmanager
def replaced(model: "PreTrainedModel", tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the model other weights as long as the block runs, fewer heads or channels included.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal language model.
        tensors: weights and biases of attention or FFN projections by their names in a checkpoint,
            biases that the model has not among them. Every layer whose sizes change brings all its
            projections.
    """
    with ExitStack() as undo, torch.no_grad():
        for name, tensor in tensors.items():
            path, attribute = name.rsplit(".", 1)
            owner = model.get_submodule(path)
            before = getattr(owner, attribute)
            undo.callback(setattr, owner, attribute, before)
            like = owner.weight  # a bias may be new
            moved = tensor.to(like.device, like.dtype)
            setattr(owner, attribute, nn.Parameter(moved, requires_grad=False))
        for _, module in attention_modules(model):
            undo.callback(setattr, module, "num_key_value_groups", module.num_key_value_groups)
            heads, groups = (len(part.weight) for part in (module.q_proj, module.k_proj))
            module.num_key_value_groups = heads // groups
        yield
