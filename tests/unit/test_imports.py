"""Translators of others: repositories in the shape of opus-mt, brought in and used."""

import io
import json
import os
import shutil

import pytest
import sentencepiece
import torch
from transformers import MarianConfig, MarianMTModel, MarianTokenizer

from headroom.checkpoints import check_manifest, load_tokenizer
from headroom.corpora.pair_tokens import encode_pairs
from headroom.errors import InputError
from headroom.evaluation.translation import translate
from headroom.gates import removal
from headroom.imports import import_translator

SOURCES = ["The small dog runs home.", "A red house stands there.", "Two birds sing.", "Dogs sing?"]
TARGETS = [
    "Der kleine Hund rennt heim.",
    "Dort steht ein rotes Haus.",
    "Zwei Vögel singen.",
    "Ach?",
]
TOKENIZER = {"source.spm", "target.spm", "vocab.json", "tokenizer_config.json"}
LONGEST = 24


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Files of a Marian tokenizer as opus-mt repositories have them: </s> 0, <pad> the last."""
    folder, pieces = tmp_path_factory.mktemp("words"), ["</s>", "<unk>"]
    for side, texts in (("source", SOURCES), ("target", TARGETS)):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / f"{side}.spm").write_bytes(model.getvalue())
        read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        pieces += [read.id_to_piece(number) for number in range(3, len(read))]
    pieces = [*dict.fromkeys(pieces), "<pad>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    languages = {"source_lang": "en", "target_lang": "de"}
    (folder / "tokenizer_config.json").write_text(json.dumps(languages))
    return folder


def marian(vocabulary):
    """A Marian whose heads and biases all matter, in float32, pad and start the last number."""
    pad, part = vocabulary - 1, {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
    config = MarianConfig(
        vocab_size=vocabulary,
        d_model=32,
        max_position_embeddings=64,
        activation_function="swish",
        scale_embedding=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        forced_eos_token_id=0,
        **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in part.items()},
    )
    model = MarianMTModel(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "embed_positions" not in name:
                # Small biases: large ones would say the same whatever the source.
                size = 0.1 if "bias" in name else 1.0 if "encoder_attn" in name else 0.4
                tensor.copy_(("norm.weight" in name) + size * torch.randn(tensor.shape))
        model.final_logits_bias.normal_(std=0.1)
        model.final_logits_bias[0, pad] = 9.0  # what only the ban on it keeps back
    return model


def repository(folder, words, weights):
    """Write what a published repository holds, with more files than are read."""
    shutil.copytree(words, folder)
    model = marian(len(json.loads((words / "vocab.json").read_text())))
    pad = model.config.pad_token_id
    how = {"num_beams": 4, "bad_words_ids": [[pad]], "max_length": 64, "forced_eos_token_id": 0}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": pad, "decoder_start_token_id": pad}
    config = json.loads(model.config.to_json_string(use_diff=False)) | how | ids
    drop = ("dtype", "transformers_version", "tie_word_embeddings", "_name_or_path")
    config = {name: value for name, value in config.items() if name not in drop}
    config |= {"architectures": ["MarianMTModel"], "static_position_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps(how | ids | {"renormalize_logits": True, "_from_model_config": True})
    )
    (folder / "README.md").write_text("A model.")
    if weights == "model.safetensors":
        model.save_pretrained(folder / "again")
        shutil.move(folder / "again" / weights, folder / weights)
        shutil.rmtree(folder / "again")
    else:
        torch.save(model.state_dict(), folder / weights)
    return model


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def published(request, tmp_path, words):
    return tmp_path / "opus", repository(tmp_path / "opus", words, request.param), request.param


def imported(source, folder, **more):
    folder.mkdir()
    commit = import_translator({"path": str(source), "pickle": True, **more}, "mine", folder)
    assert commit is None
    return folder


def by_hand(model, source, longest):
    """Greedy decoding without generate: argmax without pad, the end at the limit at the latest."""
    tokens = [model.config.pad_token_id]
    while len(tokens) <= longest and (len(tokens) == 1 or tokens[-1] != 0):
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
        logits[model.config.pad_token_id] = -torch.inf
        tokens.append(0 if len(tokens) == longest else int(logits.argmax()))
    return tokens


def test_an_import_holds_the_model_and_its_tokenizer(published, tmp_path, words):
    source, model, weights = published
    folder = imported(source, tmp_path / "mine")
    check_manifest(folder, hashes=True)
    wanted = {*TOKENIZER, "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*wanted, "manifest.json"}
    linked = {path.name for path in folder.iterdir() if path.is_symlink()}
    assert linked == (wanted if weights == "model.safetensors" else TOKENIZER)
    loaded = removal.load(folder)
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: torch.float32 for name, _ in model.named_parameters()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_each_side_is_encoded_with_its_own_pieces(published, tmp_path):
    source, _, _ = published
    tokenizer = load_tokenizer(imported(source, tmp_path / "mine"))
    assert isinstance(tokenizer, MarianTokenizer)
    pairs = encode_pairs(SOURCES, TARGETS, tokenizer, LONGEST)
    vocabulary = json.loads((source / "vocab.json").read_text())
    for side, texts, tokens in (
        ("source", SOURCES, pairs.source),
        ("target", TARGETS, pairs.target),
    ):
        pieces = sentencepiece.SentencePieceProcessor(str(source / f"{side}.spm"))
        for place, text in enumerate(texts):
            wanted = [vocabulary.get(piece, 1) for piece in pieces.encode(text, out_type=str)]
            assert tokens(place).tolist() == [*wanted, 0]


def test_one_beam_is_greedy_whatever_the_repository_asks_for(published, tmp_path):
    source, model, _ = published
    folder = imported(source, tmp_path / "mine")
    loaded, tokenizer = removal.load(folder), load_tokenizer(folder)
    assert loaded.generation_config.num_beams == 4
    found = translate(loaded, tokenizer, SOURCES, 1, 64, LONGEST)
    by_argmax = [
        by_hand(model, torch.tensor([tokenizer(text)["input_ids"]]), LONGEST) for text in SOURCES
    ]
    assert found == [t.strip() for t in tokenizer.batch_decode(by_argmax, skip_special_tokens=True)]
    assert all(found) and len(set(found)) > 1
    assert translate(loaded, tokenizer, SOURCES, 4, 256, LONGEST) != found


def test_an_old_repository_tells_how_to_generate_in_its_config(published, tmp_path):
    source, model, _ = published
    (source / "generation_config.json").unlink()
    folder = imported(source, tmp_path / "mine")
    loaded, tokenizer = removal.load(folder), load_tokenizer(folder)
    pad = model.config.pad_token_id
    assert loaded.generation_config.bad_words_ids == [[pad]]
    wanted = by_hand(model, torch.tensor([tokenizer(SOURCES[0])["input_ids"]]), LONGEST)
    assert translate(loaded, tokenizer, SOURCES[:1], 1, 64, LONGEST) == [
        tokenizer.decode(wanted, skip_special_tokens=True).strip()
    ]


class Code:
    """Runs when it is unpickled as usual."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def without_weights(folder):
    (folder / "pytorch_model.bin").unlink()


