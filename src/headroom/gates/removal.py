"""Take closed heads out of a translation model: fold gates, delete heads, save and load the rest.

Shapes: B sentences, T tokens, S cached tokens, H heads, d head size, D model width.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headroom.attention import attention_modules, head_count, tapped
from headroom.checkpoints import Tensors, read_config, resolve_device, write_json, write_manifest
from headroom.corpora.pair_tokens import IGNORED
from headroom.errors import InputError

if TYPE_CHECKING:
    from transformers import MarianMTModel

# Module names as attention_modules gives them -> (H,) values in [0, 1]; exactly 0 means closed.
Gates = Mapping[str, Tensor]


class ClosedAttention(nn.Module):
    """Attention without heads: all that is left of it is W_O's bias."""

    def __init__(self, bias_D: Tensor, layer_idx: int | None):
        """Keep the bias under the name it has in a checkpoint, ``out_proj.bias``."""
        super().__init__()
        trained = bias_D.requires_grad
        bias = nn.Parameter(bias_D.detach().clone(), requires_grad=trained)
        self.out_proj = nn.ParameterDict({"bias": bias})
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """Return the bias at each position; a decoder's cache counts the positions as before."""
        if key_value_states is None and past_key_values is not None:
            # Marian numbers positions and sizes its masks by the cache of layer 0.
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            nothing_B1T1 = hidden_states.new_zeros(*hidden_states.shape[:2], 1).unsqueeze(1)
            cache.update(nothing_B1T1, nothing_B1T1, self.layer_idx)
        return torch.zeros_like(hidden_states) + self.out_proj["bias"], None


def parameters_per_head(d_model: int, head_dim: int) -> int:
    """Return what deleting one head saves: 3 (D d + d) of q, k, v and D d of W_O."""
    return 3 * (d_model * head_dim + head_dim) + d_model * head_dim


@torch.no_grad()
def fold(model: "MarianMTModel", gates: Gates) -> None:
    """Multiply each head's columns of W_O by its gate and empty closed heads, all in place.

    The shape stays stock: a closed head has zero columns of W_O, zero rows of W_Q, W_K, W_V and
    zero biases.

    Raises:
        InputError: for gates that don't fit the model, or one that is no Marian.
    """
    for module, gate_H in _gated(model, gates).values():
        gate_n = gate_H.repeat_interleave(module.head_dim)
        closed = gate_n == 0
        module.out_proj.weight.mul_(gate_n)
        module.out_proj.weight[:, closed] = 0.0  # no negative zeros
        for part in (module.q_proj, module.k_proj, module.v_proj):
            part.weight[closed] = 0.0
            part.bias[closed] = 0.0


@torch.no_grad()
def remove(model: "MarianMTModel", gates: Gates) -> None:
    """Delete closed heads and fold the other gates into W_O, in place; W_O's bias stays.

    Each closed head takes ``parameters_per_head`` parameters with it. An attention that loses all
    its heads becomes a ``ClosedAttention``.

    Raises:
        InputError: for gates that don't fit the model, or one that is no Marian.
    """
    for name, (module, gate_H) in _gated(model, gates).items():
        gate_n = gate_H.repeat_interleave(module.head_dim)
        kept = gate_n.nonzero().squeeze(1)
        if not len(kept):
            closed = ClosedAttention(module.out_proj.bias, module.layer_idx)
            model.set_submodule(name, closed.train(module.training))
            continue
        for part in (module.q_proj, module.k_proj, module.v_proj):
            part.weight = _parameter(part.weight[kept], part.weight)
            part.bias = _parameter(part.bias[kept], part.bias)
            part.out_features = len(kept)
        output = module.out_proj
        output.weight = _parameter(output.weight[:, kept] * gate_n[kept], output.weight)
        output.in_features = len(kept)
        module.num_heads = len(kept) // module.head_dim


def _parameter(values: Tensor, before: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=before.requires_grad)


