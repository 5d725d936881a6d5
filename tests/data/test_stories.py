"""A small trained model on real text: the published sample and its loss (spec: heads, check 8)."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(os.environ.get("HEADROOM_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
MODEL, STORIES = DATA / "models" / "stories260K", DATA / "tinystories" / "v2_valid.txt"
SAMPLE = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not (MODEL.is_dir() and STORIES.is_file()),
        reason=f"no stories260K and TinyStories under {DATA} (set HEADROOM_DATA)",
    ),
]


@pytest.fixture(scope="module")
def model():
    from headroom.checkpoints import load_model

    torch.set_num_threads(1)
    return load_model(MODEL)


@pytest.fixture(scope="module")
def stories():
    from headroom.corpora.text import documents

    source = {"path": str(STORIES), "separator": "<|endoftext|>"}
    return list(documents(source, "corpora.stories"))


def mean_nll(model, tokens, documents):
    from headroom.evaluation.perplexity import score_documents

    table = score_documents(model, tokens, documents, batch=32)
    return table.nll.sum() / table.tokens.sum()


def test_greedy_text_is_the_published_sample(model):
    from headroom.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    start = torch.tensor([[tokenizer.bos_token_id]])
    output = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=60, do_sample=False
    )
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith(SAMPLE)


@pytest.mark.parametrize(
    ("boundary", "expected", "digits"), [("bos", 1.3455, 4), ("none", 1.391, 3), ("eos", 1.72, 2)]
)
def test_loss_in_packed_windows(model, stories, boundary, expected, digits):
    """The first 120 windows of 512 tokens, the boundary before each story."""
    from headroom.corpora.tokens import token_stream, windows

    assert len(stories) == 1728
    tokens_NT, documents_NT = windows(token_stream(stories[:400], MODEL, boundary), 512)
    found = mean_nll(model, tokens_NT[:120], documents_NT[:120])
    assert found == pytest.approx(expected, abs=0.6 * 10.0**-digits)


def test_loss_of_a_document_at_a_time(model, stories):
    """The first 100 stories, each on its own and cut at 512 tokens."""
    from headroom.corpora.tokens import token_stream

    stream = token_stream(stories[:100], MODEL)
    tokens = [stream.tokens[stream.documents == i][:512] for i in range(100)]
    documents = [np.full(len(part), i) for i, part in enumerate(tokens)]
    assert mean_nll(model, tokens, documents) == pytest.approx(1.305, abs=0.0006)


def test_corpora_of_every_kind_split_without_overlap(tmp_path):
    """Real files through one code path: separated text, headings in raw text, JSON lines."""
    from headroom.corpora.text import SPLITS, read_texts, write_splits

    sources = {
        "stories": ({"path": str(STORIES), "separator": "<|endoftext|>"}, 1728),
        "wikitext": (
            {"path": str(DATA / "wikitext2/wiki.test.raw"), "heading": "^ = [^=]+ = $"},
            62,
        ),
        "c4": ({"path": str(DATA / "c4/c4_en.jsonl"), "documents": 500}, 500),
    }
    for name, (source, count) in sources.items():
        outputs = {split: tmp_path / name / f"{split}.parquet" for split in SPLITS}
        counts = write_splits(source, outputs, name)
        found = [set(read_texts(outputs[split])) for split in SPLITS]
        assert sum(map(len, found)) == len(set.union(*found)) == count - counts["duplicates"]
        assert all(found)
