"""The attention computed from weights alone is the stock model's."""

import pytest
import torch
from small_models import build, config_of, inputs_of, state_of, tokens

from headroom.checkpoints import geometry
from headroom.errors import InputError
from headroom.heads.weights import heads_output, named, project, read

CASES = [
    ("llama", 4, 1, 12, {}),
    ("llama", 4, 4, 12, {"attention_bias": True}),
    ("mistral", 6, 2, 10, {}),
    ("qwen2", 4, 2, 12, {}),
    ("qwen3", 8, 4, 16, {}),
    ("qwen3", 4, 2, 12, {"attention_bias": True}),
]


def seen_by_projection(model):
    """What o_proj reads and gives in every layer."""
    found, hooks = [], []
    for layer in model.model.layers:
        hooks.append(
            layer.self_attn.o_proj.register_forward_hook(
                lambda module, args, output: found.append((args[0].clone(), output.clone()))
            )
        )
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("family", "heads", "groups", "d", "more"), CASES)
def test_equals_stock_model(family, heads, groups, d, more):
    model = build(family, heads, groups, d, **more).double()
    config, state, inputs = config_of(model), state_of(model), inputs_of(model)
    for layer, (wanted_z, wanted_y) in enumerate(seen_by_projection(model)):
        weights = read(state, geometry(config), layer, config)
        z = heads_output(weights, inputs[f"layer.{layer}"], inputs["cos"], inputs["sin"])
        assert (weights.q_bias_Hd is not None) == (family == "qwen2" or bool(more))
        # transformers computes some norms in float32 whatever the model's dtype
        assert torch.allclose(z.flatten(2), wanted_z, atol=1e-5 if family == "qwen3" else 1e-10)
        assert torch.allclose(
            project(weights, z), wanted_y, atol=1e-4 if family == "qwen3" else 1e-9
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_named_is_the_inverse_of_read(dtype):
    model = build("qwen3", 4, 2, attention_bias=True).to(dtype)
    config, state = config_of(model), state_of(model)
    weights = read(state, geometry(config), 1, config)
    assert weights.q_HdD.dtype == torch.float32
    own = {name: t for name, t in state.items() if name.startswith("model.layers.1.self_attn.")}
    again = named(weights, 1, dtype)
    assert again.keys() == own.keys()
    assert all(torch.equal(again[name], own[name]) for name in own)


def test_missing_and_misshapen_tensors():
    model = build()
    config, state = config_of(model), state_of(model)
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(InputError, match=r"k_proj\.weight has shape"):
        read(state | {name: state[name][1:]}, geometry(config), 0, config)
    del state[name]
    with pytest.raises(InputError, match=r"no tensor model\.layers\.0\.self_attn\.k_proj\.weight"):
        read(state, geometry(config), 0, config)
