"""Documents that nobody cleaned: kept, or dropped and counted, or named by file and line."""

import json
import unicodedata

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headroom.corpora import instructions, pairs, text
from headroom.corpora.tokens import encoder, token_stream, train_tokenizer
from headroom.errors import InputError

SPACES = " \t\r\n\v\f\x1c\x85\xa0\u1680\u2003\u2028\u2029\u3000"
ODD = ["", " ", SPACES, "\0", "a\0b", "x", "<s>", "</s> <pad>", "\ufeff", "\ufeffx", "שלום עולם"]
ODD += [
    "مرحبا \u202ebyye\u202c",
    "e\u0301\u0323",
    "\u00e9\u0323",
    "한국어",
    "👩\u200d👩\u200d👧",
    "\u2028",
]
ODD += ["a\r\nb", "2020-01-01", "1e999", "null", "\ufffd", "\ud800", "x\udfffy", "𝒳", "ß İ ǆ"]
alphabet = st.characters(exclude_categories=())  # unassigned ones and half characters too
texts = st.one_of(st.sampled_from(ODD), st.text(alphabet, max_size=40))
SOUND = [f"Plain document {number} of many." for number in range(60)]
FEW = settings(max_examples=25, derandomize=True, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="module")
def tokenizer(folder):
    train_tokenizer(SOUND, 300, folder / "tokenizer")
    return folder / "tokenizer"


def written(folder, documents, kind):
    path = folder / f"documents.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    elif kind == "json":
        path.write_text(json.dumps([{"text": t} for t in documents]))
    else:
        sound = [t.encode("utf-8", "replace").decode() for t in documents]
        pyarrow.parquet.write_table(pyarrow.table({"text": sound}), path)
    return str(path)


def same(document):
    """What makes two documents one: Unicode form and white space aside."""
    return " ".join(unicodedata.normalize("NFC", document).split())


@FEW
@given(documents=st.lists(texts, max_size=30), kind=st.sampled_from(["jsonl", "json", "parquet"]))
def test_each_document_is_kept_once_in_one_split(folder, tokenizer, documents, kind):
    source = {"path": written(folder, SOUND + documents + SOUND[:3], kind)}
    outputs = {split: folder / kind / f"{split}.parquet" for split in text.SPLITS}
    counts = text.write_splits(source, outputs, "x")
    found = {split: text.read_texts(path) for split, path in outputs.items()}
    sound = (
        [t.encode("utf-8", "replace").decode() for t in documents]
        if kind == "parquet"
        else ["".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in t) for t in documents]
    )
    kept = [same(t) for part in found.values() for t in part]
    assert len(kept) == len(set(kept)), "no document is there twice, in one split or in two"
    assert set(kept) == {same(t) for t in (*SOUND, *sound)} - {""}
    read = sum(1 for t in (*SOUND, *sound, *SOUND[:3]) if t.strip())
    assert counts["duplicates"] == read - len(kept)
    assert counts["undecodable"] == sum("\ufffd" in t for part in found.values() for t in part)
    assert {s: counts[s]["documents"] for s in found} == {s: len(t) for s, t in found.items()}
    encode, _ = encoder(tokenizer)
    decode = _decoder(tokenizer)
    for part in found.values():
        stream = token_stream(part, tokenizer, "bos")
        assert stream.documents.max() + 1 == len(part)
        for number, document in enumerate(part):
            tokens = stream.tokens[stream.documents == number]
            assert tokens[0] == stream.boundary_token
            assert not np.isin(tokens[1:], stream.boundary_token).any(), "a <s> of a text is text"
            assert decode(tokens[1:]) == document
            assert tokens[1:].tolist() == encode([document])[0]


def _decoder(tokenizer):
    from tokenizers import Tokenizer

    read = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return lambda tokens: read.decode(tokens.tolist(), skip_special_tokens=False)


PLAIN = [b"", b"\n\n", b" \n\t\n", "\u3000\n\u2003\n".encode(), b"\xef\xbb\xbf", b"\r\n\r\n"]


@pytest.mark.parametrize("content", PLAIN)
@pytest.mark.parametrize("ending", ["txt", "jsonl", "json"])
def test_a_source_without_text_is_named(tmp_path, content, ending):
    path = tmp_path / f"empty.{ending}"
    path.write_bytes(content)
    outputs = {split: tmp_path / f"{split}.parquet" for split in text.SPLITS}
    with pytest.raises(InputError, match=r"^config key corpora.x: the source holds no text$"):
        text.write_splits({"path": str(path)}, outputs, "x")


@FEW
@given(st.binary(max_size=400))
def test_any_bytes_are_text_or_refused(folder, content):
    path = folder / "any.txt"
    path.write_bytes(content)
    found = list(text.documents({"path": str(path)}, "corpora.x")) if content.split() else []
    whole = content.decode("utf-8-sig", "replace")
    assert "".join("".join(found).split()) == "".join(whole.split())
    for document in found:
        assert document == document.strip() and document


def test_a_long_line_is_one_document(tmp_path, tokenizer):
    line = "word " * 200_000 + "end"
    for name, content in (("a.txt", line), ("a.jsonl", json.dumps({"text": line}))):
        (tmp_path / name).write_text(content)
        assert list(text.documents({"path": str(tmp_path / name)}, "k")) == [line]
    stream = token_stream([line], tokenizer, "none")
    assert _decoder(tokenizer)(stream.tokens) == line


def test_texts_that_look_like_dates_or_numbers_are_texts(tmp_path):
    for ending in ("jsonl", "json"):
        path = written(tmp_path, ["2020-01-01", "2021-02-03", "12"], ending)
        found = list(text.documents({"path": path}, "k"))
        assert found == ["2020-01-01", "2021-02-03", "12"]


