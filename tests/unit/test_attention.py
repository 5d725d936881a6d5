"""Taps: they see what attention saw, change it only when asked, and leave nothing behind.

Shapes: B sequences, T tokens, H query heads, G key/value heads, d head size, D model width.
"""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from headroom.attention import attention_inputs, attention_modules, replaced, tapped
from headroom.errors import InputError

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def marian() -> MarianMTModel:
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
    config = MarianConfig(
        vocab_size=40, d_model=16, max_position_embeddings=32, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, forced_eos_token_id=None, init_std=0.5, **sizes
    )  # fmt: skip
    return MarianMTModel(config).eval()


def nothing(module, q_BHTd, k_BGTd, v_BGTd, z_BTHd):
    return None


@pytest.fixture
def tokens_BT():
    return torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def test_a_tap_sees_every_layer_and_changes_nothing(tokens_BT):
    model = llama()
    seen = []
    plain = model(tokens_BT).logits
    with tapped(model, lambda module, *states: seen.append((module, *(x.shape for x in states)))):
        assert torch.equal(model(tokens_BT).logits, plain)
    shapes = [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 9, 4, 8)]
    assert seen == [(module, *shapes) for _, module in attention_modules(model)]


def test_a_gate_on_one_head_equals_zero_columns_of_its_output_weights(tokens_BT):
    model = llama()
    gate_H = torch.tensor([1.0, 0.0, 1.0, 0.5])
    with tapped(model, lambda module, q, k, v, z_BTHd: z_BTHd * gate_H[:, None]):
        gated = model(tokens_BT).logits
    with torch.no_grad():
        for _, module in attention_modules(model):
            module.o_proj.weight *= gate_H.repeat_interleave(8)
    torch.testing.assert_close(gated, model(tokens_BT).logits)


def test_marian_padded_batch_equals_untapped():
    model = marian()
    source_BT = torch.tensor([[5, 6, 7, 8, 9, 1], [7, 6, 1, 0, 0, 0]])
    arguments = {
        "input_ids": source_BT,
        "attention_mask": (source_BT != 0).long(),
        "decoder_input_ids": torch.tensor([[0, 4, 5, 9], [0, 9, 8, 2]]),
    }
    plain = model(**arguments).logits
    unpadded = model(**{k: v[1:, :3] if k != "decoder_input_ids" else v[1:]
                        for k, v in arguments.items()}).logits  # fmt: skip
    torch.testing.assert_close(plain[1:], unpadded)  # so the mask does something here
    with tapped(model, nothing):
        torch.testing.assert_close(model(**arguments).logits, plain)
    without_mask = model(**{**arguments, "attention_mask": torch.ones_like(source_BT)}).logits
    assert (without_mask - plain).abs().max() > 1e-3


def test_marian_gates_by_kind_also_when_generating():
    model = marian()
    source_BT = torch.tensor([[5, 6, 7, 8, 9, 1]])
    encoder = {m for name, m in attention_modules(model) if ".encoder.layers." in name}
    assert len(encoder) == 2
    assert len(attention_modules(model)) == 6

    def close(module, q_BHTd, k_BGTd, v_BGTd, z_BTHd):
        return torch.zeros_like(z_BTHd) if module in encoder else None

    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2, "output_scores": True,
                "return_dict_in_generate": True}  # fmt: skip
    with tapped(model, close):
        tapped_scores = model.generate(source_BT, **settings).scores[0]
    with torch.no_grad():
        for module in encoder:
            module.out_proj.weight.zero_()
    torch.testing.assert_close(tapped_scores, model.generate(source_BT, **settings).scores[0])


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_what_was_set_before_comes_back_also_after_an_exception(before, tokens_BT):
    model = llama()
    model.set_attn_implementation(before)
    calls = []

    def broken(*states):
        calls.append(1)
        raise RuntimeError("broken tap")

    with pytest.raises(RuntimeError, match="broken tap"), tapped(model, broken):
        model(tokens_BT)
    assert model.config._attn_implementation == before
    with tapped(model, nothing):
        model(tokens_BT)
    assert len(calls) == 1
    assert model.config._attn_implementation == before


def test_nested_taps_see_one_another_and_two_models_do_not(tokens_BT):
    first, second = llama(), llama()
    outer, inner, other = [], [], []

    def double(module, q, k, v, z_BTHd):
        outer.append(z_BTHd)
        return 2 * z_BTHd

    with tapped(first, double), tapped(second, lambda *states: other.append(states[-1])):
        with tapped(first, lambda *states: inner.append(states[-1])):
            first(tokens_BT)
        assert first.config._attn_implementation == "headroom"
        first(tokens_BT)
    assert len(outer) == 6 and len(inner) == 3 and not other
    assert all(torch.equal(2 * a, b) for a, b in zip(outer[:3], inner, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_inputs_give_back_the_rotated_queries(family, tokens_BT):
    torch.manual_seed(0)
    model = llama() if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    queries = []
    with tapped(model.eval(), lambda module, q_BHTd, *rest: queries.append(q_BHTd)):
        model(tokens_BT)
    found = attention_inputs(model, tokens_BT)
    assert found.cos_Td.shape == found.sin_Td.shape == (9, 8)
    for (_, module), x_BTD, q_BHTd in zip(
        attention_modules(model), found.x_BTD, queries, strict=True
    ):
        heads_BTHd = module.q_proj(x_BTD).unflatten(2, (4, 8))
        heads_BTHd = module.q_norm(heads_BTHd) if family == "qwen3" else heads_BTHd
        cos, sin = found.cos_Td[None], found.sin_Td[None]
        rotated, _ = apply_rotary_pos_emb(*[heads_BTHd.transpose(1, 2)] * 2, cos, sin)
        torch.testing.assert_close(rotated, q_BHTd)
    assert not any(module._forward_pre_hooks for _, module in attention_modules(model))


def test_other_families_are_refused(tokens_BT):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(InputError, match="gpt2"), tapped(model, nothing):
        pass
    with pytest.raises(InputError, match="marian"):
        attention_inputs(marian(), tokens_BT)


def test_replaced_weights_compute_what_a_smaller_model_does_and_are_put_back():
    config = {"hidden_size": 48, "head_dim": 8, "num_key_value_heads": 2, "vocab_size": 50}
    config |= {"num_hidden_layers": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    large = LlamaForCausalLM(LlamaConfig(num_attention_heads=6, **config)).eval()
    small = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **config)).eval()
    state = {k: v for k, v in small.state_dict().items() if "self_attn" in k}
    rest = {k: v for k, v in small.state_dict().items() if "self_attn" not in k}
    large.load_state_dict(rest, strict=False)
    tokens = torch.randint(50, (2, 7))
    before = large(tokens).logits
    with replaced(large, state):
        torch.testing.assert_close(large(tokens).logits, small(tokens).logits)
        with torch.no_grad():
            assert not torch.allclose(large(tokens).logits, before)
    assert torch.equal(large(tokens).logits, before)
