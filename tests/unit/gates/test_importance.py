"""Michel's importance against finite differences, sentence by sentence."""

import pytest
import torch

from headroom.attention import attention_modules, tapped
from headroom.corpora.pair_tokens import PairTokens
from headroom.gates.importance import michel
from headroom.gates.translator import pair_loss

from .small_translators import translator

EVERY = ["encoder", "decoder", "cross"]
LENGTHS = [(9, 7), (4, 5), (6, 2), (3, 8), (5, 5)]
WORDS = torch.Generator().manual_seed(2)
SENTENCES = [
    [torch.cat([torch.randint(2, 61, (n - 1,), generator=WORDS), torch.tensor([1])]) for n in pair]
    for pair in LENGTHS
]


def pairs():
    sides = []
    for side in zip(*SENTENCES, strict=True):
        starts = torch.tensor([0, *map(len, side)]).cumsum(0)
        sides += [torch.cat(side).int(), starts]
    return PairTokens(*sides, too_long=0)


def importance(model, batches):
    return michel(model, EVERY, batches, pair_loss(pairs(), 0, 0.0))


@torch.no_grad()
def summed_loss(model, sentence, module, head, xi):
    """By transformers' own loss, one head's output multiplied by ξ."""

    def scale(tapped_module, q, k, v, z_BTHd):
        if tapped_module is not module:
            return None
        z_BTHd = z_BTHd.clone()
        z_BTHd[:, :, head] *= xi
        return z_BTHd

    source, target = SENTENCES[sentence]
    with tapped(model, scale):
        found = model(input_ids=source[None], labels=target[None], use_cache=False).loss
    return float(found) * len(target)


def test_importance_is_the_mean_size_of_a_sentences_gradient():
    model, step = translator().double(), 1e-4
    expected = []
    for _, module in attention_modules(model):
        sizes = torch.zeros(4, dtype=torch.float64)
        for head in range(4):
            for sentence in range(len(SENTENCES)):
                above, below = (
                    summed_loss(model, sentence, module, head, 1 + side * step) for side in (1, -1)
                )
                sizes[head] += abs(above - below) / (2 * step)
        expected.append(sizes / sizes.norm())
    for found_H, expected_H in zip(importance(model, [[0, 1, 2], [3, 4]]), expected, strict=True):
        assert found_H.tolist() == pytest.approx(expected_H.tolist(), rel=1e-5)


def test_importance_is_of_sentences_not_of_batches():
    model = translator().double()
    alone = importance(model, [[n] for n in range(5)])
    for batches in ([[0, 1, 2, 3, 4]], [[4, 0], [2], [1, 3]]):
        for first, second in zip(alone, importance(model, batches), strict=True):
            assert first.tolist() == pytest.approx(second.tolist(), rel=1e-9)


def test_a_head_that_writes_nothing_has_no_importance():
    model = translator()
    _, (_, module), *_, (_, last) = attention_modules(model)
    with torch.no_grad():
        module.out_proj.weight[:, 8:16] = 0
        last.out_proj.weight.zero_()
    found = importance(model, [[0, 1, 2, 3, 4]])
    assert found[1][1] == 0 and (found[1][[0, 2, 3]] > 0).all()
    assert found[-1].tolist() == [0] * 4
    assert [float(values.norm()) for values in found[:-1]] == pytest.approx([1] * 5)
    assert all(p.grad is None for p in model.parameters())
