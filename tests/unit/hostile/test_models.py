"""Models of strangers: no code of theirs is ever run, and pickles are opened only where asked."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from headroom import experiment
from headroom.checkpoints import check_manifest, load_model
from headroom.corpora import paraphrase_model
from headroom.errors import InputError
from headroom.imports import PICKLED, PICKLED_INDEX, import_checkpoint, import_translator

ROOT = Path(__file__).parents[3]
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}


class Trap:
    """What runs code when it is unpickled as usual."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def made(folder, tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def pickled(folder, shards=1, **more):
    """Write a model as pickles, in shards with an index where there are several."""
    model = made(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(model.state_dict())
    for number in range(shards):
        state = {name: model.state_dict()[name] for name in names[number::shards]}
        torch.save(state | (more if number else {}), folder / f"pytorch_model-{number}.bin")
    if shards == 1:
        torch.save(model.state_dict() | more, folder / PICKLED)
        (folder / "pytorch_model-0.bin").unlink()
    else:
        where = {name: f"pytorch_model-{names.index(name) % shards}.bin" for name in names}
        (folder / PICKLED_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return model


def imported(folder, output, **asked):
    output.mkdir()
    import_checkpoint({"path": str(folder), **asked}, "mine", output)
    return output


def refusal(call, *arguments, **options):
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def configured(folder, **asked):
    return {"checkpoints": {"mine": {"path": str(folder), **asked}}}


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_are_read_where_asked_and_kept_as_safetensors(tmp_path, shards):
    model = pickled(tmp_path / "model", shards)
    said = refusal(imported, tmp_path / "model", tmp_path / "refused")
    assert re.match(r"config key checkpoints\.mine: .*\.bin.*checkpoints\.mine\.pickle: true", said)
    assert refusal(experiment.load, configured(tmp_path / "model"), SCHEMA) == said
    experiment.load(configured(tmp_path / "model", pickle=True), SCHEMA)
    output = imported(tmp_path / "model", tmp_path / "out", pickle=True)
    check_manifest(output, hashes=True)
    assert not list(output.glob("*.bin*")) and (output / "model.safetensors").is_file()
    for loaded in (load_model(output), AutoModelForCausalLM.from_pretrained(output)):
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("asked", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path, shards, asked):
    pickled(tmp_path / "model", shards, more=Trap(tmp_path / "executed"))
    said = refusal(imported, tmp_path / "model", tmp_path / "out", pickle=asked)
    assert said.startswith("config key checkpoints.mine: ")
    assert ("can't be read as tensors alone" in said) == asked
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))
    for path in (tmp_path / "model").glob("*.bin"):
        torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists(), "where it is let, the trap does work"


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "weights.pth", "model.pkl"])
def test_other_pickles_are_refused_by_name(tmp_path, name):
    pickled(tmp_path / "model")
    (tmp_path / "model" / PICKLED).rename(tmp_path / "model" / name)
    said = refusal(experiment.load, configured(tmp_path / "model"), SCHEMA)
    assert name in said and said.startswith("config key checkpoints.mine: ")
    said = refusal(imported, tmp_path / "model", tmp_path / "out", pickle=True)
    assert "holds no weights that are read" in said


def test_safetensors_go_first_and_pickles_beside_them_are_left_alone(tmp_path):
    made(tmp_path / "model")
    torch.save({"x": Trap(tmp_path / "executed")}, tmp_path / "model" / PICKLED)
    for asked in (False, True):
        output = imported(tmp_path / "model", tmp_path / f"out{asked}", pickle=asked)
        assert {path.name for path in output.glob("*model*")} == {"model.safetensors"}
    assert not (tmp_path / "executed").exists()


