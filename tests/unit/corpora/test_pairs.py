"""Sentence pairs: reading, cleaning, and splits that share no sentence."""

import json
import os
from pathlib import Path

import pytest

from headroom.corpora.pairs import SPLITS, read_pairs, write_pairs
from headroom.errors import InputError

DATA = Path(os.environ.get("HEADROOM_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
CLEAN = {
    "train": [("a", "A"), ("b", "B"), ("c", "C")],
    "validation": [("v", "V"), ("w", "W")],
    "test": [("t", "T"), ("u", "U")],
}


def files(folder, content):
    """Write two aligned files a split and return their settings."""
    named = {}
    for split, pairs in content.items():
        named[split] = [str(folder / f"{split}.{language}") for language in ("en", "de")]
        for path, side in zip(named[split], zip(*pairs, strict=True), strict=True):
            Path(path).write_bytes("".join(f"{line}\n" for line in side).encode())
    return named


@pytest.fixture
def write(tmp_path):
    def run(settings, name="x"):
        outputs = {split: tmp_path / "out" / f"{split}.parquet" for split in SPLITS}
        counts = write_pairs(settings, outputs, name)
        return counts, {
            split: list(zip(*read_pairs(path), strict=True)) for split, path in outputs.items()
        }

    return run


def test_phrases_are_split_by_source(write, tmp_path):
    settings = {"cldr": {"locales": ["en", "de"], "pairs": 1000, "seed": 0}}
    counts, held = write(settings)
    sources = {split: {source for source, _ in held[split]} for split in SPLITS}
    assert sum(map(len, held.values())) == 1000 == len(set().union(*sources.values()))
    assert counts["train"]["pairs"] == len(held["train"]) and 860 < len(held["train"]) < 940
    assert counts["test"]["source_words"] == sum(len(s.split()) for s in sources["test"])
    before = (tmp_path / "out" / "train.parquet").read_bytes()
    write(settings)
    assert (tmp_path / "out" / "train.parquet").read_bytes() == before
    settings["cldr"]["pairs"] = 1100  # more phrases move none of those that were there
    _, more = write(settings)
    assert all(set(held[split]) <= set(more[split]) for split in SPLITS)
    with pytest.raises(InputError, match=r"pairs.x.split: the shares sum to 1.1 \(allowed: 1\)"):
        write(settings | {"split": {"train": 1.0, "validation": 0.05, "test": 0.05}})


def test_leaks_go_from_train_and_never_from_test(write, tmp_path, capsys):
    content = {
        "train": [
            *CLEAN["train"],
            ("a", "A"),  # a duplicate
            ("a", "other"),  # another translation of a training sentence may stay
            ("", "empty"),
            ("t", "T"),  # the pair is in test
            ("t", "other"),  # its source is
            ("v", "V"),  # the pair is in validation
            ("new", "T"),  # the target alone says nothing about the source
            ("u  2", "U"),
        ],
        "validation": [*CLEAN["validation"], ("u", "other"), ("v", "V")],
        "test": [*CLEAN["test"], ("t", "T")],
    }
    counts, held = write({"path": files(tmp_path, content)})
    assert held["test"] == content["test"]  # its own duplicate too
    assert held["validation"] == [*CLEAN["validation"], ("v", "V")]
    assert held["train"] == [*CLEAN["train"], ("a", "other"), ("new", "T"), ("u 2", "U")]
    totals = {"duplicates": 1, "empty": 1, "leaked": 4, "shared_sources": 2}
    assert {key: counts[key] for key in totals} == totals
    assert counts["train"] == {"pairs": 6, "source_words": 7, "target_words": 6}
    error = capsys.readouterr().err
    assert error == (
        "pairs x: of 18 pairs dropped 4 leaked (2 by the source alone), 1 with an empty side, "
        "1 duplicates\n"
    )


def test_text_is_normalised_and_lines_end_at_newlines_alone(write, tmp_path):
    named = files(tmp_path, CLEAN)
    Path(named["test"][0]).write_bytes(
        "\ufeffCafe\u0301\u00a05\u202f%\u2028 next \r\nBE\x85LL\x0c\r\n".encode()
    )
    _, held = write({"path": named, "lowercase": False})
    assert held["test"] == [("Café 5 % next", "T"), ("BE LL", "U")]
    _, held = write({"path": named, "lowercase": True})
    assert held["test"] == [("café 5 % next", "t"), ("be ll", "u")]
    Path(named["train"][0]).write_text("a\nb\nbe ll\n")
    counts, held = write({"path": named, "lowercase": True})
    assert counts["leaked"] == 1 and held["train"] == [("a", "a"), ("b", "b")]


def test_rows_of_files_and_hub_give_the_same(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    plain = write({"path": files(tmp_path, CLEAN)})
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, pairs in CLEAN.items():
        rows = [{"id": 1, "translation": {"en": s, "de": t}} for s, t in pairs]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    fields = {"fields": ["translation.en", "translation.de"]}
    for pattern in (str(folder / "{}.jsonl"), str(tmp_path / "{}.parquet")):
        path = {split: [pattern.format(split)] for split in SPLITS}
        assert write({"path": path, **fields}) == plain
    assert write({"hub": str(folder), **fields}) == plain
    swapped = {"hub_splits": {"train": "test", "test": "train"}, "limits": {"test": 1}}
    _, held = write({"hub": str(folder), **fields, **swapped})
    assert held == {
        "train": CLEAN["test"],
        "validation": CLEAN["validation"],
        "test": CLEAN["train"][:1],
    }
    message = (
        r"pairs.x.fields: no text in field 'fr' of .* \(allowed: one of id, translation.de, tr"
    )
    for source in ({"path": path}, {"hub": str(folder)}):
        with pytest.raises(InputError, match=message):
            write({**source, "fields": ["fr", "translation.de"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": [("a", "A"), ("b", "B\nC")]}, r"path.train: train.en has 2 lines and train.de "
         r"3 \(allowed: as many\)"),
        ({"test": [("t", "T"), ("u", " ")]}, r"path.test: line 2 has an empty target"),
        ({"validation": [("\u3000", "V")]}, r"path.validation: line 1 has an empty source"),
        ({"train": CLEAN["test"]}, r"pairs.x: the train split is empty after 2 pairs"),
    ],
)  # fmt: skip
def test_bad_files_are_named(write, tmp_path, change, message):
    with pytest.raises(InputError, match=message) as raised:
        write({"path": files(tmp_path, CLEAN | change)})
    assert str(raised.value).startswith("config key pairs.x") and "\n" not in str(raised.value)


def test_bad_settings_are_named(write, tmp_path):
    named = files(tmp_path, CLEAN)
    with pytest.raises(InputError, match=r"pairs.x has \[\] \(allowed: exactly one of cldr"):
        write({"limits": {}})
    with pytest.raises(InputError, match=r"pairs.x.path.test: there is no file .*none.de"):
        write({"path": named | {"test": [named["test"][0], str(tmp_path / "none.de")]}})
    with pytest.raises(InputError, match=r"pairs.x.path.test names 0 files \(allowed: two"):
        write({"path": {"train": named["train"], "validation": named["validation"]}})
    with pytest.raises(InputError, match=r"pairs.x.hub_splits.train: .*can't be read"):
        write({"hub": str(tmp_path / "nowhere"), "fields": ["en", "de"]})
    Path(named["train"][1]).write_bytes(b"A\nB\n\xff\n")
    with pytest.raises(InputError, match=r"pairs.x.path.train: .*train.de is no text .*UTF-8"):
        write({"path": named})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"source": "a", "target": "A"}\n{"sour\n')
    with pytest.raises(InputError, match=r"path.train: line 2 of .*rows.jsonl is no JSON object"):
        write({"path": named | {"train": [str(rows)]}})


@pytest.mark.data
@pytest.mark.skipif(
    not (DATA / "multi30k").is_dir(), reason=f"no multi30k in {DATA} (set HEADROOM_DATA)"
)
def test_multi30k(write):
    stems = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    path = {
        split: [str(DATA / "multi30k" / f"{stem}.{language}") for language in ("en", "de")]
        for split, stem in stems.items()
    }
    counts, held = write({"path": path, "lowercase": True})
    assert [counts[split]["pairs"] for split in SPLITS] == [29_000 - 1 - 3, 1014, 1000]
    totals = {"duplicates": 3, "empty": 0, "leaked": 1, "shared_sources": 1}
    assert {key: counts[key] for key in totals} == totals
    assert len(held["train"]) == 28_996 and not any(s != s.lower() for s, _ in held["test"])
    limits = {"train": 500, "validation": 20, "test": 10}
    counts, held = write({"path": path, "lowercase": True, "limits": limits})
    assert counts["test"]["pairs"] == 10 and counts["train"]["pairs"] <= 500
