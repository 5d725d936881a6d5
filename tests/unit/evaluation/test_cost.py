"""Sizes of a checkpoint against what its model holds, and what counts as an effective parameter."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headroom.checkpoints import Tensors, read_config
from headroom.evaluation.cost import decode_latency, describe_latency, effective_parameters, sizes

H, G, D, d, L, V, F = 6, 3, 24, 4, 2, 40, 32
HEAD = 2 * D * d  # its rows of W_Q and columns of W_O
GROUP = 2 * D * d  # its rows of W_K and W_V


def save(folder, family="llama", dtype=torch.float32, **more):
    config = AutoConfig.for_model(
        family,
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=d,
        max_position_embeddings=64,
        **more,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_()
    model.to(dtype).save_pretrained(folder)
    return folder


def edited(folder, edit):
    """Effective parameters after an edit of the tensors."""
    tensors = {name: Tensors(folder)[name].clone() for name in Tensors(folder).names()}
    edit(tensors)
    return effective_parameters(tensors, read_config(folder))


def rows(tensors, projection, index, layer=0, kind="weight"):
    return tensors[f"model.layers.{layer}.self_attn.{projection}_proj.{kind}"].view(
        -1, d, *((D,) if kind == "weight" else ())
    )[index]


def columns(tensors, head, layer=0):
    return tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:, head * d : head * d + d]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_counts_are_the_models_own(tmp_path, family, tied):
    folder = save(tmp_path, family, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = sizes(folder, window=16)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    parts = ("embedding", "attention", "ffn", "other")
    assert found["parameters"] == sum(found[f"{part}_parameters"] for part in parts)
    assert found["ffn_parameters"] == L * 3 * D * F
    assert found["embedding_parameters"] == (1 if tied else 2) * V * D
    assert found["effective_parameters"] == found["parameters"]
    assert found["checkpoint_bytes"] == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_a_real_cache(tmp_path, dtype):
    folder = save(tmp_path, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    cache = model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    held = sum(t.numel() * t.element_size() for t in itertools.chain(*layers))
    assert sizes(folder, 16)["kv_cache_bytes_per_token"] == held / 10


def test_flops_are_those_that_torch_counts(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    folder, window = save(tmp_path), 16
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(1, window, dtype=torch.long))
    full = 4 * L * H * d * window * window  # eager attention computes the masked half too
    expected = counter.get_total_flops() - full // 2
    assert sizes(folder, window)["flops_per_token"] * window == expected


def test_a_head_without_output_is_dead(tmp_path):
    folder = save(tmp_path)
    whole = sizes(folder, 16)["effective_parameters"]
    assert edited(folder, lambda t: columns(t, 1).zero_()) == whole - HEAD

    def both(tensors):  # heads 2 and 3 are all that read group 1
        columns(tensors, 2).zero_()
        columns(tensors, 3).zero_()

    assert edited(folder, both) == whole - 2 * HEAD - GROUP


def test_equal_heads_count_once(tmp_path):
    folder = save(tmp_path)
    whole = sizes(folder, 16)["effective_parameters"]

    def same_group(tensors):
        rows(tensors, "q", 1).copy_(rows(tensors, "q", 0))

    def across_groups(tensors):  # equal queries on other keys are another head
        rows(tensors, "q", 2).copy_(rows(tensors, "q", 0))

    def equal_groups(tensors):
        for projection in "kv":
            rows(tensors, projection, 1).copy_(rows(tensors, projection, 0))
        across_groups(tensors)

    def nearly(tensors):
        same_group(tensors)
        rows(tensors, "q", 1)[0, 0] *= 1 + 1e-6

    assert edited(folder, same_group) == whole - HEAD
    assert edited(folder, across_groups) == whole
    assert edited(folder, equal_groups) == whole - HEAD - GROUP
    assert edited(folder, nearly) == whole


def test_biases_count_and_tell_heads_apart(tmp_path):
    folder = save(tmp_path, "qwen2")
    whole = sizes(folder, 16)["effective_parameters"]

    def rows_only(tensors):
        rows(tensors, "q", 1).copy_(rows(tensors, "q", 0))

    def bias_too(tensors):
        rows_only(tensors)
        rows(tensors, "q", 1, kind="bias").copy_(rows(tensors, "q", 0, kind="bias"))

    assert edited(folder, rows_only) == whole
    assert edited(folder, bias_too) == whole - HEAD - d


def test_effective_parameters_see_every_layer(tmp_path):
    folder = save(tmp_path)
    whole = sizes(folder, 16)["effective_parameters"]
    assert edited(folder, lambda t: columns(t, 0, layer=1).zero_()) == whole - HEAD


def latency_settings(**more):
    latency = {"prompt": 4, "new_tokens": 3, "batch": 2, "runs": 5} | more
    compute = {"device": "cpu", "dtype": "float32", "threads": 1}
    return {"compute": compute, "evaluation": {"latency": latency}}


def test_latency_alternates_and_takes_quartiles(tmp_path, monkeypatch):
    from headroom.evaluation import cost

    folders = [save(tmp_path / name) for name in ("a", "b")]
    visited = []

    def decode(model, wanted):
        name = model.name_or_path.rsplit("/", 1)[-1]
        visited.append(name)
        return 100.0 if len(visited) <= 2 else 0.003 * len(visited) * (2 if name == "b" else 1)

    monkeypatch.setattr(cost, "_decode", decode)
    found = decode_latency([str(folder) for folder in folders], latency_settings())
    rounds = [set(visited[i : i + 2]) for i in range(0, 12, 2)]
    assert rounds == [{"a", "b"}] * 6, "each round meets every model once, one round warms up"
    assert [row["name"] for row in found] == ["a", "b"]
    for row in found:
        assert row["low"] < row["median"] < row["high"] < 1000, "the warm-up does not count"
        assert row["runs"] == 5


def test_latency_decodes_what_generate_does(tmp_path):
    from headroom.evaluation.cost import _decode

    model = AutoModelForCausalLM.from_pretrained(save(tmp_path)).eval()
    model.generation_config.eos_token_id = None  # random weights may say it: then generate stops
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    wanted = latency_settings()["evaluation"]["latency"]
    assert _decode(model, wanted) > 0
    assert [tuple(ids.shape) for ids in seen] == [(2, 4), (2, 1), (2, 1), (2, 1)]
    steps, prompt = torch.cat(seen[1:], dim=1), seen[0]
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False
    )
    assert torch.equal(expected[:, 4:], steps)


def test_latency_is_described_with_what_it_depends_on():
    text = describe_latency(latency_settings(prompt=77, batch=3))
    for part in ("77 tokens", "batch 3", "5 runs", "float32", "1 thread", "cpu"):
        assert part in text
    auto = latency_settings()
    auto["compute"]["device"] = "auto"
    assert ("cuda" if torch.cuda.is_available() else "cpu") in describe_latency(auto)