def _gated(model: "MarianMTModel", gates: Gates) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return each named module with its gates, on its device and in its type, all checked."""
    _check_family(model.config.model_type, "the model")
    modules, found = dict(attention_modules(model)), {}
    for name, gate_H in gates.items():
        if name not in modules:
            raise InputError(f"gates name the module {name!r} (allowed: {', '.join(modules)})")
        module = modules[name]
        heads = head_count(module)
        gate_H = torch.as_tensor(gate_H).detach().to(module.q_proj.weight)
        if gate_H.shape != (heads,) or not bool(((gate_H >= 0) & (gate_H <= 1)).all()):
            raise InputError(
                f"gates of {name}: {gate_H.tolist()} (allowed: {heads} numbers in [0, 1])"
            )
        found[name] = module, gate_H
    return found


def _check_family(family: str | None, name: str) -> None:
    if family != "marian":
        raise InputError(f"{name}: model_type {family!r} is not served (allowed: marian)")


@torch.no_grad()
def difference(
    model: "MarianMTModel",
    gates: Gates,
    smaller: "MarianMTModel",
    batches: Iterable[Mapping[str, Tensor]],
) -> float:
    """Return max |Δlogit| between a gated model and another one, such as the gated one removed.

    Gates multiply the heads' outputs z before W_O. Compared is where a target token is predicted.

    Args:
        model: the whole model, in evaluation mode.
        gates: its gates; modules that are not named are left as they are.
        smaller: the other model, in evaluation mode, on the same device.
        batches: input_ids, attention_mask and labels (−100 or the pad token where there is none),
            padding and all.

    Raises:
        InputError: for gates that don't fit, or batches without a target token.
    """
    gate_of = {module: gate_H[:, None] for module, gate_H in _gated(model, gates).values()}

    def gate(module, q_BHTd, k_BHTd, v_BHTd, z_BTHd):
        return z_BTHd * gate_of[module] if module in gate_of else None

    largest = []
    for batch in batches:
        labels_BT = batch["labels"]
        with tapped(model, gate):
            gated_BTV = model(**batch).logits
        change_BTV = (gated_BTV - smaller(**batch).logits).abs()
        compared_BT = (labels_BT != IGNORED) & (labels_BT != model.config.pad_token_id)
        if bool(compared_BT.any()):
            largest.append(change_BTV[compared_BT].max())
    if not largest:
        raise InputError("the batches to compare logits on hold no target token")
    return float(torch.stack(largest).max())  # unlike Python's max, it never drops a NaN


def save(model: "MarianMTModel", folder: Path, kept: Mapping[str, list[int]]) -> None:
    """Write a model with deleted heads: config.json with ``kept_heads``, weights, manifest.

    Args:
        model: after ``remove``.
        folder: to write to; files that lie in it already enter the manifest too.
        kept: for each module that lost heads, the indices (from 0) of those it has left.

    Raises:
        InputError: if ``kept`` doesn't tell how many heads each attention has.
    """
    _check_family(model.config.model_type, "the model")
    named = dict(model.named_modules())
    for name in kept.keys() - named.keys():
        raise InputError(f"kept_heads names the module {name!r}, which the model has not")
    for name, heads in _head_counts(model).items():
        wanted = len(kept[name]) if name in kept else _stock_heads(model.config.to_dict(), name)
        if heads != wanted:
            raise InputError(f"kept_heads: {name} has {heads} heads (allowed: {wanted})")
    model.save_pretrained(folder)
    config = read_config(folder)
    config.pop("kept_heads", None)  # of a model that was loaded
    if kept:
        config["kept_heads"] = {name: [int(head) for head in kept[name]] for name in kept}
    write_json(Path(folder) / "config.json", config)
    write_manifest(Path(folder))


def _head_counts(model: nn.Module) -> dict[str, int]:
    """Return how many heads each attention has, those without any included."""
    counts = {name: head_count(module) for name, module in attention_modules(model)}
    closed = {name for name, part in model.named_modules() if isinstance(part, ClosedAttention)}
    return counts | dict.fromkeys(closed, 0)


def _stock_heads(config: Mapping, name: str) -> int:
    part = "encoder" if ".encoder.layers." in name else "decoder"
    return config[f"{part}_attention_heads"]


def load(folder: str | os.PathLike, device: str = "cpu", dtype: str = "float32") -> "MarianMTModel":
    """Return the translation model of a checkpoint in evaluation mode, stock or with heads deleted.

    No gates are needed: ``kept_heads`` of config.json tells which heads are left.

    Args:
        folder: a checkpoint that ``save`` wrote, or a stock one of Marian.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: a torch dtype's name, or ``auto`` for the one it was saved in.

    Raises:
        InputError: for a damaged folder, another family, ``kept_heads`` that don't fit the tensors,
            or a GPU that is not there.
    """
    from transformers import MarianMTModel

    config = read_config(folder)
    _check_family(config.get("model_type"), f"checkpoint {folder}")
    tensors, device = Tensors(folder), resolve_device(device)
    if config.get("kept_heads"):
        model = _load_smaller(tensors, config)
        wanted = config["dtype"] if dtype == "auto" else dtype
        model = model.to(getattr(torch, wanted))
    else:
        model = MarianMTModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    return model.to(device).eval()


def _load_smaller(tensors: Tensors, config: dict) -> "MarianMTModel":
    from transformers import GenerationConfig, MarianConfig, MarianMTModel

    where = f"{tensors.folder}/config.json: kept_heads"
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # the draws are thrown away
        model = MarianMTModel(MarianConfig.from_dict(config))
    remove(model, _masks(model, config, where))
    state = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: shape for name, (shape, _) in tensors.shapes().items()}
    for name in sorted(stored):
        if stored[name] != state.get(name):
            raise InputError(
                f"{where}: {name} is stored as {stored[name]} (allowed: {state.get(name)})"
            )
    made = set(model.all_tied_weights_keys) | set(model._keys_to_ignore_on_save)
    if missing := sorted(state.keys() - stored.keys() - made):
        raise InputError(f"{where}: the checkpoint lacks {missing[0]}")
    model.load_state_dict({name: tensors[name] for name in stored}, strict=False)
    model.tie_weights()
    if (tensors.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(
            tensors.folder, local_files_only=True
        )
    return model


def _masks(model: "MarianMTModel", config: dict, where: str) -> dict[str, Tensor]:
    """Return gates of 0 and 1 that leave the heads that were kept."""
    known, masks = dict(attention_modules(model)), {}
    for name, kept in config["kept_heads"].items():
        if name not in known:
            raise InputError(f"{where} names {name!r} (allowed: {', '.join(known)})")
        heads = _stock_heads(config, name)
        if sorted(set(kept)) != kept or not set(kept) <= set(range(heads)):
            raise InputError(
                f"{where} of {name} are {kept} (allowed: rising numbers from 0 to {heads - 1})"
            )
        masks[name] = torch.zeros(heads)
        masks[name][kept] = 1.0
    return masks
