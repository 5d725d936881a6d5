"""Roles of heads: planted ones by their closed form, any one by transformers' own weights."""

import math

import pytest
import torch

from headroom.errors import InputError
from headroom.gates.gated import attention_kind, attention_layer
from headroom.gates.removal import remove
from headroom.gates.roles import roles

from .small_translators import translator

V = 61
FREQUENCY = torch.arange(V, dtype=torch.float) ** 2  # the lower a token's number, the rarer it is
SENTENCES = (([5, 9, 7, 8, 1], [4, 3, 1]), ([30, 2, 44, 1], [6, 6, 7, 8, 9, 1]), ([12, 1], [3, 1]))
PAIRS = [{"input_ids": torch.tensor([s]), "labels": torch.tensor([t])} for s, t in SENTENCES]


def plant(model, name, head, query_of, key_of):
    """Give a head scores 60 · query_of · key_of by replacing what its projections return."""
    attention = model.get_submodule(name)
    rows = slice(8 * head, 8 * head + 8)

    def replace(values, scale):
        def hook(module, args, output):
            output = output.clone()
            output[..., rows] = values(output.shape[1]) * scale
            return output

        return hook

    attention.q_proj.register_forward_hook(replace(query_of, 60 / attention.scaling))
    attention.k_proj.register_forward_hook(replace(key_of, 1.0))


def angles(shift):
    """Rows (cos, sin, 0, …): their products are largest where the angles are equal."""

    def values(length):
        angle = (torch.arange(length) + shift) * 0.15
        return torch.stack([angle.cos(), angle.sin(), *[angle * 0] * 6], -1)

    return values


def by_place(rows):
    return {(row["attention"], row["layer"], row["head"]): row for row in rows}


@pytest.mark.parametrize("offset", [-2, -1, 0, 1])
def test_a_positional_head_by_its_closed_form(offset):
    model = translator()
    plant(model, "model.encoder.layers.1.self_attn", 2, angles(offset), angles(0))
    plant(model, "model.decoder.layers.0.self_attn", 0, angles(offset), angles(0))
    long = [{"input_ids": torch.tensor([[*range(2, n + 1), 1]]),
             "labels": torch.tensor([[*range(3, n + 2), 1]])} for n in (8, 20, 17)]  # fmt: skip
    found = by_place(roles(model, long, FREQUENCY, ["encoder", "decoder"]))
    row, possible = found["encoder", 2, 3], (8 + 20 + 17) - 3 * abs(offset)
    assert (row["offset"], row["positional_inside"]) == (offset, 1.0)
    assert row["positional"] == pytest.approx(possible / 45)
    assert row["is_positional"] is (possible / 45 >= 0.9)
    row = found["decoder", 1, 1]  # what comes later is masked: it looks at itself instead
    assert (row["offset"], row["positional_inside"]) == (min(offset, 0), 1.0)
    assert not found["encoder", 1, 1]["is_positional"]


def test_a_head_that_looks_at_the_rarest_token():
    model = translator()
    rarest = {len(source): min(range(len(source)), key=lambda i, s=source: s[i] if s[i] > 1 else V)
              for source, _ in SENTENCES}  # fmt: skip

    def ones(length):
        return torch.ones(length, 8)

    def at_rarest(length):
        return torch.nn.functional.one_hot(torch.tensor(rarest[length]), length)[:, None].float()

    plant(model, "model.encoder.layers.0.self_attn", 1, ones, at_rarest)
    plant(model, "model.decoder.layers.1.encoder_attn", 3, ones, at_rarest)
    found = by_place(roles(model, PAIRS, FREQUENCY, ["encoder", "cross"]))
    for row in (found["encoder", 1, 2], found["cross", 2, 4]):
        assert row["rare"] == 1.0
        assert row["confidence"] == pytest.approx(1.0, abs=1e-6)
    assert found["encoder", 1, 2]["rare_baseline"] == pytest.approx((4 / 4 + 3 / 3 + 1) / 8)
    assert found["cross", 2, 4]["rare_baseline"] == pytest.approx((3 / 4 + 6 / 3 + 2) / 11)
    assert found["encoder", 1, 1]["rare"] < 1.0


