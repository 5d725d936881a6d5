"""Checkpoints: derived copies shard by shard, manifests, what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from headroom.checkpoints import (
    Tensors,
    check_manifest,
    geometry,
    load_model,
    read_config,
    replacing,
    write_derived,
    write_json,
    write_manifest,
)
from headroom.errors import InputError
from headroom.evaluation.cost import sizes
from headroom.imports import import_checkpoint
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


def test_a_manifest_that_was_cut_off_is_named(checkpoint):
    write_manifest(checkpoint)
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text()[:20])
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        check_manifest(checkpoint)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    for broken in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, broken)
    with pytest.raises(OSError), replacing(path, durable=True) as part:
        part.write_text("half")
        raise OSError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


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


def test_an_import_takes_each_weight_once(checkpoint, tmp_path):
    """Repositories hold the same weights again under names that transformers doesn't read."""
    shards = {path.name for path in checkpoint.glob("*.safetensors")}
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        (checkpoint / name).write_bytes(b"the same again")
    output = tmp_path / "imported"
    output.mkdir()
    assert import_checkpoint({"path": str(checkpoint)}, "mine", output) is None
    assert {path.name for path in output.glob("*.safetensors")} == shards
    weights = sum((checkpoint / name).stat().st_size for name in shards)
    assert sizes(checkpoint, 16)["checkpoint_bytes"] == weights
    assert sizes(output, 16)["checkpoint_bytes"] == weights
    if len(shards) > 1:
        (checkpoint / sorted(shards)[0]).unlink()
        (tmp_path / "again").mkdir()
        with pytest.raises(InputError, match=r"checkpoints.mine: .* lacks model-00001-of"):
            import_checkpoint({"path": str(checkpoint)}, "mine", tmp_path / "again")


def test_a_hub_checkpoint_is_fetched_once_and_its_commit_told(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    weights = [path.name for path in checkpoint.iterdir()]
    offered = [*weights, "consolidated.safetensors", "original/params.json", "pytorch_model.bin"]
    snapshot = tmp_path / "snapshots" / ("0123456789" * 4)

    def download(repository, revision, allow_patterns, ignore_patterns, tqdm_class):
        assert (repository, revision) == ("someone/model", "main")
        wanted = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        assert sorted(filter_repo_objects(offered, **wanted)) == sorted(weights)
        shutil.copytree(checkpoint, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    output = tmp_path / "imported"
    output.mkdir()
    commit = import_checkpoint({"hub": "someone/model", "revision": "main"}, "mine", output)
    assert commit == "0123456789" * 4
    assert Tensors(output).names() == Tensors(checkpoint).names()


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/tmp/x.safetensors", "a\\b.safetensors", "x"]
)
def test_an_index_names_no_file_elsewhere(checkpoint, tmp_path, shard):
    index = {"weight_map": {"lm_head.weight": shard}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"index.json names the shard"):
        Tensors(checkpoint)
    with pytest.raises(InputError, match=r"index.json names the shard"):
        import_checkpoint({"path": str(checkpoint)}, "mine", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


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
