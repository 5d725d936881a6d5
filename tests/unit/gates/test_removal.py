"""Removal: the same translations from fewer parameters, in memory and on disk."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MarianMTModel

from headroom.attention import attention_modules, tapped
from headroom.checkpoints import check_manifest
from headroom.errors import InputError
from headroom.gates.removal import (
    ClosedAttention,
    difference,
    fold,
    load,
    parameters_per_head,
    remove,
    save,
)

from .small_translators import batch, translator

MIXED = [1.0, 0.0, 0.37, 0.0]
DECODER = [f"model.decoder.layers.{n}.{kind}" for n in (0, 1) for kind in
           ("self_attn", "encoder_attn")]  # fmt: skip
ENCODER = [f"model.encoder.layers.{n}.self_attn" for n in (0, 1)]


def gates_of(closed=(), mixed=()):
    return {name: torch.zeros(4) for name in closed} | {name: torch.tensor(MIXED) for name in mixed}


def kept_of(gates):
    return {name: gate_H.nonzero().flatten().tolist() for name, gate_H in gates.items()}


def removed(gates):
    model = translator()
    remove(model, gates)
    return model


def gated(model, gates):
    """By a tap of its own, not the one under test."""
    gate_of = {m: gates[name] for name, m in attention_modules(model) if name in gates}
    one = torch.ones(4)
    return tapped(model, lambda m, q, k, v, z: z * gate_of.get(m, one).view(1, 1, 4, 1))


CASES = {
    "one head of each": gates_of(mixed=[*ENCODER, *DECODER]),
    "encoder closed": gates_of(ENCODER, DECODER),
    "decoder closed": gates_of([DECODER[0], DECODER[2]], ENCODER),
    "cross closed": gates_of([DECODER[1], DECODER[3]], ENCODER),
    "everything closed": gates_of([*ENCODER, *DECODER]),
}


@pytest.mark.parametrize("gates", CASES.values(), ids=CASES)
def test_removed_and_folded_models_equal_the_gated_one_padding_included(gates):
    model, smaller, folded = translator(), removed(gates), translator()
    fold(folded, gates)
    batches = [batch(0), batch(1, ((3, 9), (8, 2)))]
    assert difference(model, gates, smaller, batches) < 1e-5
    assert difference(model, gates, folded, batches) < 1e-5
    with gated(model, gates):
        expected = model(**batch(0)).logits
    torch.testing.assert_close(smaller(**batch(0)).logits, expected, atol=1e-5, rtol=0)
    assert difference(model, gates, translator(), batches) > 1e-2  # so the gates do something


def test_parameters_fall_by_the_formula_and_biases_stay():
    gates = gates_of([ENCODER[0], DECODER[0]], [DECODER[1]])
    whole, smaller = translator(), removed(gates)
    closed = 4 + 4 + 2
    assert parameters_per_head(512, 64) == 131264
    fallen = whole.num_parameters() - smaller.num_parameters()
    # All parameters of a closed attention but W_O's bias are those of its heads.
    assert fallen == closed * parameters_per_head(32, 8)
    for name in gates:
        before, after = (dict(m.named_parameters())[f"{name}.out_proj.bias"]
                         for m in (whole, smaller))  # fmt: skip
        assert torch.equal(before, after)


def test_folding_leaves_nothing_of_closed_heads():
    model = translator()
    fold(model, gates_of(mixed=ENCODER))
    attention = model.get_submodule(ENCODER[1])
    closed = torch.tensor(MIXED).repeat_interleave(8) == 0
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert not part.weight[closed].any() and not part.bias[closed].any()
        assert part.weight[~closed].all()
    assert not attention.out_proj.weight[:, closed].any()
    assert not torch.signbit(attention.out_proj.weight[:, closed]).any()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_the_gated_one_whatever_is_closed(beams):
    """All subsets of the decoder's attentions, closed layer 0 (which counts positions) included."""
    model, source = translator(), batch(2)
    source.pop("labels")
    settings = {"num_beams": beams, "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 8,
                "output_scores": True, "return_dict_in_generate": True}  # fmt: skip
    found = set()
    for size in range(5):
        for closed in itertools.combinations(DECODER, size):
            encoder = [ENCODER[1]] if size % 2 else []
            gates = gates_of([*closed, *encoder], [ENCODER[0], *(set(DECODER) - set(closed))])
            with gated(model, gates):
                expected = model.generate(**source, **settings)
            smaller = removed(gates)
            got = smaller.generate(**source, **settings)
            assert torch.equal(got.sequences, expected.sequences), closed
            torch.testing.assert_close(got.scores[5], expected.scores[5], atol=1e-4, rtol=0)
            uncached = smaller.generate(**source, **settings | {"use_cache": False})
            assert torch.equal(uncached.sequences, expected.sequences), closed
            found.add(tuple(map(tuple, expected.sequences.tolist())))
    assert len(found) > 8  # the closed layers matter to what is said


