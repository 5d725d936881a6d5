"""Costs: FLOPs by the closed form, latency of exactly what was asked for."""

import pytest
import torch

from headroom.errors import InputError
from headroom.gates.cost import flops, latency
from headroom.gates.removal import remove

from .small_translators import translator

D, F, V, LAYERS = 32, 48, 61, 2
S, T = 11, 7


def attention(queries, keys, width=D):
    """Multiply-adds: q and W_O over the queries, k and v over the keys, scores and values."""
    return 2 * queries * D * width + 2 * keys * D * width + 2 * queries * keys * width


def whole():
    encoder = attention(S, S) + 2 * S * D * F
    decoder = attention(T, T) + attention(T, S) + 2 * T * D * F
    return 2 * (LAYERS * (encoder + decoder) + T * D * V)


def test_flops_are_those_of_the_closed_form():
    model = translator()
    model.set_attn_implementation("sdpa")
    assert flops(model, S, T) == whole()
    assert model.config._attn_implementation == "sdpa"


def test_each_removed_head_takes_its_share():
    """With all heads of a layer closed, too; heads of cross attention take queries and keys."""
    for closed in (1, 3, 4):
        gate_H = torch.arange(4) >= closed
        model = translator()
        remove(model, {"model.encoder.layers.1.self_attn": gate_H})
        assert flops(model, S, T) == whole() - closed * (8 * S * D * 8 + 4 * S * S * 8)
        remove(model, {"model.decoder.layers.0.encoder_attn": gate_H})
        assert flops(model, S, T) == whole() - closed * 2 * (
            attention(S, S, 8) + attention(T, S, 8)
        )


def test_latency_covers_every_model_and_batch_size_and_warms_up():
    models = {"whole": translator(), "smaller": translator()}
    remove(models["smaller"], {"model.decoder.layers.0.self_attn": torch.zeros(4)})
    turns, threads = [], torch.get_num_threads()
    for name, model in models.items():
        generate = model.generate

        def spy(name=name, generate=generate, **settings):
            turns.append((name, len(settings["input_ids"])))
            return generate(**settings)

        model.generate = spy
    rows = latency(models, [1, 3], source=5, new_tokens=4, runs=2, threads=1)
    assert [(row["name"], row["batch"]) for row in rows] == [
        ("whole", 1), ("smaller", 1), ("whole", 3), ("smaller", 3)
    ]  # fmt: skip
    assert turns == [("whole", 1), ("smaller", 1)] * 3 + [("whole", 3), ("smaller", 3)] * 3
    for row in rows:
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["runs"] == 2
    assert torch.get_num_threads() == threads


def test_latency_refuses_what_it_can_not_measure():
    models = {"whole": translator()}
    with pytest.raises(InputError, match="at least 2"):
        latency(models, [1], source=5, new_tokens=4, runs=1, threads=1)
    with pytest.raises(InputError, match="at most 64"):
        latency(models, [1], source=5, new_tokens=65, runs=2, threads=1)
