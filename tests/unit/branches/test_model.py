"""A stack against one member alone, stock Llama, a plain implementation and the mask's promise."""

import json

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoModelForCausalLM

from headroom.branches import model as model_module
from headroom.branches.layout import columns
from headroom.branches.masks import rule, visible
from headroom.branches.model import Stack, attend, inputs
from headroom.branches.rope import pair_kinds
from headroom.branches.runs import Rotation
from headroom.branches.saved import load_stack, save_run
from headroom.branches.texts import Texts
from headroom.errors import InputError

SIZES = {"vocabulary": 48, "hidden": 64, "heads": 4, "kv_heads": 2, "layers": 2, "theta": 1e6}
ROTATIONS = (
    Rotation(0.0),
    Rotation(0.0, "time"),
    Rotation(0.5),
    Rotation(0.75, "time", "high"),
    Rotation(1.0, stride=64),
)
WORDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


pytestmark = pytest.mark.usefixtures("one_thread")


def spread(sizes=SIZES, rotations=ROTATIONS, mask="columns", seed=0):
    """A stack of members that differ, with weights large enough that all of it matters."""
    stack = Stack(sizes, rotations, mask, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in stack.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1 + 0.3 * noise).add_(0.1 * noise)
    return stack


def laid(lengths, offsets, vocabulary=48, seed=0):
    """Samples of texts of these lengths at these times."""
    flat = [length for sample in lengths for length in sample]
    tokens = np.random.default_rng(seed).integers(vocabulary, size=sum(flat)).astype(np.uint16)
    starts = np.concatenate([[0], np.cumsum(flat)]).astype(np.int64)
    numbers = iter(range(len(flat)))
    samples = [[next(numbers) for _ in sample] for sample in lengths]
    return inputs(columns(Texts(tokens, starts, np.arange(len(flat))), samples, offsets), "cpu")


def ragged(vocabulary=48):
    """Unequal texts, offsets and samples, so that the second and third end in pads."""
    lengths, offsets = [[7, 4, 9], [5], [3, 6]], [[0, 3, 1], [2], [5, 0]]
    return laid(lengths, offsets, vocabulary)


def member_alone(stack, k):
    """The stack of one that holds a member's weights."""
    alone = Stack(stack.sizes, [stack.rotations[k]], stack.mask)
    alone.load_member(0, stack.member(k))
    return alone


