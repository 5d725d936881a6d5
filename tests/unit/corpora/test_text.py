"""Documents: sources, splits that stay disjoint and stable, and what is refused."""

import json
import subprocess
import sys
import textwrap

import pyarrow
import pyarrow.parquet
import pytest

from headroom.corpora import documentation
from headroom.corpora.text import (
    FRACTIONS,
    SPLITS,
    _assert_disjoint,
    bucket,
    check_unseen,
    document_id,
    documents,
    read_texts,
    write_splits,
)
from headroom.errors import InputError

STORIES = [f"Story {i}. Once there was a number {i * i} that nobody liked." for i in range(200)]


def write(tmp_path, settings, name="stories"):
    paths = {split: tmp_path / "out" / f"{split}.parquet" for split in SPLITS}
    counts = write_splits(settings, paths, name)
    return counts, {split: read_texts(path) for split, path in paths.items()}


def jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "other": 1}) + "\n" for text in texts))
    return str(path)


def plain(path, texts, between="\n\n"):
    path.write_text(between.join(texts))
    return str(path)


def test_every_document_once_and_splits_disjoint(tmp_path):
    source = plain(tmp_path / "a.txt", [*STORIES, STORIES[3], STORIES[4].replace(" ", "  ")])
    counts, found = write(tmp_path, {"path": source})
    assert counts["duplicates"] == 2
    together = [text for split in SPLITS for text in found[split]]
    assert sorted(together) == sorted(STORIES)
    assert counts["train"]["documents"] == len(found["train"])
    assert counts["train"]["characters"] == sum(map(len, found["train"]))
    table = pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet")
    assert table.column_names == ["id", "text"]
    assert table["id"].to_pylist() == [document_id(text) for text in found["train"]]


def test_held_out_documents_of_another_corpus_are_found(tmp_path):
    def corpus(name, texts):
        (tmp_path / name).mkdir()
        paths = {split: tmp_path / name / f"{split}.parquet" for split in SPLITS}
        write_splits({"path": plain(tmp_path / f"{name}.txt", texts)}, paths, name)
        return paths

    first = corpus("first", STORIES)
    held = read_texts(first["evaluation"])
    other = corpus("other", [f"Other {i}." for i in range(200)])
    check_unseen(first["evaluation"], range(len(held)), [other["train"], other["calibration"]])
    rows = [{"id": document_id(text), "text": text} for text in held[5:]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), other["train"])
    check_unseen(first["evaluation"], range(5), [other["train"]])  # only what is read counts
    with pytest.raises(InputError, match=r"1 of 6 .* first .* train split of corpus other"):
        check_unseen(first["evaluation"], range(6), [other["calibration"], other["train"]])


def test_splits_that_share_a_document_are_an_error(tmp_path):
    rows = pyarrow.Table.from_pylist([{"id": "a", "text": "a"}])
    paths = {split: tmp_path / f"{split}.parquet" for split in SPLITS}
    for path in paths.values():
        pyarrow.parquet.write_table(rows, path)
    with pytest.raises(RuntimeError, match="two splits share a document"):
        _assert_disjoint(paths)


def test_more_documents_move_none(tmp_path):
    _, few = write(tmp_path, {"path": plain(tmp_path / "a.txt", STORIES[:100])})
    _, many = write(tmp_path, {"path": plain(tmp_path / "a.txt", STORIES[::-1])})
    for split in SPLITS:
        assert set(few[split]) <= set(many[split])


def test_shares_are_what_was_asked(tmp_path):
    ids = [document_id(str(i)) for i in range(20000)]
    shares = {"train": 0.5, "calibration": 0.3, "evaluation": 0.2}
    for split, share in shares.items():
        assert sum(bucket(i, shares) == split for i in ids) / len(ids) == pytest.approx(
            share, abs=0.012
        )
    assert bucket("f" * 16, {"train": 0.9, "calibration": 0.1, "evaluation": 0}) == "calibration"
    # A larger train share takes from its neighbour alone.
    grown = {"train": 0.9, "calibration": 0.0, "evaluation": 0.1}
    assert all(bucket(i, grown) == "train" for i in ids if bucket(i, FRACTIONS) == "train")


def test_id_is_blind_to_spacing_and_unicode_form_but_not_to_words():
    assert document_id("caf\u00e9  au\nlait ") == document_id("cafe\u0301 au lait")
    assert document_id("a b") != document_id("ab")
    assert len(document_id("")) == 16


def test_separate_sources_keep_the_held_out_text(tmp_path):
    settings = {
        "train": {"path": plain(tmp_path / "t.txt", STORIES[:100])},
        "calibration": {"path": plain(tmp_path / "c.txt", STORIES[90:130])},
        "evaluation": {"path": plain(tmp_path / "e.txt", STORIES[120:150] + STORIES[:5])},
    }
    counts, found = write(tmp_path, settings)
    assert found["evaluation"] == STORIES[120:150] + STORIES[:5]
    assert found["train"] == STORIES[5:100]
    assert found["calibration"] == STORIES[100:120]
    assert counts["duplicates"] == 5 + 10 + 10


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "separator", "heading", "blank"])
def test_every_format_gives_the_same_documents(tmp_path, kind):
    texts = [f"{text}\nSecond line of it.\n\nAnd a paragraph." for text in STORIES[:20]]
    options = {}
    if kind == "jsonl":
        path, options = jsonl(tmp_path / "a.jsonl", texts, "body"), {"text": "body"}
    elif kind == "json":
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif kind == "parquet":
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif kind == "separator":
        path = plain(tmp_path / "a.txt", texts, "\n<|endoftext|>\n")
        options = {"separator": "<|endoftext|>"}
    elif kind == "heading":
        path, options = plain(tmp_path / "a.raw", texts, "\n"), {"heading": r"^Story \d+\."}
    else:
        texts = [text.replace("\n\n", "\n") for text in texts]
        path = plain(tmp_path / "a.tokens", texts, "\n \n\n")
    assert list(documents({"path": str(path), **options}, "corpora.x")) == texts