GOOD = {"text": "a", "source": "a", "target": "b", "id": 1, "prompt": "a", "answer": "b"}
BROKEN = {
    "no JSON": b"hello",
    "cut": b'{"text": "a',
    "a list": b"[1]",
    "a number": b"5",
    "empty": b"{}",
    "nested": b"[" * 100_000,
    "digits": b'{"text": ' + b"1" * 5000 + b"}",
    "no field": b'{"other": "a"}',
    "a number in the field": json.dumps(GOOD | {k: 5 for k in GOOD if k != "id"}).encode(),
    "nothing in the field": json.dumps({k: None if k == "text" else [] for k in GOOD}).encode(),
    "a NUL": b'{"text": "a\0b"}',
}


def _corpus(path, folder):
    list(text.documents({"path": str(path)}, "corpora.x"))


def _pairs(path, folder):
    sides = {split: [str(path)] for split in pairs.SPLITS}
    pairs.write_pairs({"path": sides}, {s: folder / f"{s}.parquet" for s in pairs.SPLITS}, "x")


def _instructions(path, folder):
    instructions.write_instructions({"path": str(path)}, folder / "out.jsonl", "x")


@pytest.mark.parametrize("read", [_corpus, _pairs, _instructions])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_is_named_with_its_file(tmp_path, read, broken):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + BROKEN[broken] + b"\n")
    with pytest.raises(InputError) as error:
        read(path, tmp_path)
    message = str(error.value)
    assert message.startswith("config key ") and len(message.splitlines()) == 1
    assert "line 3 of " in message and "rows.jsonl" in message and len(message) < 400
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("read", [_pairs, _instructions])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_bytes_that_are_no_rows_are_named_with_their_file(tmp_path, read, ending):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(b"\n\xff\xfe\0PAR1")
    place = "line 2" if ending == "jsonl" else "no Parquet file"
    with pytest.raises(InputError, match=rf"^config key .*rows\.{ending} .*{place}"):
        read(path, tmp_path)


def test_a_parquet_file_cut_short_is_named(tmp_path):
    path = tmp_path / "cut.parquet"
    table = pyarrow.table({"text": [f"{n} " * 50 for n in range(2000)]})
    pyarrow.parquet.write_table(table, path, compression="none")
    content = path.read_bytes()
    for damaged in (content[:500], content[:4] + b"\0" * 3000 + content[3004:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"corpora.x: .*cut.parquet is no Parquet file, or"):
            _corpus(path, tmp_path)


def test_sides_that_are_no_text_or_not_aligned_are_named(tmp_path):
    one, other = tmp_path / "a.en", tmp_path / "a.de"
    one.write_bytes("first\u2028still first\nsecond\n".encode())
    other.write_bytes(b"erste\nzw\xffeite\n")
    sides = {"path": {split: [str(one), str(other)] for split in pairs.SPLITS}}
    outputs = {split: tmp_path / f"{split}.parquet" for split in pairs.SPLITS}
    with pytest.raises(InputError, match=r"^config key pairs.x.path.train.*a\.de .* in line 2 "):
        pairs.write_pairs(sides, outputs, "x")
    other.write_bytes(b"erste\n")
    with pytest.raises(InputError, match=r"a\.en has 2 lines and a\.de 1 \(allowed: as many\)"):
        pairs.write_pairs(sides, outputs, "x")


@FEW
@given(st.lists(st.tuples(texts, texts), max_size=12))
def test_no_sentence_is_in_two_splits(folder, drawn):
    rows = {
        "train": [("train", "t"), *drawn],
        "validation": [("validation", "v"), *((s, t) for s, t in drawn[1::3] if filled(s, t))],
        "test": [("test", "e"), *((s, t) for s, t in drawn[::3] if filled(s, t))],
    }
    paths = {}
    for split, found in rows.items():
        paths[split] = [str(folder / f"{split}.jsonl")]
        lines = [json.dumps({"source": s, "target": t}) for s, t in found]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    outputs = {split: folder / f"{split}.pairs.parquet" for split in rows}
    counts = pairs.write_pairs({"path": paths}, outputs, "x")
    kept = {
        split: list(zip(*pairs.read_pairs(path), strict=True)) for split, path in outputs.items()
    }
    sources = [{same(source) for source, _ in found} for found in kept.values()]
    assert len(set().union(*sources)) == sum(map(len, sources))
    assert len(kept["test"]) == len(rows["test"]), "the yardstick is never changed"
    dropped = counts["leaked"] + counts["empty"] + counts["duplicates"]
    assert sum(map(len, kept.values())) + dropped == sum(map(len, rows.values()))


def test_a_nul_inside_a_sentence_does_not_make_two_pairs_one(folder):
    assert pairs.pair_id("a\0b", "c") != pairs.pair_id("a", "b\0c")


def filled(*sides):
    return all(side.split() for side in sides)


@FEW
@given(st.lists(st.tuples(texts, texts), max_size=12))
def test_samples_are_kept_or_counted(folder, drawn):
    path, output = folder / "samples.jsonl", folder / "out.jsonl"
    rows = [("question", "answer"), *drawn, *drawn[:2]]
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
    path.write_text("\n".join(lines))
    counts = instructions.write_instructions({"path": str(path)}, output, "x")
    found = instructions.read_samples(output)
    wanted = dict.fromkeys((p, a) for p, a in rows if p.strip() and a.strip())
    sound = [tuple(side.encode("utf-8", "replace").decode() for side in pair) for pair in wanted]
    assert [(s.prompt, s.answer) for s in found] == sound
    assert len({s.id for s in found}) == len(found) == counts["samples"]
    assert counts["samples"] + counts["empty"] + counts["duplicates"] == len(rows)