def test_equally_rare_tokens_count_alike_and_ends_do_not():
    pair = [{"input_ids": torch.tensor([[7, 9, 7, 8, 1]]), "labels": torch.tensor([[4, 1]])}]
    row = roles(translator(), pair, FREQUENCY)[0]
    assert row["rare_baseline"] == 0.5  # 2 of 4, though the end itself is rarer


@torch.no_grad()
def test_the_roles_are_those_of_the_weights_that_transformers_shows():
    model = translator(seed=3)
    found = by_place(roles(model, PAIRS, FREQUENCY, ["cross", "decoder", "encoder"]))
    model.set_attn_implementation("eager")
    sums = {key: [0.0, 0, 0] for key in found}
    for pair in PAIRS:
        target = torch.cat([torch.tensor([[0]]), pair["labels"][:, :-1]], 1)
        out = model(input_ids=pair["input_ids"], decoder_input_ids=target, output_attentions=True)
        source = pair["input_ids"][0, :-1]  # without the end
        kinds = {"encoder": out.encoder_attentions, "decoder": out.decoder_attentions,
                 "cross": out.cross_attentions}  # fmt: skip
        for kind, layers in kinds.items():
            for layer, weights_1HTS in enumerate(layers):
                for head, weights in enumerate(weights_1HTS[0]):
                    real = weights if kind == "decoder" else weights[:, :-1]
                    real = real[:-1] if kind == "encoder" else real
                    total = sums[kind, layer + 1, head + 1]
                    total[0] += float(real.max(-1).values.sum())
                    total[1] += len(real)
                    if kind != "decoder":
                        total[2] += int((source[real.argmax(-1)] == source.min()).sum())
    assert len(found) == 3 * 2 * 4
    for (kind, layer, head), (confidence, count, rare) in sums.items():
        row = found[kind, layer, head]
        assert row["confidence"] == pytest.approx(confidence / count, rel=1e-5)
        assert row["rare"] == (None if kind == "decoder" else rare / count)
        assert (row["offset"] is None) == (row["positional"] is None) == (kind == "cross")


def test_the_order_of_sentences_is_no_matter_to_the_last_bit():
    model = translator()
    both = ["encoder", "decoder", "cross"]
    assert roles(model, PAIRS, FREQUENCY, both) == roles(model, PAIRS[::-1], FREQUENCY, both)
    assert roles(model, PAIRS, FREQUENCY, ["encoder"]) == roles(model, PAIRS * 2, FREQUENCY)


def test_heads_that_are_gone_have_no_role():
    model = translator()
    remove(model, {"model.encoder.layers.0.self_attn": torch.zeros(4),
                   "model.encoder.layers.1.self_attn": torch.tensor([0.0, 1, 0, 1])})  # fmt: skip
    assert [(row["layer"], row["head"]) for row in roles(model, PAIRS, FREQUENCY)] == [
        (2, 1), (2, 2)
    ]  # fmt: skip


def test_places_and_what_is_refused():
    for name, kind, layer in (
        ("model.encoder.layers.0.self_attn", "encoder", 1),
        ("model.decoder.layers.11.self_attn", "decoder", 12),
        ("model.decoder.layers.1.encoder_attn", "cross", 2),
        ("model.layers.3.self_attn", "decoder", 4),  # of a decoder-only model
    ):
        assert (attention_kind(name), attention_layer(name)) == (kind, layer)
    with pytest.raises(InputError, match="attention 'self'"):
        roles(translator(), PAIRS, FREQUENCY, ["self"])
    for pairs in ([], [{"input_ids": torch.tensor([[1]]), "labels": torch.tensor([[1]])}]):
        with pytest.raises(InputError, match="no sentence"):
            roles(translator(), pairs, FREQUENCY)
    assert math.isfinite(roles(translator(), PAIRS, FREQUENCY)[0]["confidence"])