def test_lines_of_a_table_are_joined_at_headings(tmp_path):
    lines = [
        "",
        " = One = \n",
        "",
        " First . \n",
        " = = Part = = \n",
        " = Two = \n",
        " Second . \n",
    ]
    path = jsonl(tmp_path / "wiki.jsonl", lines)
    found = list(documents({"path": path, "heading": "^ = [^=]+ = $"}, "corpora.x"))
    assert found == ["= One = \n\n First . \n = = Part = =", "= Two = \n Second ."]


def test_caps(tmp_path):
    path = plain(tmp_path / "a.txt", STORIES)
    assert list(documents({"path": path, "documents": 7}, "k")) == STORIES[:7]
    capped = list(documents({"path": path, "characters": 500}, "k"))
    assert sum(map(len, capped[:-1])) < 500 <= sum(map(len, capped))


def test_patterns_and_lists_are_read_in_order(tmp_path):
    for name, part in (("b", STORIES[5:10]), ("a", STORIES[:5])):
        plain(tmp_path / f"{name}.txt", part)
    assert list(documents({"path": str(tmp_path / "*.txt")}, "k")) == STORIES[:10]
    listed = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    assert list(documents({"path": listed}, "k")) == STORIES[5:10] + STORIES[:5]


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_bad_bytes_are_replaced_and_counted(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    texts = [text.encode() for text in STORIES]
    texts[7] += b" caf\xe9"
    lines = [b'{"text": "' + text + b'"}' for text in texts]
    path.write_bytes(b"\n\n".join(texts) if ending == "txt" else b"\n".join(lines))
    counts, found = write(tmp_path, {"path": str(path)})
    assert counts["undecodable"] == 1
    assert STORIES[7] + " caf\ufffd" in [text for texts in found.values() for text in texts]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "/nowhere/*.txt"}, "corpora.stories.path: there is no file /nowhere"),
        ({"path": "{tmp}/empty.txt"}, "corpora.stories: the source holds no text"),
        ({"path": "{tmp}/few.txt"}, "the .* split is empty"),
        ({"path": "{tmp}/a.csv"}, "corpora.stories.path: .*another ending"),
        ({"path": "{tmp}/a.jsonl"}, "corpora.stories.text: no text in field 'text'.*body, other"),
        ({"path": "{tmp}/broken.jsonl"}, "config key corpora.stories"),
        ({"path": "{tmp}/few.txt", "heading": "("}, "stories.heading is no regular expression"),
        ({"path": "{tmp}/few.txt", "packages": ["yaml"]}, "exactly one of packages, path, hub"),
        ({}, "exactly one of packages, path, hub"),
        ({"packages": ["no_such_package"]}, "stories.packages: package no_such_package is not"),
        ({"packages": ["yaml"], "versions": {"yaml": "0"}}, "corpora.stories.packages"),
        ({"packages": ["python"], "versions": {"python": "2.7"}}, "python 2.7 is asked for"),
        ({"path": "{tmp}/few.txt", "split": dict.fromkeys(SPLITS, 0.5)}, "shares sum to 1.5"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(tmp_path, settings, message):
    (tmp_path / "empty.txt").write_text(" \n\n ")
    plain(tmp_path / "few.txt", STORIES[:2])
    (tmp_path / "a.csv").write_text("text\nhello")
    jsonl(tmp_path / "a.jsonl", STORIES, "body")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    if "path" in settings:
        settings = settings | {"path": settings["path"].format(tmp=tmp_path)}
    with pytest.raises(InputError, match=message) as caught:
        write(tmp_path, settings)
    assert "\n" not in str(caught.value)


PACKAGE = '''
"""{long}"""
raise SystemExit("a package that is imported")

class A:
    """Short."""

    def f(self):
        """{long} It is inside f.

        >>> f()
        42

        Last words.
        """
        if True:
            def g():
                """{long} It is inside g."""
    x = """{long} A string, no docstring."""
'''


def test_documentation_is_parsed_not_imported_and_cleaned(tmp_path, monkeypatch):
    long = "The quick brown fox jumps over the lazy dog. " * 6
    folder = tmp_path / "foxes"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE.format(long=long))
    (folder / "broken.py").write_text(f'"""{long}"""\nprint "python 2"')
    (folder / "tests" / "test_a.py").write_text(f'"""{long} In a test."""')
    table = textwrap.dedent(f'''"""{"+---+---+ " * 40}"""''')
    (folder / "table.py").write_text(table)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(documentation, "installed_version", lambda package, key: "1")
    found = list(documents({"packages": ["foxes"]}, "corpora.x"))
    f = f"{long} It is inside f.\n\nLast words."
    assert found == [long.strip(), f, f"{long} It is inside g."]


def test_documentation_is_the_same_in_every_process():
    code = (
        "import hashlib, sys; from headroom.corpora.text import documents;"
        "s = {'packages': ['numpy', 'python', 'yaml'], 'characters': 900000};"
        "t = list(documents(s, 'k')); heavy = {'torch', 'transformers', 'numpy', 'datasets'};"
        "print(hashlib.sha256(repr(t).encode()).hexdigest(), heavy & set(sys.modules))"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": "src", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert done[0] == done[1] and done[0].endswith("set()\n")
