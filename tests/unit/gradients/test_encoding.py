"""Samples as tokens, and answers of the model: templates, ends, skips."""

import json

import pytest

from headroom.checkpoints import load_tokenizer
from headroom.errors import InputError
from headroom.gradients.answers import write_answers
from headroom.gradients.encoding import encode

from .test_measure import OWN, folder, settings  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = " ".join(["w1"] * 40)


@pytest.fixture(scope="module")
def tokenizer(folder):  # noqa: F811
    return load_tokenizer(folder / "model")


def written(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def row(name, prompt="w1 w2", answer="w3 w4", **more):
    return {"id": name, "prompt": prompt, "answer": answer, **more}


def test_the_answer_begins_after_the_template_and_ends_with_the_end(tokenizer, tmp_path):
    rows = [row("a"), row("b", ended=False)]
    found = encode(written(tmp_path / "s", *rows), tokenizer, OWN)
    tokens, answer = found.samples[0]
    assert tokenizer.convert_ids_to_tokens(tokens) == ["w1", "w2", ":", "w3", "w4", "</s>"]
    assert answer == 3
    assert found.samples[1] == (tokens[:-1], 3), "an answer that was cut has no end"


def test_a_chat_template_is_taken_as_it_is_and_its_date_stands_still(tokenizer, tmp_path):
    tokenizer.chat_template = "w9 {{ strftime_now('%d') }} {{ messages[0]['content'] }} :"
    try:
        path = written(tmp_path / "s", row("a"), row("b"))
        tokens, answer = encode(path, tokenizer, OWN | {"template": "auto"}).samples[0]
    finally:
        tokenizer.chat_template = None
    words = tokenizer.convert_ids_to_tokens(tokens)
    assert words == ["w9", *["<u>"] * 3, "w1", "w2", ":", "w3", "w4", "</s>"] and answer == 7


def test_what_cannot_be_measured_is_counted_or_refused(tokenizer, tmp_path):
    rows = [row("a"), row("b"), row("e", answer=""), row("l", answer=LONG), row("p", prompt=LONG)]
    path = written(tmp_path / "s", *rows)
    found = encode(path, tokenizer, OWN)
    assert found.ids == ["a", "b"]
    assert found.skipped == {"empty answer": ["e"], "too long": ["l", "p"]}
    cut = encode(path, tokenizer, OWN | {"too_long": "cut"})
    assert cut.ids == ["a", "b", "l"] and cut.lengths[-1] == OWN["length"]
    assert cut.skipped == {"empty answer": ["e"], "too long a prompt": ["p"]}
    with pytest.raises(InputError, match=r"sample l has 44 tokens, config key gradients.length"):
        encode(path, tokenizer, OWN | {"too_long": "refuse"})
    with pytest.raises(InputError, match="id 'a' stands twice"):
        encode(written(tmp_path / "t", row("a"), row("a")), tokenizer, OWN)
    with pytest.raises(InputError, match=r"1 samples are left \(1 empty answer"):
        encode(written(tmp_path / "u", row("a"), row("e", answer="")), tokenizer, OWN)


def test_a_tokenizer_without_an_end_is_refused(folder, tmp_path):  # noqa: F811
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end of sequence"):
        encode(written(tmp_path / "s", row("a"), row("b")), tokenizer, OWN)


def test_answers_hang_on_their_own_prompt_alone(folder, tokenizer, tmp_path):  # noqa: F811
    rows = [row(f"s{n}", prompt=" ".join(["w1", f"w{n}"] * n)) for n in range(1, 12)]
    path = written(tmp_path / "prompts", *rows, row("l", prompt=LONG))
    found = {}
    for batch in (1, 8):
        wanted = settings(batch=batch, answers={"new_tokens": 9})
        write_answers(str(folder / "model"), str(path), wanted, 0, str(tmp_path / f"{batch}"))
        found[batch] = (tmp_path / f"{batch}").read_text()
    assert found[1] == found[8]
    made = [json.loads(line) for line in found[1].splitlines()]
    assert [line["id"] for line in made] == [line["id"] for line in [*rows, {"id": "l"}]]
    assert made[-1]["skipped"] == "prompt without room for an answer"
    encoded = encode(tmp_path / "1", tokenizer, OWN)
    assert encoded.skipped["prompt without room for an answer"] == ["s11", "l"]
    assert max(encoded.lengths) <= OWN["length"]
