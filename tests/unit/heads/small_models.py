"""Small random models with planted structure, and independent references for what they compute."""

import math

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
SETTINGS = {"ridge": 1e-4, "cross_group": "merge"}


def build(family="llama", heads=4, groups=2, d=12, width=48, layers=2, seed=0, **more):
    """A model whose attention is far from uniform, with random norms and biases."""
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=d,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **more,
    )
    if family == "mistral":
        config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(noise * 1.5 / math.sqrt(tensor.shape[-1]))
    return model


def tokens(sequences=6, length=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (sequences, length), generator=generator)


@torch.no_grad()
def inputs_of(model, batch=None):
    """What each layer's attention reads, by plain hooks."""
    batch = tokens() if batch is None else batch
    found, hooks = {}, []

    def keep(index):
        def hook(module, args, kwargs):
            found[f"layer.{index}"] = kwargs["hidden_states"].clone()
            found["cos"], found["sin"] = (t[0].clone() for t in kwargs["position_embeddings"])

        return hook

    for index, layer in enumerate(model.model.layers):
        hooks.append(layer.self_attn.register_forward_pre_hook(keep(index), with_kwargs=True))
    model(batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def logits(model, batch=None):
    return model(tokens(seed=2) if batch is None else batch).logits


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def config_of(model):
    return model.config.to_dict()


def rebuilt(config, state):
    """The stock model of a configuration and tensors; refuses missing and unexpected ones."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    model.load_state_dict(state, strict=True)
    return model


def block(state, layer, kind, index, d):
    """A view of one head's rows (q, k, v, their biases) or columns (o)."""
    name = f"model.layers.{layer}.self_attn.{kind}"
    rows = slice(index * d, (index + 1) * d)
    return state[name][:, rows] if kind == "o_proj.weight" else state[name][rows]


def parts_of(state, layer, letters):
    kinds = [f"{letter}_proj.{what}" for letter in letters for what in ("weight", "bias")]
    return [
        k for k in kinds if f"model.layers.{layer}.self_attn.{k}" in state and k != "o_proj.bias"
    ]


def copy_head(state, layer, source, target, d, scale_output=1.0):
    """Make a query head an exact copy of another of the same key/value head."""
    for kind in parts_of(state, layer, "qo"):
        block(state, layer, kind, target, d).copy_(block(state, layer, kind, source, d))
    block(state, layer, "o_proj.weight", target, d).mul_(scale_output)


def times_planes(rows, z):
    """Rows m and m + d/2 as one complex number, times z_m: by complex arithmetic itself."""
    half = rows.shape[0] // 2
    z = z.reshape(-1, *[1] * (rows.dim() - 1))
    product = torch.complex(rows[:half].double(), rows[half:].double()) * z
    return torch.cat((product.real, product.imag)).to(rows)


def copy_group(state, layer, source, target, d, each, z, rotation, heads=None):
    """Make a key/value head and query heads of it a copy of another in a different gauge.

    W_K → z W_K, W_Q → W_Q / conj(z), W_V → A W_V, W_O → W_O A⁻¹ with A = rotation.
    """
    a = rotation.float()
    for kind in parts_of(state, layer, "k"):
        moved = times_planes(block(state, layer, kind, source, d), z)
        block(state, layer, kind, target, d).copy_(moved)
    for kind in parts_of(state, layer, "v"):
        block(state, layer, kind, target, d).copy_(a @ block(state, layer, kind, source, d))
    for place in range(each) if heads is None else heads:
        old, new = source * each + place, target * each + place
        for kind in parts_of(state, layer, "q"):
            moved = times_planes(block(state, layer, kind, old, d), 1 / z.conj())
            block(state, layer, kind, new, d).copy_(moved)
        out = block(state, layer, "o_proj.weight", old, d) @ torch.linalg.inv(a)
        block(state, layer, "o_proj.weight", new, d).copy_(out)


def random_gauge(d, seed=0, modulus=True, signs=False):
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(d // 2, generator=generator, dtype=torch.float64) * 2 * math.pi
    size = torch.exp(torch.randn(d // 2, generator=generator, dtype=torch.float64) * 0.5)
    z = torch.polar(size if modulus else torch.ones_like(size), angle)
    if signs:
        z = torch.sgn(z.real).to(torch.complex128)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return z, rotation


def naive_similarity(model, batch=None):
    """Cosine of causal ReLU maps, from the q and k that stock attention is given."""
    seen = []
    batch = tokens() if batch is None else batch
    from transformers import AttentionInterface

    def spy(module, query, key, value, mask, **kwargs):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        scores = torch.einsum("bhtd,bhsd->bhts", query, key)
        seen.append(scores.double().relu().tril())
        weights = (scores * module.scaling).masked_fill(torch.ones_like(scores).triu(1) > 0, -1e30)
        return (weights.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    before = model.config._attn_implementation
    model.set_attn_implementation("spy")
    with torch.no_grad():
        model(batch)
    model.set_attn_implementation(before)
    maps = np.stack([s.transpose(0, 1).flatten(1).numpy() for s in seen])
    gram = maps @ maps.swapaxes(1, 2)
    norm = np.sqrt(np.einsum("lhh->lh", gram))
    return gram / norm[:, :, None] / norm[:, None]
