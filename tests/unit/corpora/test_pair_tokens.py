"""The joint tokenizer, ragged pairs and their batches."""

import json

import pytest
import torch

from headroom.corpora.pair_tokens import (
    Batches,
    PairTokens,
    collate,
    encode_pairs,
    load,
    save,
    train_joint_tokenizer,
)
from headroom.errors import InputError

SOURCES = [
    f"The {w} number {i * 37}, near (the) {w}-{i}." for i in range(60) for w in ("ox", "fig")
]
TARGETS = [f"Die Zahl {i * 37} für „{w}“, Straße {i}!" for i in range(60) for w in ("ox", "fig")]
STRANGE = ["1,234.50", "5 % (3-4)", "the</s>", "<pad>", "a ((b))", "-7", "Straße für 12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    train_joint_tokenizer([*SOURCES, *TARGETS, *STRANGE, "%/"], 80, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer, MarianConfig

    MarianConfig(
        vocab_size=80, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, d_model=8
    ).save_pretrained(folder)  # as in the folder of a checkpoint
    return AutoTokenizer.from_pretrained(folder)


def ragged(sources, targets):
    """Make pairs of given lengths; the tokens of pair i are all i + 3."""

    def side(lengths):
        ids = [torch.full((n,), i + 3, dtype=torch.int32) for i, n in enumerate(lengths)]
        return torch.cat(ids), torch.tensor([0, *lengths]).cumsum(0)

    return PairTokens(*side(sources), *side(targets), too_long=0)


@pytest.fixture(scope="module")
def many():
    draw = torch.Generator().manual_seed(0)
    return ragged(*(torch.randint(1, 40, (500,), generator=draw).tolist() for _ in range(2)))


def test_tokenizer_loads_beside_a_marian_config_and_gives_text_back(tokenizer):
    from transformers import PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast) and len(tokenizer) == 80
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.clean_up_tokenization_spaces is False
    assert set(tokenizer("The ox")) == {"input_ids", "attention_mask"}
    for text in SOURCES[:9] + TARGETS[:9] + STRANGE:
        ids = tokenizer(text, split_special_tokens=True).input_ids
        assert ids[-1] == 1 and not {0, 1, 2} & set(ids[:-1])
        assert tokenizer.decode(ids[:-1]) == text
    assert tokenizer("語").input_ids[-2:] == [2, 1]


def test_digits_and_punctuation_stand_alone(tokenizer):
    tokens = tokenizer.tokenize("number 2018, near (12)")
    for mark in "2018,()":
        assert mark in tokens
    for token in tokenizer.get_vocab():
        if token not in ("<pad>", "</s>", "<unk>"):
            odd = [c for c in token if c.isdigit() or c in ",.()-!%„“</>"]
            assert not odd or len(token) == 1, token


def test_training_is_deterministic_and_sizes_are_checked(folder, tmp_path):
    train_joint_tokenizer(iter([*SOURCES, *TARGETS, *STRANGE, "%/"]), 80, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["eos_token"] == "</s>"
    with pytest.raises(InputError, match=r"vocabulary 9 is too small: .*\(allowed: at least \d+\)"):
        train_joint_tokenizer(SOURCES, 9, tmp_path)
    with pytest.raises(InputError, match=r"vocabulary 99999 is too large: .*\(allowed: at most"):
        train_joint_tokenizer(SOURCES, 99999, tmp_path)


def test_pairs_are_encoded_filtered_saved_and_read(tokenizer, tmp_path, monkeypatch):
    whole = encode_pairs(SOURCES, TARGETS, tokenizer, 500)
    assert whole.pairs == len(SOURCES) and whole.too_long == 0
    assert whole.source_ids.dtype == torch.int32 and whole.source_starts.dtype == torch.int64
    for index in (0, 1, 77):
        assert tokenizer.decode(whole.source(index)[:-1]) == SOURCES[index]
        assert tokenizer.decode(whole.target(index)[:-1]) == TARGETS[index]
        assert whole.target(index)[-1] == 1
    longer = torch.maximum(*whole.lengths)
    limit = int(longer.median())
    monkeypatch.setattr("headroom.corpora.pair_tokens.CHUNK", 7)
    short = encode_pairs(SOURCES, TARGETS, tokenizer, limit)
    assert short.too_long == int((longer > limit).sum()) > 0
    assert torch.equal(torch.maximum(*short.lengths), longer[longer <= limit])
    save(short, tmp_path / "pairs.safetensors")
    back = load(tmp_path / "pairs.safetensors")
    assert back.too_long == short.too_long
    assert all(map(torch.equal, back[:-1], short[:-1]))
    with pytest.raises(InputError, match=r"pairs.x.max_tokens is 2: none of 120 pairs"):
        encode_pairs(SOURCES, TARGETS, tokenizer, 2, key="pairs.x.max_tokens")


def test_targets_go_the_way_of_targets():
    class Two:
        """Like MarianTokenizer, encodes targets with another model."""

        def __call__(self, text=None, text_target=None, **options):
            shift = 100 if text is None else 0
            sides = text_target if text is None else text
            return {"input_ids": [[ord(c) + shift for c in side] + [1] for side in sides]}

    pairs = encode_pairs(["ab"], ["ab"], Two(), 9)
    assert pairs.source(0).tolist() == [97, 98, 1] and pairs.target(0).tolist() == [197, 198, 1]


def test_each_epoch_holds_each_pair_once_within_the_budget(many):
    batches = Batches(many, 100, seed=3)
    sources, targets = (lengths.tolist() for lengths in many.lengths)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        epochs.append([batches(step) for step in steps])
        assert sorted(index for batch in epochs[-1] for index in batch) == list(range(500))
        for batch in epochs[-1]:
            assert len(batch) * max(max(sources[i], targets[i]) for i in batch) <= 100
            assert max(sources[i] for i in batch) - min(sources[i] for i in batch) < 10
    assert epochs[0] != epochs[1] != epochs[2]
    assert {frozenset(b) for b in epochs[0]} != {frozenset(b) for b in epochs[1]}  # random ties
    lengths = [[sources[b[0]] for b in epoch] for epoch in epochs]
    assert lengths[0] != sorted(lengths[0])
    assert batches.epoch(0) == 0 and batches.epoch(2 * batches.steps_per_epoch) == 2


def test_greedy_cuts_and_long_pairs_by_hand():
    pairs = ragged([2, 9, 2, 2, 1, 3], [2, 1, 5, 2, 1, 1])
    batches = Batches(pairs, 6, seed=0)
    held = {frozenset(batches(step)) for step in range(batches.steps_per_epoch)}
    # Sorted: (1,1) (2,2) (2,2) | (2,5) | (3,1) | (9,1), the last too long for any company.
    assert held == {frozenset(x) for x in ((4, 0, 3), (2,), (5,), (1,))}


def test_batches_are_a_function_of_seed_and_step(many):
    walked = Batches(many, 200, seed=1)
    expected = [walked(step) for step in range(3 * walked.steps_per_epoch)]
    jumping = Batches(many, 200, seed=1)
    for step in torch.randperm(len(expected)).tolist()[:80]:
        assert jumping(step) == expected[step]
    other = Batches(many, 200, seed=2)
    assert [other(step) for step in range(5)] != expected[:5]


def test_collate_pads_by_hand():
    batch = collate(ragged([1, 3, 2], [2, 1, 4]), [2, 0], pad=0, device="cpu")
    assert batch["input_ids"].tolist() == [[5, 5], [3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[5, 5, 5, 5], [3, 3, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
