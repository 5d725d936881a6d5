"""Instruction samples: every source, what is dropped and counted, and paraphrases brought along."""

import json
import os
from pathlib import Path

import pytest

from headroom.corpora.documentation import installed_version
from headroom.corpora.instructions import (
    Sample,
    read_samples,
    write_brought,
    write_instructions,
    write_samples,
)
from headroom.errors import InputError

DATA = Path(os.environ.get("HEADROOM_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
PACKAGES = ["torch", "transformers", "numpy", "scipy", "pandas", "matplotlib", "snakemake"]


@pytest.fixture
def write(tmp_path):
    def run(settings, name="x"):
        counts = write_instructions(settings, tmp_path / "out.jsonl", name)
        return counts, read_samples(tmp_path / "out.jsonl")

    return run


def lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_documentation_makes_questions_and_answers(write, tmp_path):
    settings = {"packages": PACKAGES, "samples": 32, "characters": 300}
    counts, samples = write(settings)
    assert counts["samples"] == 32 == len({s.id for s in samples})
    assert len({s.answer for s in samples}) == 32 == len({s.prompt for s in samples})
    assert len({s.id.split(".")[0] for s in samples}) > 3  # a mixture
    for sample in samples:
        assert sample.prompt == f"What does {sample.id} do?"
        assert not any(part.startswith(("_", "test")) for part in sample.id.split("."))
        assert 80 <= len(sample.answer) <= 300 and sample.answer[-1] in ".!?"
        assert ">>>" not in sample.answer and "Parameters" not in sample.answer
    before = (tmp_path / "out.jsonl").read_bytes()
    assert write({**settings, "samples": 8})[1] == samples[:8]  # fewer are the first of more
    write(settings)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    topics = write({"packages": ["python"], "samples": 3})[1]
    assert all(s.prompt.startswith("What does Python's documentation say about ") for s in topics)


def test_a_named_object_has_its_own_docstring(tmp_path, write, monkeypatch):
    package = tmp_path / "somepackage"
    package.mkdir()
    prose = "It is long enough to be prose, as documentation has it, and no label of one word."
    source = f'''
class Thing:
    """Hold things. {prose}

    Second paragraph.

    Parameters
    ----------
    x : left out
    """

    def use(self):
        """Use it.  {prose}

        >>> left_out()
        """

    def _own(self):
        """Private. {prose}"""

    def short(self):
        """Too short."""

def same():
    """Use it. {prose}"""
'''
    (package / "__init__.py").write_text(source)
    (package / "_hidden.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("headroom.corpora.documented.check_version", lambda *_: None)
    _, samples = write({"packages": ["somepackage"]})
    found = {s.id: s.answer for s in samples}
    assert found["somepackage.Thing"] == f"Hold things. {prose}\n\nSecond paragraph."
    assert len(found) == 2 and f"Use it. {prose}" in found.values()  # of two alike one
    _, samples = write({"packages": ["somepackage"], "characters": 100})
    assert f"Hold things. {prose}" in [s.answer for s in samples]  # whole sentences


def test_packages_that_do_not_fit_are_refused(write):
    with pytest.raises(InputError, match=r"instructions.x.packages: package nosuch is not inst"):
        write({"packages": ["nosuch"]})
    with pytest.raises(InputError, match=r"instructions.x.packages: numpy 0.1 is asked for"):
        write({"packages": ["numpy"], "versions": {"numpy": "0.1"}})
    with pytest.raises(InputError, match=r"instructions.x has \[\] \(allowed: exactly one of"):
        write({"samples": 3})
    assert write({"packages": ["numpy"], "versions": {"numpy": installed_version("numpy", "")}})


ROWS = [
    {"uid": 7, "q": "one?", "a": "é\u2028 and\nmore"},
    {"uid": 8, "q": "two?", "a": "2"},
    {"uid": 9, "q": "two?", "a": "2"},  # a duplicate
    {"uid": 10, "q": "three?", "a": " \n"},
    {"uid": 11, "q": None, "a": "4"},
    {"uid": 12, "q": "five?", "a": "5"},
    {"uid": 13, "q": "six?", "a": "6"},
]


def test_files_of_all_endings_hold_the_same(write, tmp_path):
    import pandas

    fields = {"id": "uid", "prompt": "q", "answer": "a"}
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "x.parquet")
    lines(tmp_path / "x.jsonl", ROWS)
    wanted = [Sample("7", ROWS[0]["q"], ROWS[0]["a"]), Sample("8", "two?", "2")]
    wanted.append(Sample("12", "five?", "5"))
    for ending in ("json", "parquet", "jsonl"):
        path = [str(tmp_path / f"x.{ending}")]
        counts, samples = write({"path": path, "fields": fields, "samples": 3})
        assert samples == wanted
        expected = {"duplicates": 1, "empty": 2, "other_turns": 0, "beyond": 1, "samples": 3}
        assert counts == expected
    assert "é" in (tmp_path / "out.jsonl").read_text()  # as it is, not escaped
    del fields["id"]
    assert [s.id for s in write({"path": path, "fields": fields})[1]] == [
        "x_0",
        "x_1",
        "x_5",
        "x_6",
    ]


def test_chats_of_two_turns_are_samples(write, tmp_path):
    def chat(*roles):
        return [{"role": role, "content": f"{role} says"} for role in roles]

    rows = [
        {"id": "a", "messages": chat("user", "assistant")},
        {"id": "b", "messages": chat("system", "user", "assistant")},
        {"id": "c", "messages": chat("user", "assistant", "user", "assistant")},
        {"id": "d", "messages": ["plain question", "plain answer"]},
    ]
    settings = {"path": lines(tmp_path / "x.jsonl", rows), "fields": {"messages": "messages"}}
    counts, samples = write(settings)
    assert [tuple(s)[1:] for s in samples] == [
        ("user says", "assistant says"),
        ("plain question", "plain answer"),
    ]
    assert counts["other_turns"] == 2
    lines(tmp_path / "x.jsonl", [{"id": "a", "messages": "text"}])
    with pytest.raises(InputError, match=r"fields.messages: 'messages' of line 1 of x.jsonl is no"):
        write(settings)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (
            [{"id": 1, "prompt": "a", "answer": "b"}, {}, {"id": 1, "prompt": "c", "answer": "d"}],
            None,
            r"line 2 of .*x.jsonl is no JSON object",
        ),
        (
            [{"id": 1, "prompt": "a", "answer": "b"}, {"id": "1", "prompt": "c", "answer": "d"}],
            None,
            r"instructions.x: id '1' is in line 1 of x.jsonl and in line 2 of x.jsonl",
        ),
        (
            [{"q": "a", "answer": "b"}],
            None,
            r"instructions.x.fields: no field 'prompt' in line 1 of x.jsonl \(allowed: one of ans",
        ),
        (
            [{"prompt": "a", "answer": "b"}],
            {"id": "uid", "prompt": "prompt", "answer": "answer"},
            r"instructions.x.fields: no field 'uid' in line 1",
        ),
        ([{"prompt": "a", "answer": 3}], None, r"fields.answer: 'answer' of line 1 of x.jsonl is"),
        ([{"prompt": "a", "answer": ""}], None, r"holds no sample \(1 without prompt or answer"),
        ([{"prompt": "a"}], {"prompt": "prompt"}, r"fields names prompt \(allowed: id, prompt and"),
    ],
)
def test_what_is_no_sample_is_named(write, tmp_path, rows, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        write({"path": lines(tmp_path / "x.jsonl", rows), "fields": fields})
    assert "\n" not in str(caught.value)


def test_paraphrases_brought_are_matched_by_id(tmp_path):
    originals, output = tmp_path / "original.jsonl", tmp_path / "out.jsonl"
    write_samples(originals, [Sample(i, f"p{i}", f"a{i}") for i in "abcde"])
    rows = [{"id": i, "prompt": f"P{i}", "answer": f"A{i}"} for i in "ecxa"]
    settings = {"path": [lines(tmp_path / "brought.jsonl", rows)]}
    with pytest.raises(InputError, match=r"path: 2 of 5 originals have no paraphrase \(b, d; allo"):
        write_brought(settings, originals, output, "x")
    counts = write_brought({**settings, "partial": True}, originals, output, "x")
    assert [s.id for s in read_samples(output)] == ["a", "c", "e"]
    assert counts["samples"] == 3 and counts["missing"] == 2 and counts["unknown"] == 1
    lines(tmp_path / "brought.jsonl", rows[2:3])
    with pytest.raises(InputError, match=r"5 of 5 originals"):
        write_brought({**settings, "partial": True}, originals, output, "x")


@pytest.mark.data
@pytest.mark.skipif(
    not (DATA / "lima").is_dir(), reason=f"no LIMA under {DATA} (set HEADROOM_DATA)"
)
def test_lima_and_its_paraphrases(write, tmp_path):
    fields = {"id": "id", "messages": "messages"}
    counts, samples = write(
        {"path": [str(DATA / "lima" / "lima_original_988.jsonl")], "fields": fields}
    )
    assert counts["samples"] == 988 and samples[0].id == "lima_0"
    brought = {
        "path": [str(DATA / "lima" / "lima_paraphrased_gpt4omini_harvested_4.jsonl")],
        "fields": fields,
        "partial": True,
    }
    counts = write_brought(brought, tmp_path / "out.jsonl", tmp_path / "paraphrased.jsonl", "x")
    assert counts["samples"] == 4 and counts["unknown"] == 0


def test_rows_of_a_mixture_are_chosen_by_their_fields(tmp_path):
    rows = [
        {"id": f"{part}_{n}", "part": part, "prompt": f"Say {part} {n}.", "answer": f"{part} {n}"}
        for part in ("lima", "flan")
        for n in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {"path": [str(tmp_path / "rows.jsonl")], "where": {"part": "lima"}}
    counts = write_instructions(settings, tmp_path / "out.jsonl", "mine")
    assert counts["samples"] == 3
    assert [s.id for s in read_samples(tmp_path / "out.jsonl")] == ["lima_0", "lima_1", "lima_2"]
    with pytest.raises(InputError, match=r"mine.*'dataset'"):
        write_instructions(settings | {"where": {"dataset": "lima"}}, tmp_path / "out", "mine")
