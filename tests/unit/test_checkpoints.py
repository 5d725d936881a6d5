"""Checkpoints: derived copies shard by shard, manifests, what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from headroom.checkpoints import (
    Tensors,
    check_manifest,
    geometry,
    import_checkpoint,
    load_model,
    read_config,
    write_derived,
    write_manifest,
)
from headroom.errors import InputError
from headroom.verify import verify

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(params=["one file", "sharded"])
def checkpoint(request, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    size = "5GB" if request.param == "one file" else "6KB"
    model.save_pretrained(tmp_path / "model", max_shard_size=size)
    return tmp_path / "model"


def test_a_derived_copy_changes_what_is_asked_and_loads_with_stock_transformers(
    checkpoint, tmp_path
):
    name, output = "model.layers.1.self_attn.q_proj.weight", tmp_path / "derived"
    output.mkdir()

    def replace(found, tensor):
        return tensor * 2 if found == name else tensor

    write_derived(checkpoint, output, read_config(checkpoint), replace)
    before = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    after = AutoModelForCausalLM.from_pretrained(output).state_dict()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor * 2 if key == name else tensor), key
    assert Tensors(output).names() == Tensors(checkpoint).names()
    check_manifest(output, hashes=True)


def test_shapes_come_from_headers(checkpoint):
    tensors = Tensors(checkpoint)
    assert {n: (list(tensors[n].shape), "F32") for n in tensors.names()} == tensors.shapes()


def test_damage_is_named(checkpoint):
    write_manifest(checkpoint)
    assert verify(checkpoint.parent) == []
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    check_manifest(checkpoint)  # sizes alone don't show it
    assert file.name in verify(checkpoint.parent)[0]
    file.write_bytes(data[:-10])
    with pytest.raises(InputError, match=f"{file.name} is damaged"):
        load_model(checkpoint)
    file.unlink()
    with pytest.raises(InputError, match="missing"):
        Tensors(checkpoint)


def test_an_import_links_and_refuses_pickles(checkpoint, tmp_path):
    output = tmp_path / "imported"
    output.mkdir()
    import_checkpoint({"path": str(checkpoint)}, "mine", output)
    assert (output / "config.json").is_symlink()
    check_manifest(output, hashes=True)
    pickled, empty = tmp_path / "pickled", tmp_path / "out"
    pickled.mkdir(), empty.mkdir()
    (pickled / "config.json").write_text((checkpoint / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"checkpoints.mine: .* holds no .safetensors"):
        import_checkpoint({"path": str(pickled)}, "mine", empty)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"num_key_value_heads": 3}, "don't divide"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_the_studies_cannot_serve_is_refused(change, said):
    config = {"model_type": "llama", **SIZES, "num_attention_heads": 4} | change
    with pytest.raises(InputError, match=said):
        geometry(json.loads(json.dumps(config)))