def plain(stack, k, batch, seen_BSS):
    """Logits of a member by the textbook, in float64: unfused, a head at a time, complex turns."""
    own = {name: tensor.double() for name, tensor in stack.member(k).items()}
    rotation, size, heads = stack.rotations[k], stack.head_size, stack.sizes["heads"]
    kinds = pair_kinds(size, rotation.ratio, rotation.coordinate, rotation.band)
    table = torch.stack((batch.flat_BS, batch.time_BS, batch.branch_BS * rotation.stride), -1)
    angles = table[..., kinds].double() * 1e6 ** (-torch.arange(size // 2).double() * 2 / size)
    turns = torch.polar(torch.ones_like(angles), angles)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * own[f"model.{name}.weight"]

    x = own["model.embed_tokens.weight"][batch.tokens_BS]
    for layer in range(stack.sizes["layers"]):
        p = f"layers.{layer}"

        def project(x, name, p=p):
            return x @ own[f"model.{p}.{name}.weight"].T

        h, outs = norm(x, f"{p}.input_layernorm"), []
        q, key, v = (project(h, f"self_attn.{n}_proj") for n in "qkv")
        for head in range(heads):
            group = head * stack.sizes["kv_heads"] // heads
            turned = []
            for t, place in ((q, head), (key, group)):
                a, b = t[..., place * size : (place + 1) * size].chunk(2, -1)
                turned.append(torch.complex(a, b) * turns)
            scores = (turned[0] @ turned[1].mH).real / size**0.5
            weights = scores.masked_fill(~seen_BSS, -torch.inf).softmax(-1)
            outs.append(weights @ v[..., group * size : (group + 1) * size])
        x = x + project(torch.cat(outs, -1), "self_attn.o_proj")
        h = norm(x, f"{p}.post_attention_layernorm")
        gate = torch.nn.functional.silu(project(h, "mlp.gate_proj"))
        x = x + project(gate * project(h, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "norm") @ own["model.embed_tokens.weight"].T


def gradients(stack, batch):
    stack.zero_grad(set_to_none=True)
    nll_KP = stack.losses(batch)
    (nll_KP * torch.linspace(0.5, 1.5, nll_KP.shape[1])).sum().backward()
    return nll_KP.detach(), [parameter.grad for parameter in stack.parameters()]


@pytest.mark.parametrize(
    "sizes, batch",
    [
        (SIZES, ragged()),
        (SIZES, laid([[2]], [[0]])),
        (
            SIZES | {"hidden": 96, "heads": 6, "kv_heads": 3, "vocabulary": 1000},
            laid([[33, 20, 41], [40, 57]], [[5, 0, 2], [0, 9]], 1000),
        ),
        (SIZES | {"vocabulary": 200}, laid([[41] * 4], [[0] * 4], 200)),
        (SIZES | {"hidden": 128, "heads": 2, "layers": 1}, laid([[150, 61]], [[0, 30]])),
    ],
)
def test_a_member_has_the_bits_it_would_have_alone(sizes, batch):
    stack = spread(sizes)
    nll_KP, found = gradients(stack, batch)
    assert nll_KP.dtype == torch.float32
    for k in range(len(ROTATIONS)):
        alone = member_alone(stack, k)
        nll_P, expected = gradients(alone, batch)
        assert torch.equal(nll_KP[k], nll_P[0])
        for own, other in zip(found, expected, strict=True):
            assert torch.equal(own[k], other[0])


def test_a_broken_member_takes_none_with_it():
    stack = spread()
    nll_KP, found = gradients(stack, ragged())
    with torch.no_grad():
        stack.layers[0].qkv[2] = torch.nan
    broken_KP, others = gradients(stack, ragged())
    assert broken_KP[2].isnan().all()
    rest = [0, 1, 3, 4]
    assert torch.equal(nll_KP[rest], broken_KP[rest])
    for own, other in zip(found, others, strict=True):
        assert torch.equal(own[rest], other[rest])


@pytest.mark.parametrize("mask", ["columns", "isolated"])
def test_logits_losses_and_gradients_equal_the_textbook(mask):
    stack, batch = spread(mask=mask), ragged()
    seen_BSS = visible(batch.time_BS, batch.branch_BS, batch.valid_BS, mask)
    found, labelled = stack.logits(batch), batch.labels_BS >= 0
    losses = stack.losses(batch)
    for k in range(len(ROTATIONS)):
        wanted = plain(stack, k, batch, seen_BSS)
        assert (found[k] - wanted)[batch.valid_BS].abs().max() < 2e-4
        nll = torch.nn.functional.cross_entropy(
            wanted[labelled], batch.labels_BS[labelled], reduction="none"
        )
        assert (losses[k] - nll).abs().max() < 2e-4
    stack.zero_grad()
    losses.mean(1).sum().backward()
    reference = found[:, labelled].flatten(0, 1).log_softmax(-1)
    places = batch.labels_BS[labelled].repeat(len(ROTATIONS))
    expected = torch.autograd.grad(
        -reference.gather(1, places[:, None]).view(len(ROTATIONS), -1).mean(1).sum(),
        list(stack.parameters()),
    )
    for parameter, wanted in zip(stack.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, wanted, rtol=1e-3, atol=1e-5)


def test_losses_in_portions_equal_those_at_once(monkeypatch):
    stack, batch = spread(), ragged()
    whole = stack.losses(batch).detach()
    monkeypatch.setattr(model_module, "LOGITS", 5 * 48 * 7)
    with torch.no_grad():
        assert torch.allclose(stack.losses(batch), whole, atol=1e-5)


@pytest.mark.parametrize("mask", ["columns", "isolated"])
def test_a_logit_depends_on_a_token_iff_the_mask_says_so(mask):
    sizes = SIZES | {"layers": 1}  # with more layers the dependence is transitive
    stack, batch = spread(sizes, ROTATIONS[2:3], mask), ragged()
    seen_BSS = visible(batch.time_BS, batch.branch_BS, batch.valid_BS, mask)
    samples, length = batch.tokens_BS.shape
    row_BS = torch.arange(samples * length).view(samples, length) % 48
    # Each position gets an embedding of its own; what the output reads is another table.
    own = torch.randn(1, samples * length, 64, generator=torch.Generator().manual_seed(0))
    embedded = own.requires_grad_()
    stack._embedded = lambda tokens_BS: embedded
    logits_BSV = stack.logits(batch._replace(tokens_BS=row_BS))[0]
    for b in range(samples):
        for i in range(length):
            asked = logits_BSV[b, i].square().sum()
            (found,) = torch.autograd.grad(asked, embedded, retain_graph=True)
            touched = (found.view(samples, length, -1) != 0).any(-1)
            assert torch.equal(touched[b], seen_BSS[b, i])
            assert not touched[torch.arange(samples) != b].any()


@pytest.mark.parametrize("mask", ["columns", "isolated"])
def test_pads_never_matter(mask):
    stack, batch = spread(mask=mask), ragged()
    pads = ~batch.valid_BS
    assert pads.any()
    other = batch._replace(
        tokens_BS=batch.tokens_BS.masked_fill(pads, 31),
        time_BS=batch.time_BS.masked_fill(pads, 4),
        branch_BS=batch.branch_BS.masked_fill(pads, 1),
        flat_BS=batch.flat_BS.masked_fill(pads, 77),
    )
    found, expected = stack.logits(other), stack.logits(batch)
    assert torch.equal(found[:, batch.valid_BS], expected[:, batch.valid_BS])
    assert torch.equal(stack.losses(other), stack.losses(batch))


def test_one_branch_is_the_plain_causal_path():
    stack, batch = spread(), laid([[12], [12]], [[0], [5]])
    causal = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 12, 12)
    for k in range(len(ROTATIONS)):
        assert (stack.logits(batch)[k] - plain(stack, k, batch, causal)).abs().max() < 2e-4


@pytest.mark.parametrize("field", ["flat_BS", "time_BS", "branch_BS"])
def test_a_constant_added_to_a_coordinate_changes_nothing(field):
    stack, batch = spread(), ragged()
    moved = batch._replace(**{field: getattr(batch, field) + 9})
    difference = (stack.logits(moved) - stack.logits(batch))[:, batch.valid_BS]
    assert difference.abs().max() < 1e-5


def test_an_isolated_branch_gives_what_it_gives_alone():
    """Where no pair turns with the flat index, which counts the other branches' tokens."""
    rotations = [Rotation(0.0, "time"), Rotation(0.5, "time"), Rotation(1.0), Rotation(0.5)]
    stack = spread(rotations=rotations, mask="isolated")
    lengths, offsets = [9, 6, 11], [2, 0, 4]
    together = laid([lengths], [offsets])
    logits_KSV = stack.logits(together)[:, 0]
    solo = laid([[n] for n in lengths], [[0]] * 3)  # the same texts, a sample each
    solo_KBSV = stack.logits(solo)
    for branch, length in enumerate(lengths):
        mine = logits_KSV[:, together.branch_BS[0] == branch]
        difference_K = (mine - solo_KBSV[:, branch, :length]).abs().amax((1, 2))
        assert (difference_K[:3] < 2e-4).all()
        assert difference_K[3] > 1e-2


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("mask", ["columns", "isolated"])
def test_the_gpu_s_attention_follows_the_same_mask(mask):
    """FlexAttention can't be compiled everywhere: here it runs as it is written."""
    batch = ragged()
    samples, length = batch.tokens_BS.shape
    sees = rule(batch.time_BS, batch.branch_BS, batch.valid_BS, mask)
    seen = model_module.visibility(batch, mask)
    q, k, v = (
        torch.randn(samples, heads, length, 16, generator=torch.Generator().manual_seed(heads))
        for heads in (8, 4, 4)
    )
    blocks = create_block_mask(sees, samples, None, length, length, "cpu")
    found = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # refuses rather than hold a head's scores
        expected = attend(q, k, v, seen)
    assert torch.allclose(found, expected, atol=1e-5)


def test_members_begin_equal_and_survive_naming():
    stack, again = Stack(SIZES, ROTATIONS, seed=3), Stack(SIZES, ROTATIONS[:1], seed=3)
    for own, other in zip(stack.parameters(), again.parameters(), strict=True):
        assert all(torch.equal(own[k], other[0]) for k in range(len(ROTATIONS)))
    assert abs(float(stack.embedding.detach().std()) - 0.02) < 1e-3
    assert not torch.equal(Stack(SIZES, ROTATIONS[:1], seed=4).embedding, again.embedding)
    assert again.parameters_of_one == sum(tensor.numel() for tensor in again.member(0).values())


def test_saved_runs_come_back_and_ratio_0_is_a_stock_llama(tmp_path):
    stack, batch = spread(), laid([[12]], [[0]])
    folders = [tmp_path / str(k) for k in range(len(ROTATIONS))]
    for k, folder in enumerate(folders):
        folder.mkdir()
        save_run(stack, k, folder, WORDS)
    loaded = load_stack(folders[::-1])
    assert loaded.rotations == ROTATIONS[::-1] and loaded.mask == "columns"
    assert torch.equal(loaded.logits(ragged()).flip(0), stack.logits(ragged()))
    for k, folder in enumerate(folders):
        if ROTATIONS[k].ratio:
            with pytest.raises(ValueError, match="headroom_branches"):
                AutoModelForCausalLM.from_pretrained(folder)
        else:
            stock, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values())
            assert {key: getattr(stock.config, key) for key in WORDS} == WORDS
            logits = stock.eval()(input_ids=batch.tokens_BS).logits
            assert (logits - stack.logits(batch)[k]).abs().max() < 1e-4


def test_what_does_not_fit_together_is_refused(tmp_path):
    for place, (sizes, mask) in enumerate(
        ((SIZES, "columns"), (SIZES, "isolated"), (SIZES | {"layers": 1}, "columns"))
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        save_run(Stack(sizes, ROTATIONS[2:3], mask), 0, folder, WORDS)
        if place:
            with pytest.raises(InputError, match="one architecture and mask"):
                load_stack([tmp_path / "0", folder])
    with pytest.raises(InputError, match="no runs"):
        load_stack([])
    (tmp_path / "0" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="no trained run"):
        load_stack([tmp_path / "0"])
    with pytest.raises(InputError, match="mask"):
        Stack(SIZES, ROTATIONS, "open")
    with pytest.raises(InputError, match=r"branches\.kv_heads"):
        Stack(SIZES | {"kv_heads": 3}, ROTATIONS)
    stack = Stack(SIZES, ROTATIONS[:1])
    with pytest.raises(InputError, match=r"model\.norm\.weight is missing"):
        stack.load_member(0, {k: v for k, v in stack.member(0).items() if k != "model.norm.weight"})
