"""The trained tokenizer, token streams and windows."""

import json
import subprocess
import sys

import numpy as np
import pytest

from headroom.corpora.tokens import (
    Stream,
    boundary_token,
    load_stream,
    save_stream,
    token_stream,
    train_tokenizer,
    windows,
)
from headroom.errors import InputError

TEXTS = [f"The {a} number {i} is near the {b}." for i in range(40) for a, b in ("xy", "yz")]
STRANGE = ["", "<s> and </s>", "naïve 北京 \U0001f600\n\ttabs", "  two  spaces "]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, folder)
    return folder


def test_transformers_loads_it_with_all_specials(tokenizer):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert len(loaded) == 300
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    for text in TEXTS[:5] + STRANGE:
        numbers = loaded(text, add_special_tokens=False).input_ids
        assert loaded.decode(numbers) == text  # bytes: nothing is lost


def test_stream_equals_transformers_and_holds_no_stray_boundary(tokenizer):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    texts = TEXTS[:3] + STRANGE
    stream = token_stream(texts, tokenizer)
    assert (stream.boundary, stream.boundary_token) == ("bos", 0)
    assert stream.tokens.dtype == stream.documents.dtype == np.int32
    for index, text in enumerate(texts):
        expected = loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert stream.tokens[stream.documents == index].tolist() == [0, *expected]
    assert (stream.tokens == 0).sum() == len(texts)  # "<s>" in a text begins no document


def test_slow_path_gives_the_same_stream(tokenizer, tmp_path, monkeypatch):
    from headroom.corpora import tokens

    fast = token_stream(TEXTS[:5] + STRANGE, tokenizer)
    monkeypatch.setattr(tokens.Path, "is_file", lambda path: False)
    loaded = tokens.encoder(tokenizer)
    monkeypatch.undo()
    monkeypatch.setattr(tokens, "encoder", lambda folder: loaded)
    slow = token_stream(TEXTS[:5] + STRANGE, tokenizer)
    np.testing.assert_array_equal(slow.tokens, fast.tokens)


def test_batches_of_documents_change_nothing(tokenizer, monkeypatch):
    from headroom.corpora import tokens

    whole = token_stream(TEXTS, tokenizer)
    monkeypatch.setattr(tokens, "BATCH", 7)
    parts = token_stream(iter(TEXTS), tokenizer)
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_array_equal(parts.documents, whole.documents)


def test_boundaries(tokenizer):
    bare = token_stream(TEXTS[:2], tokenizer, "none")
    assert bare.boundary_token is None and not np.isin(bare.tokens, [0, 1, 2]).any()
    ended = token_stream(TEXTS[:2], tokenizer, "eos")
    assert (ended.tokens == 1).sum() == 2 and ended.tokens[0] == 1
    assert len(ended.tokens) == len(bare.tokens) + 2


def test_auto_falls_back_and_missing_boundary_is_named(tokenizer, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer / name).read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"bos_token": None, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert token_stream(TEXTS[:2], tmp_path).boundary == "eos"
    with pytest.raises(InputError, match=r"corpora.x.boundary: .*no bos.*allowed: eos, none"):
        token_stream(TEXTS[:2], tmp_path, "bos", key="corpora.x")
    with pytest.raises(InputError, match=r"no eos.*allowed: none"):
        boundary_token({"bos": None, "eos": None}, "auto", "corpora.x")
    with pytest.raises(InputError, match="no text"):
        token_stream([], tokenizer)


def test_training_is_deterministic_and_light(tokenizer, tmp_path):
    code = (
        "import sys; from headroom.corpora.tokens import train_tokenizer, token_stream;"
        f"t = {TEXTS!r}; train_tokenizer(t, 300, sys.argv[1]); token_stream(t, sys.argv[1]);"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PYTHONPATH": "src", "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer / name).read_bytes()


@pytest.mark.parametrize(("size", "message"), [(258, "at least 259"), (9999, "fills")])
def test_impossible_vocabularies_are_refused(tmp_path, size, message):
    with pytest.raises(InputError, match=message):
        train_tokenizer(TEXTS, size, tmp_path)


def test_stream_survives_its_file(tokenizer, tmp_path):
    for boundary in ("bos", "none"):
        stream = token_stream(TEXTS, tokenizer, boundary)
        save_stream(stream, tmp_path / "a.safetensors")
        found = load_stream(tmp_path / "a.safetensors")
        np.testing.assert_array_equal(found.tokens, stream.tokens)
        np.testing.assert_array_equal(found.documents, stream.documents)
        assert (found.boundary, found.boundary_token) == (stream.boundary, stream.boundary_token)


def test_windows_partition_the_stream():
    stream = Stream(np.arange(23, dtype=np.int32), np.arange(23, dtype=np.int32) // 4, "none", None)
    tokens_NT, documents_NT = windows(stream, 5)
    assert tokens_NT.shape == (4, 5) and tokens_NT.dtype == documents_NT.dtype == np.int64
    assert tokens_NT.ravel().tolist() == list(range(20))
    assert documents_NT.ravel().tolist() == [i // 4 for i in range(20)]
    for length in (24, 1, 0):
        with pytest.raises(InputError, match=r"evaluation.window is \d+: the text has 23 tokens"):
            windows(stream, length, key="evaluation.window")
