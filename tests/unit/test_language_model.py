"""A Llama trained from scratch: what it reads, exact resume, loading it."""

import hashlib

import numpy as np
import pytest
import torch

from headroom import language_model
from headroom.corpora.tokens import save_stream, token_stream, train_tokenizer
from headroom.language_model import loss_sum, order, train_language_model

SETTINGS = {
    "vocabulary": 300,
    "hidden": 16,
    "layers": 1,
    "heads": 2,
    "groups": 1,
    "ffn": 16,
    "window": 16,
    "batch": 4,
    "tokens": 64 * 30,
    "learning_rate": 1e-2,
    "warmup": 2,
    "weight_decay": 0.1,
    "seed": 3,
    "threads": 1,
}
TEXTS = [f"The {a} number {i} is near the {b}." for i in range(60) for a, b in ("xy", "yz")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    train_tokenizer(TEXTS, 300, folder / "tokenizer")
    save_stream(token_stream(TEXTS, folder / "tokenizer"), folder / "tokens.safetensors")
    return folder


def trained(data, folder, state=None, **changed):
    folder.mkdir()
    tokens, tokenizer = data / "tokens.safetensors", data / "tokenizer"
    state = state or folder / "state"
    train_language_model(SETTINGS | changed, "cpu", str(tokens), str(tokenizer), folder, state)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.*")}


def test_each_epoch_reads_every_window_once_in_another_order():
    chosen = order(count=10, batch=4, seed=0)
    read = np.concatenate([chosen(step) for step in range(5)])
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10))
    assert read[:10].tolist() != read[10:].tolist()
    assert chosen(2).tolist() == order(10, 4, 0)(2).tolist()
    assert chosen(2).tolist() != order(10, 4, 1)(2).tolist()


def test_loss_is_the_models_own(data):
    model = language_model.build(SETTINGS, language_model.special_tokens(data / "tokenizer"))
    ids = torch.arange(32).reshape(2, 16)
    total, count = loss_sum(model, ids)
    assert count == 30
    torch.testing.assert_close(total / count, model(ids, labels=ids).loss)


def test_equal_settings_give_equal_bytes_and_others_not(data, tmp_path):
    first = trained(data, tmp_path / "a")
    torch.manual_seed(9)
    assert trained(data, tmp_path / "b") == first
    other = trained(data, tmp_path / "c", seed=4)
    assert other["model.safetensors"] != first["model.safetensors"]


def test_an_interrupted_training_ends_with_the_same_bytes(data, tmp_path, monkeypatch):
    whole = trained(data, tmp_path / "a")
    plan = language_model.Plan
    monkeypatch.setattr(language_model, "Plan", lambda **k: plan(**k, save_seconds=-1.0))
    calls = []

    def killed(model, samples):
        calls.append(1)
        if len(calls) > 17:
            raise KeyboardInterrupt
        return loss_sum(model, samples)

    monkeypatch.setattr(language_model, "loss_sum", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(data, tmp_path / "b", tmp_path / "state")
    monkeypatch.setattr(language_model, "loss_sum", loss_sum)
    assert trained(data, tmp_path / "c", tmp_path / "state") == whole


def test_stock_transformers_loads_a_model_that_has_learnt(data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained(data, tmp_path / "a", tokens=64 * 150)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    ids = tokenizer(tokenizer.bos_token + TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 3.0 < np.log(300)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 1
    assert (model.config.bos_token_id, model.config.pad_token_id) == (0, 2)