def test_a_state_that_is_no_state_dict_or_lies_elsewhere_is_refused(tmp_path):
    pickled(tmp_path / "model", 2)
    elsewhere = {"metadata": {}, "weight_map": {"lm_head.weight": "../pytorch_model.bin"}}
    none, bare = {"metadata": {}}, {"weight_map": {"lm_head.weight": "pytorch_model-0.bin"}}
    told = ((elsewhere, "names the shard '../"), (none, "has no weight_map"), (bare, "no metadata"))
    for number, (index, said) in enumerate(told):
        (tmp_path / "model" / PICKLED_INDEX).write_text(json.dumps(index))
        folder = tmp_path / f"out{number}"
        assert said in refusal(imported, tmp_path / "model", folder, pickle=True)
    (tmp_path / "model" / PICKLED_INDEX).unlink()
    torch.save([1, 2], tmp_path / "model" / PICKLED)
    said = refusal(imported, tmp_path / "model", tmp_path / "b", pickle=True)
    assert "can't be read as tensors alone (no state dict" in said


CODE = """
from pathlib import Path
Path(__file__).with_name("executed").mkdir(exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig): model_type = "stranger"
class Model(LlamaForCausalLM): config_class = Config
class Tokenizer: pass
"""


def with_model_code(folder):
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    config |= {"auto_map": mapped, "model_type": "stranger"}
    (folder / "config.json").write_text(json.dumps(config))
    return "auto_map"


def with_tokenizer_code(folder):
    mapped = {"AutoTokenizer": ["strange.Tokenizer", None]}
    settings = {"tokenizer_class": "Tokenizer", "auto_map": mapped}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return "tokenizer_config.json has auto_map"


def with_a_kernel(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "me/kernel"}))
    return "attn_implementation"


def of_a_part(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"auto_map": {"AutoConfig": "strange.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    return "auto_map"


@pytest.mark.parametrize("code", [with_model_code, with_tokenizer_code, with_a_kernel, of_a_part])
def test_a_model_with_code_of_its_own_is_refused_before_any_is_imported(tmp_path, code):
    folder = tmp_path / "model"
    made(folder)
    (folder / "strange.py").write_text(CODE)
    said = code(folder)
    source = {"path": str(folder), "pickle": True}
    chat = {"instructions": {"x": {"packages": ["yaml"], "paraphraser": {"model": source}}}}
    del source["pickle"]
    calls = {
        "checkpoints.mine": lambda: imported(folder, tmp_path / "a"),
        "translators.mine": lambda: import_translator(source, "mine", tmp_path / "b"),
        "instructions.x.paraphraser.model": lambda: experiment.load(
            {"checkpoints": {"t": {"train": {}}}, **chat}, SCHEMA
        ),
        "here": lambda: paraphrase_model.paraphraser(source, "here"),
    }
    for key, call in calls.items():
        found = refusal(call)
        assert found.startswith(f"config key {key}: ") and said in found
    assert said in refusal(experiment.load, configured(folder), SCHEMA)
    assert not (folder / "executed").exists()
    assert not (folder / "__pycache__").exists()


def test_no_part_of_the_code_trusts_a_stranger():
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("workflow/**/*"), *ROOT.glob("benchmarks/*.py")]
    texts = {path: path.read_text() for path in files if path.is_file()}
    assert len(texts) > 100
    for path, text in texts.items():
        assert not re.search(r"trust_remote_code\W+(?!False)\w", text), path
        assert not re.search(r"weights_only\W+(?!True)\w", text), path
        assert not re.search(r"\bpickle\.loads?\b|\ballow_pickle\W+True|joblib", text), path
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
            assert "weights_only=True" in call, path


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "[" * 100_000, '{"a": "\ud83d"'])
def test_a_configuration_of_a_model_that_is_none_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, errors="replace")
    for key in ("checkpoints", "translators"):
        config = {"pairs": {"p": {"cldr": {}}}, key: {"mine": {"path": str(tmp_path)}}}
        said = refusal(experiment.load, config, SCHEMA)
        assert "config.json is no JSON" in said


@pytest.mark.parametrize("size", ["hidden_size", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, "8", -2, 1.5])
def test_sizes_that_are_none_are_named(tmp_path, size, value):
    made(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {size: value}))
    said = refusal(experiment.load, configured(tmp_path / "model"), SCHEMA)
    assert said.startswith(f"config key checkpoints.mine: {size} is {value!r}")
