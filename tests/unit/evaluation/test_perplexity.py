"""Perplexity against closed forms and the models' own loss; batch size and padding change nothing.

Spec: heads, check 7.
"""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headroom.corpora.tokens import Stream
from headroom.errors import InputError
from headroom.evaluation import perplexity
from headroom.evaluation.perplexity import judged_windows, score_documents, summary

VOCABULARY = 50
BOOTSTRAP = {"resamples": 200, "confidence": 0.95, "seed": 0}


def build(family="llama", seed=0, **more):
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def ragged(count=23, seed=0):
    """Sequences of 2 to 40 tokens; each token's document changes inside sequences."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 41, count)
    tokens = [rng.integers(VOCABULARY, size=length) for length in lengths]
    documents = [(i // 2) + (np.arange(length) > 15) for i, length in enumerate(lengths)]
    return tokens, documents


def rectangular(count=9, length=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(VOCABULARY, size=(count, length)), np.arange(count * length).reshape(
        count, length
    ) // 17


def test_uniform_model_has_its_vocabulary_as_perplexity():
    model = build(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = summary(score_documents(model, *ragged()), BOOTSTRAP)
    assert found["perplexity"]["value"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert found["perplexity"]["low"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert found["nll"]["value"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_equals_the_models_own_loss(family):
    model = build(family)
    tokens, documents = ragged()
    table = score_documents(model, tokens, documents, batch=5)
    total, correct = 0.0, 0
    with torch.no_grad():
        for sequence in tokens:
            ids = torch.from_numpy(sequence)[None]
            output = model(ids, labels=ids)
            total += float(output.loss) * (len(sequence) - 1)
            correct += int((output.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
    assert table.nll.sum() == pytest.approx(total, rel=1e-6)
    assert table.tokens.sum() == sum(map(len, tokens)) - len(tokens)
    assert table.correct.sum() == correct


def test_each_token_counts_for_its_document():
    model = build()
    tokens_NT, documents_NT = rectangular()
    table = score_documents(model, tokens_NT, documents_NT).set_index("document")
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens_NT)).logits[:, :-1].double().log_softmax(-1)
    targets = torch.from_numpy(tokens_NT)[:, 1:]
    nll = -logits.gather(-1, targets[..., None])[..., 0].numpy()
    for document in range(documents_NT.max() + 1):
        own = documents_NT[:, 1:] == document
        assert table.tokens[document] == own.sum()
        assert table.nll[document] == pytest.approx(nll[own].sum(), rel=1e-6)


def test_batch_size_padding_and_order_change_nothing():
    model = build()
    tokens, documents = ragged()
    alone = score_documents(model, tokens, documents, batch=1)
    order = np.random.default_rng(1).permutation(len(tokens))
    for batch, places in ((4, range(len(tokens))), (23, order), (7, order)):
        table = score_documents(
            model, [tokens[i] for i in places], [documents[i] for i in places], batch
        )
        np.testing.assert_allclose(table.nll, alone.nll, rtol=2e-6)
        for column in ("document", "tokens", "correct"):
            np.testing.assert_array_equal(table[column], alone[column])


def test_chunks_of_logits_change_nothing(monkeypatch):
    model = build().double()
    whole = score_documents(model, *ragged())
    monkeypatch.setattr(perplexity, "LOGITS", 7 * VOCABULARY + 1)
    chunked = score_documents(model, *ragged())
    np.testing.assert_allclose(chunked.nll, whole.nll, rtol=1e-12)


def test_logits_are_never_held_for_a_whole_batch(monkeypatch):
    model = build()
    monkeypatch.setattr(perplexity, "LOGITS", 10 * VOCABULARY)
    largest = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: largest.append(output.numel())
    )
    score_documents(model, *rectangular())
    assert max(largest) <= 10 * VOCABULARY


def test_half_precision_sums_in_full(monkeypatch):
    """bfloat16 has 8 bits: a log-sum-exp or a sum of 200 terms in it would be off by per cents."""
    model = build(tie_word_embeddings=False).bfloat16()
    torch.nn.init.zeros_(model.lm_head.weight)
    table = score_documents(model, *rectangular())
    assert table.nll.dtype == np.float64
    assert table.nll.sum() / table.tokens.sum() == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_perplexity_is_weighted_by_tokens_not_documents():
    import pandas as pd

    table = pd.DataFrame(
        {"document": [0, 1], "nll": [10.0, 400.0], "tokens": [10, 100], "correct": [9, 1]}
    )
    found = summary(table, BOOTSTRAP)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(410 / 110))
    assert found["accuracy"]["value"] == pytest.approx(10 / 110)
    assert found["nll"]["low"] == pytest.approx(1.0) and found["nll"]["high"] == pytest.approx(4.0)
    assert (found["documents"], found["tokens"]) == (2, 110)
    assert found["bootstrap"] == BOOTSTRAP


def test_bad_input_is_refused():
    model = build()
    tokens_NT, documents_NT = rectangular(length=65)
    with pytest.raises(InputError, match=r"evaluation.window: 65 tokens \(allowed: at most 64"):
        score_documents(model, tokens_NT, documents_NT)
    model.lm_head.weight.data[:] = math.nan
    with pytest.raises(InputError, match="not finite"):
        score_documents(model, *rectangular())


def test_judged_windows_are_the_first_or_spread_over_the_text():
    stream = Stream(np.arange(107), np.arange(107) // 10, "bos", 1)
    wanted = {"window": 10, "sequences": 4}
    first, _ = judged_windows(stream, wanted | {"choice": "first"})
    assert first[:, 0].tolist() == [0, 10, 20, 30]
    spread, documents = judged_windows(stream, wanted | {"choice": "spread"})
    assert spread[:, 0].tolist() == [0, 20, 50, 70]
    assert (documents == spread // 10).all()
    for choice in ("first", "spread"):  # fewer than asked for: all of them, in order
        every, _ = judged_windows(stream, wanted | {"sequences": 99, "choice": choice})
        assert (every == np.arange(100).reshape(10, 10)).all()