def test_positions_matter_to_a_decoder_without_self_attention():
    """The check above would not see positions that stand still if they made no difference."""
    smaller = removed(gates_of(["model.decoder.layers.0.self_attn"]))
    source = {k: v for k, v in batch(2).items() if k != "labels"}
    tokens = torch.tensor([[0, 7, 7, 7]] * 3)
    cached = smaller(**source, decoder_input_ids=tokens[:, :2], use_cache=True)
    assert cached.past_key_values.get_seq_length() == 2
    step = smaller(**source, decoder_input_ids=tokens[:, 2:], use_cache=True,
                   past_key_values=cached.past_key_values).logits  # fmt: skip
    whole = smaller(**source, decoder_input_ids=tokens).logits
    torch.testing.assert_close(step, whole[:, 2:], atol=1e-5, rtol=0)
    assert (whole[:, 3] - whole[:, 1]).abs().max() > 1e-2


def test_a_saved_model_loads_without_gates_and_says_the_same(tmp_path):
    gates = gates_of([ENCODER[0], DECODER[0], DECODER[3]], [ENCODER[1], DECODER[1]])
    smaller = removed(gates)
    smaller.generation_config.num_beams = 3
    for folder in (tmp_path / "a", tmp_path / "b"):
        save(smaller, folder, kept_of(gates))
    check_manifest(tmp_path / "a", hashes=True)
    for name in ("config.json", "generation_config.json", "model.safetensors", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["kept_heads"] == kept_of(gates)
    weights = sum(p.numel() for p in smaller.parameters()) - 2 * 64 * 32  # positions are computed
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert 0 < size - 4 * (weights + 61) < 16384  # tied weights once; the bias of the logits

    code = (
        "import sys, torch; from headroom.gates.removal import load; m = load(sys.argv[1]);"
        "gates = [n for n in sys.modules if n.startswith('headroom.gates.')];"
        "assert gates == ['headroom.gates.removal'], gates;"
        "assert m.generation_config.num_beams == 3 and not m.training;"
        "b = torch.load(sys.argv[2]); torch.save(m(**b).logits, sys.argv[2])"
    )
    torch.save(batch(), tmp_path / "batch.pt")
    source = Path(sys.modules["headroom"].__path__[0]).parent
    subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / "batch.pt"], check=True,
                   env={"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"})  # fmt: skip
    torch.testing.assert_close(torch.load(tmp_path / "batch.pt"), smaller(**batch()).logits)

    again = load(tmp_path / "a", dtype="bfloat16")
    assert type(again) is MarianMTModel and again.dtype == torch.bfloat16
    assert again.lm_head.weight is again.model.shared.weight
    assert load(tmp_path / "a", dtype="auto").dtype == torch.float32
    save(load(tmp_path / "a"), tmp_path / "c", kept_of(gates))
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (
        tmp_path / "a" / "model.safetensors"
    ).read_bytes()


def test_the_stock_shaped_export_loads_everywhere(tmp_path):
    folded = translator()
    fold(folded, CASES["encoder closed"])
    save(folded, tmp_path, {})
    assert "kept_heads" not in json.loads((tmp_path / "config.json").read_text())
    expected = folded(**batch()).logits
    for model in (MarianMTModel.from_pretrained(tmp_path).eval(), load(tmp_path)):
        assert torch.equal(model(**batch()).logits, expected)


def test_loading_leaves_the_random_state_alone(tmp_path):
    save(removed(CASES["one head of each"]), tmp_path, kept_of(CASES["one head of each"]))
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            {ENCODER[0]: [0, 1]},
            "layers.1.self_attn.k_proj.bias is stored as",
        ),  # of layer 1, which lost heads too
        ({n: [0, 1, 2] for n in ENCODER}, "k_proj.bias is stored as"),
        ({n: [] for n in ENCODER}, "k_proj.bias is stored as"),
        ({n: [2, 0] for n in ENCODER}, "rising numbers from 0 to 3"),
        ({n: [0, 4] for n in ENCODER}, "rising numbers from 0 to 3"),
        ({"model.encoder.layers.7.self_attn": [0]}, "names 'model"),
    ],
)
def test_kept_heads_that_do_not_fit_are_refused(tmp_path, kept, message):
    gates = gates_of(mixed=ENCODER)
    save(removed(gates), tmp_path, kept_of(gates))
    (tmp_path / "manifest.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"kept_heads": kept}))
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert "kept_heads" in str(error.value) and "\n" not in str(error.value)


def test_what_can_not_be_is_refused(tmp_path):
    model = translator()
    for values in ([1.0, 0.5], [1.0, 0.5, 0.0, 1.5], [1.0, 0.5, 0.0, float("nan")]):
        for change in (fold, remove):
            with pytest.raises(InputError, match=r"4 numbers in \[0, 1\]"):
                change(model, {ENCODER[0]: torch.tensor(values)})
    with pytest.raises(InputError, match="gates name the module 'model"):
        remove(model, {"model.encoder.layers.9.self_attn": torch.ones(4)})
    with pytest.raises(InputError, match="no target token"):
        difference(model, {}, model, [batch() | {"labels": torch.full((3, 7), -100)}])
    with pytest.raises(InputError, match=r"has 0 heads \(allowed: 4\)"):
        save(removed(gates_of([ENCODER[0]])), tmp_path / "a", {})
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    with pytest.raises(InputError, match="'bart' is not served"):
        load(tmp_path)
    if not torch.cuda.is_available():
        save(model, tmp_path / "b", {})
        with pytest.raises(InputError, match="no GPU is visible"):
            load(tmp_path / "b", device="cuda")
    assert not [m for m in model.modules() if isinstance(m, ClosedAttention)]
