"""Documents as texts: cut, disjoint, in an order that the wanted number doesn't move."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from headroom.branches.texts import load_texts, write_texts
from headroom.corpora.tokens import encoder, train_tokenizer
from headroom.errors import InputError

BOS, EOS = 0, 1
LONG = "one more word " * 9
TRAIN = ["", "<s> is text", *[f"training text {i} " + "x" * i for i in range(30)], LONG + "end"]
EVALUATION = [*[f"held out {i}" for i in range(20)], LONG + "and another end"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*TRAIN, *EVALUATION], 280, folder)
    return folder


def parquet(path, documents):
    ids = [str(i) for i in range(len(documents))]
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, "text": documents}), path)
    return path


@pytest.fixture
def inputs(tmp_path):
    return {
        "train": parquet(tmp_path / "train.parquet", TRAIN),
        "evaluation": parquet(tmp_path / "evaluation.parquet", EVALUATION),
    }


def settings(long_texts="first", length=1000, train=None, evaluation=20):
    texts = {"train": train, "evaluation": evaluation}
    return {"length": length, "long_texts": long_texts, "texts": texts}


def write_both(settings, inputs, tokenizer, folder):
    """The texts of both splits as the workflow makes them; what became of the documents."""
    return {
        split: write_texts(
            settings,
            split,
            inputs[split],
            inputs["evaluation"] if split == "train" else None,
            tokenizer,
            folder / split,
        )
        for split in ("train", "evaluation")
    }


def stored(folder):
    texts = load_texts(folder)
    assert texts.starts.dtype == texts.documents.dtype == np.int64
    assert not texts.tokens.flags.writeable  # mapped from disk
    return [(int(d), t.tolist()) for d, t in zip(texts.documents, pieces(texts), strict=True)]


def pieces(texts):
    return np.split(texts.tokens, texts.starts[1:-1])


def whole(tokenizer, documents):
    return [[BOS, *ids, EOS] for ids in encoder(tokenizer)[0](documents)]


def test_every_text_is_its_document_between_specials(inputs, tokenizer, tmp_path):
    counts = write_both(settings(), inputs, tokenizer, tmp_path / "texts")
    found = stored(tmp_path / "texts" / "train")
    assert sorted(found) == sorted(enumerate(whole(tokenizer, TRAIN)))
    assert load_texts(tmp_path / "texts" / "train").tokens.dtype == np.uint16
    assert counts["train"] == {
        "documents": len(TRAIN),
        "texts": len(TRAIN),
        "tokens": sum(len(tokens) for _, tokens in found),
        "cut": 0,
        "dropped_long": 0,
        "dropped_short": 0,
        "dropped_duplicates": 0,
    }
    assert counts["evaluation"]["texts"] == 20 < counts["evaluation"]["documents"]
    (tmp_path / "texts" / "train" / "tokens.npy").write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        load_texts(tmp_path / "texts" / "train")


@pytest.mark.parametrize("long_texts", ["first", "pieces", "drop"])
def test_long_documents(inputs, tokenizer, tmp_path, long_texts):
    ids = whole(tokenizer, TRAIN)
    length = len(ids[5]) - 1  # of one that leaves a piece of </s> alone
    wanted = settings(long_texts, length)
    counts = write_texts(wanted, "train", inputs["train"], None, tokenizer, tmp_path / "t")
    expected, longer, short = [], 0, 0
    for document, tokens in enumerate(ids):
        longer += len(tokens) > length
        if long_texts == "pieces":
            cut = [tokens[i : i + length] for i in range(0, len(tokens), length)]
            short += sum(len(piece) < 2 for piece in cut)
            expected += [(document, piece) for piece in cut if len(piece) > 1]
        elif len(tokens) <= length or long_texts == "first":
            expected.append((document, tokens[:length]))
    assert longer > 1
    once = list({tuple(tokens): (row, tokens) for row, tokens in reversed(expected)}.values())
    twins, expected = len(expected) - len(once), once
    assert sorted(stored(tmp_path / "t")) == sorted(expected)
    assert counts["dropped_duplicates"] == twins and (twins > 0) == (long_texts == "pieces")
    assert counts["dropped_short"] == short and (short > 0) == (long_texts == "pieces")
    assert counts["cut"] == (0 if long_texts == "drop" else longer)
    assert counts["dropped_long"] == (longer if long_texts == "drop" else 0)
    assert json.loads((tmp_path / "t" / "counts.json").read_text()) == counts


def test_training_texts_that_are_held_out_ones_after_the_cut_are_dropped(
    inputs, tokenizer, tmp_path
):
    """Two documents that differ behind the cut only are one text; also one that nobody asks for."""
    wanted = settings(length=8, evaluation=1)
    counts = write_both(wanted, inputs, tokenizer, tmp_path / "t")
    found = {tuple(tokens) for _, tokens in stored(tmp_path / "t" / "train")}
    held_out = {tuple(tokens[:8]) for tokens in whole(tokenizer, EVALUATION)}
    shared = [t for t in whole(tokenizer, TRAIN) if tuple(t[:8]) in held_out]
    assert shared and not found & held_out
    assert counts["train"]["dropped_duplicates"] == len(shared)
    assert counts["train"]["texts"] == len(TRAIN) - len(shared)


def test_fewer_texts_are_the_first_of_more(inputs, tokenizer, tmp_path):
    found = {}
    for number in (3, 11, 21):
        folder, wanted = tmp_path / str(number), settings(evaluation=number, train=number)
        write_both(wanted, inputs, tokenizer, folder)
        found[number] = [stored(folder / split) for split in ("train", "evaluation")]
    for train, evaluation in (found[3], found[11]):
        assert train == found[21][0][: len(train)]
        assert evaluation == found[21][1][: len(evaluation)]
    assert [d for d, _ in found[21][1]] != sorted(d for d, _ in found[21][1])


def test_equal_work_gives_equal_bytes(inputs, tokenizer, tmp_path):
    for name in "ab":
        write_both(settings("pieces", 9), inputs, tokenizer, tmp_path / name)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()


def test_what_is_refused(inputs, tokenizer, tmp_path):
    with pytest.raises(InputError) as caught:
        write_both(settings(evaluation=22), inputs, tokenizer, tmp_path / "t")
    key = "config key branches.texts.evaluation"
    assert str(caught.value) == f"{key} is 22, but there are 21 texts (allowed: at most 21)"
    with pytest.raises(InputError, match=r"branches\.corpus: no text of its train split is left"):
        drop = settings("drop", length=1)
        write_texts(drop, "train", inputs["train"], None, tokenizer, tmp_path / "t")
