"""Gates on the heads of real architectures: what they multiply, their gradient, and no trace."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headroom.attention import head_count
from headroom.errors import InputError
from headroom.gates.gated import (
    Gated,
    attention_kind,
    attention_layer,
    gated_modules,
    kept_heads,
)

from .small_translators import batch, translator

EVERY = ["encoder", "decoder", "cross"]
TOKENS = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(3))


def decoder_only():
    """A Llama whose four query heads share two key/value heads, all of which matter."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes, **heads)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" not in name:
                tensor.normal_(0, 0.3)
    return model


def reads(model):
    """What a model of either kind is called with."""
    return {"input_ids": TOKENS} if model.config.model_type == "llama" else batch()


@torch.no_grad()
def logits(model):
    return model(**reads(model), use_cache=False).logits


def loss(model):
    inputs = reads(model)
    labels = inputs.get("labels", inputs["input_ids"])
    found = model(**inputs, use_cache=False).logits
    return cross_entropy(found.flatten(0, 1), labels.flatten())


CASES = {"marian": (translator, EVERY), "llama": (decoder_only, ["decoder"])}


@pytest.fixture(params=CASES)
def case(request):
    build, attentions = CASES[request.param]
    return build(), attentions


def column_slice(module, head):
    return slice(head * module.head_dim, (head + 1) * module.head_dim)


def output_projection(module):
    return module.o_proj if hasattr(module, "o_proj") else module.out_proj


def test_wide_open_gates_leave_the_logits_alone(case):
    model, attentions = case
    before = logits(model)
    gated = Gated(model, attentions, 0.5, 10.0)
    with gated.hooked():
        gated.settle()
        assert (logits(model) - before).abs().max() <= 1e-6
        gated.draw([torch.full_like(values, 0.5) for values in gated.log_a])
        assert (logits(model) - before).abs().max() <= 1e-6


def test_a_later_study_can_gate_a_decoder_only_model_with_shared_key_value_heads():
    model = decoder_only()
    before = logits(model)
    gated = Gated(model, ["decoder"], 0.5, 10.0)
    assert gated.heads == 8 and gated.names == [f"model.layers.{n}.self_attn" for n in (0, 1)]
    module, head = gated_modules(model, ["decoder"])[gated.names[1]], 2
    with torch.no_grad(), gated.hooked():
        gated.log_a[1][head] = -10.0
        gated.settle()
        closed = logits(model)
        module.o_proj.weight[:, column_slice(module, head)] = 0
    assert (closed - before).abs().max() > 0.1
    assert (closed - logits(model)).abs().max() <= 1e-5
    assert kept_heads(gated.gates()) == dict(
        zip(gated.names, [[0, 1, 2, 3], [0, 1, 3]], strict=True)
    )


def test_a_gate_scales_what_its_head_adds(case):
    """A gate equals its value in the columns of W_O, each head its own."""
    model, attentions = case
    gated = Gated(model, attentions, 0.5, 0.0)
    with torch.no_grad(), gated.hooked():
        for place, values in enumerate(gated.log_a):
            values.copy_(torch.tensor([-3.0, -1.0, 0.3, 3.0]).roll(place))
        gated.settle()
        found = logits(model)
    for name, gate_H in gated.gates().items():
        module = model.get_submodule(name)
        for head, value in enumerate(gate_H):
            weight = output_projection(module).weight.data
            weight[:, column_slice(module, head)] *= value
    assert (found - logits(model)).abs().max() <= 1e-4


def test_attention_is_as_before_outside_the_block(case):
    model, attentions = case
    before, implementation = logits(model), model.config._attn_implementation
    gated = Gated(model, attentions, 0.5, -10.0)
    gated.settle()
    assert torch.equal(logits(model), before)
    with gated.hooked():
        assert (logits(model) - before).abs().max() > 0.1
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyboardInterrupt), gated.hooked():
        raise KeyboardInterrupt
    assert torch.equal(logits(model), before)
    assert model.config._attn_implementation == implementation


def test_the_gradient_of_drawn_gates(case):
    """By central differences in float64; every gate has one."""
    model, attentions = case
    for name, part in list(model.named_modules()):
        if isinstance(part, LlamaRMSNorm):  # it computes in float32
            exact = torch.nn.RMSNorm(32, part.variance_epsilon)
            exact.load_state_dict(part.state_dict())
            model.set_submodule(name, exact)
    gated = Gated(model.double(), attentions, 0.5, 0.2).double()
    generator = torch.Generator().manual_seed(0)
    uniform = [0.3 + 0.3 * torch.rand(4, generator=generator).double() for _ in gated.log_a]

    def value():
        gated.draw(uniform)
        return loss(model)

    with gated.hooked():
        gradients = torch.autograd.grad(value(), list(gated.log_a))
        with torch.no_grad():
            for values, gradient_H in zip(gated.log_a, gradients, strict=True):
                assert (gradient_H != 0).all()
                for head in (0, 3):
                    sides = []
                    for step in (1e-5, -1e-5):
                        values[head] += step
                        sides.append(float(value()))
                        values[head] -= step
                    slope = (sides[0] - sides[1]) / 2e-5
                    assert float(gradient_H[head]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_judged_puts_back_gates_and_mode():
    model = translator().train()
    model.model.encoder.layers[0].eval()
    gated = Gated(model, EVERY, 0.5, 0.0)
    gated.draw([torch.full_like(values, 0.9) for values in gated.log_a])
    drawn = dict(gated._gates)
    with pytest.raises(KeyboardInterrupt), gated.judged() as judged:
        assert judged is model and not any(part.training for part in model.modules())
        assert all((values == 0.5).all() for values in gated._gates.values())
        raise KeyboardInterrupt
    assert model.training and gated._gates == drawn


def test_kinds_and_layers_of_attentions():
    model = translator()
    found = {
        (attention_kind(name), attention_layer(name), head_count(module))
        for name, module in gated_modules(model, EVERY).items()
    }
    assert found == {(kind, layer, 4) for kind in EVERY for layer in (1, 2)}
    assert Gated(model, ["encoder"], 0.5, 2.0).names == [
        f"model.encoder.layers.{n}.self_attn" for n in (0, 1)
    ]


def test_attentions_that_a_model_lacks_are_refused():
    with pytest.raises(InputError) as refusal:
        gated_modules(decoder_only(), ["encoder"])
    message = str(refusal.value)
    assert "gates.attentions" in message and "allowed: decoder" in message
    assert "\n" not in message