def of_another_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))


def without_config(folder):
    (folder / "config.json").unlink()


def with_code(folder):
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(state | {"more": Code(folder.parent / "executed")}, folder / "pytorch_model.bin")


def cut_short(folder):
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def without_a_tensor(folder):
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del state["model.encoder.layers.1.self_attn.q_proj.weight"]
    torch.save(state, folder / "pytorch_model.bin")


def of_other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"encoder_ffn_dim": 64}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_weights, "holds no weights that are read (allowed: model.safetensors"),
        (of_another_family, "model_type 't5' is no translator that is served (allowed: marian)"),
        (without_config, "there is no config.json"),
        (with_code, "pytorch_model.bin can't be read as tensors alone"),
        (cut_short, "pytorch_model.bin can't be read as tensors alone"),
        (without_a_tensor, "lacks model.encoder.layers.1.self_attn.q_proj.weight"),
        (of_other_sizes, "don't fit its config.json"),
    ],
)
def test_what_is_no_translator_is_refused_in_one_line(tmp_path, words, damage, said):
    repository(tmp_path / "opus", words, "pytorch_model.bin")
    damage(tmp_path / "opus")
    with pytest.raises(InputError) as error:
        imported(tmp_path / "opus", tmp_path / "mine")
    assert str(error.value).startswith("config key translators.mine: ")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_hub_translator_is_fetched_without_its_second_copies(published, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    source, model, _ = published
    snapshot = tmp_path / "snapshots" / ("0123456789" * 4)
    needed = {path.name for path in source.iterdir()} - {"README.md"}
    others = ["README.md", "tf_model.h5", "rust_model.ot", "flax_model.msgpack", "onnx/model.onnx"]

    def download(repository, revision, allow_patterns, ignore_patterns, tqdm_class):
        assert (repository, revision) == ("someone/opus", "main")
        wanted = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        assert set(filter_repo_objects([*sorted(needed), *others], **wanted)) == needed
        shutil.copytree(source, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    output = tmp_path / "mine"
    output.mkdir()
    asked = {"hub": "someone/opus", "revision": "main", "pickle": True}
    commit = import_translator(asked, "mine", output)
    assert commit == "0123456789" * 4
    shared = "model.shared.weight"
    assert torch.equal(removal.load(output).state_dict()[shared], model.state_dict()[shared])


def test_a_hub_that_can_not_be_reached_is_told_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route\nto the host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"^config key translators\.mine\.hub: a/b can't") as error:
        import_translator({"hub": "a/b", "revision": "main"}, "mine", tmp_path)
    assert "\n" not in str(error.value)
