"""Paraphrases: gates, cache, the rules' dial and a local model."""

import itertools
import json
import multiprocessing
import re
from collections import Counter

import pytest

from headroom.corpora import paraphrase
from headroom.corpora.instructions import Sample, read_samples, write_instructions, write_samples
from headroom.corpora.paraphrase import Cache, Kind, identity, paraphrase_samples
from headroom.corpora.paraphrase_gates import GATES, gates_of, refusal
from headroom.corpora.paraphrase_rules import possible, rephrase
from headroom.corpora.paraphrase_words import conjugated
from headroom.errors import InputError

CODE = (
    "If you use `x.use()` in 3.5 cases, it returns the value. See https://a.b/use and use_it.\n\n"
)
CODE += "```python\nuse = 1  # use it\n```\n    use this\nDo not call torch.nn.use or UseThis."


@pytest.fixture
def originals(tmp_path):
    path = tmp_path / "original.jsonl"
    samples = [
        Sample(str(i), f"What does thing number {i} do?", f"It holds {i}.") for i in range(9)
    ]
    write_samples(path, samples)
    return path


def jaccard(first, second):
    one, other = (set(re.findall(r"[\w']+", text.lower())) for text in (first, second))
    return len(one & other) / len(one | other)


@pytest.mark.parametrize(
    ("original", "given", "gate"),
    [
        ("What is the largest city?", "Which city is the largest?", None),
        ("What is the largest city?", "what is  the LARGEST city?", "not_identical"),
        ("What is the largest city?", "Which?", "length"),
        ("What is the largest city?", "Sure, which city is the largest?", "no_preamble"),
        ("What is the largest city?", "The largest city is Tokyo.", "not_executed"),
        ("Translate: le chat est noir", "The cat is black, le chat.", "not_executed"),
        ("Translate: le chat est noir", "Please translate: le chat noir", None),
        ("What is 3.5 + 2 of it?", "Of it, what is 2 + 3.5?", None),
        ("What is 3.5 + 2 of it?", "What is 3.5 + 3 of it all?", "numbers_kept"),
        ("What does `a b` do here?", "What is `a  b` for there?", "code_kept"),
        ("The brown fox jumps high", "Le renard brun saute haut", "words_kept"),
    ],
)
def test_gates(original, given, gate):
    assert refusal(original, given, list(GATES)) == gate


def test_answers_ask_for_nothing_and_a_dial_may_leave_texts():
    assert "not_executed" in gates_of("prompt", "endpoint", {})
    assert "not_executed" not in gates_of("answer", "endpoint", {})
    assert "no_preamble" in gates_of("answer", "endpoint", {})
    assert "not_identical" in gates_of("answer", "rules", {"strength": 1.0})
    assert "not_identical" not in gates_of("answer", "rules", {"strength": 0.5})


def test_rules_leave_code_and_numbers_alone():
    for seed in range(20):
        found = rephrase(CODE, 1.0, seed)
        assert found != CODE
        for kept in ("`x.use()`", "3.5", "https://a.b/use", "use_it", "torch.nn.use", "UseThis"):
            assert kept in found
        assert "```python\nuse = 1  # use it\n```\n    use this\n" in found
    assert (
        rephrase("If you need an item, we use it.", 1.0)
        == "We employ it if you require an element."
    )
    assert rephrase("Returns the result.", 1.0) == "Hands back the outcome."
    assert rephrase("I don't know what it is.", 1.0) == "I do not know what it is."
    assert conjugated("carry out")["past"] == ("carried out",)
    assert conjugated("stop")["ing"] == ("stopping",) and conjugated("use")["ing"] == ("using",)


def test_the_edits_of_a_strength_are_among_those_of_a_greater_one(tmp_path):
    settings = {"packages": ["numpy", "pandas", "torch"], "samples": 40}
    write_instructions(settings, tmp_path / "original.jsonl", "x")
    samples = read_samples(tmp_path / "original.jsonl")
    strengths = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    means = []
    for strength in strengths:
        found = [rephrase(s.answer, strength, 3) for s in samples]
        means.append(sum(map(jaccard, (s.answer for s in samples), found)) / len(samples))
    assert means[0] == 1.0 and means == sorted(means, reverse=True)
    assert 0.55 < means[-1] < 0.78
    for sample in samples:
        _, edits = possible(sample.answer, 3)
        assert all(a.end <= b.start for a, b in itertools.pairwise(edits))
        assert all(0 <= edit.draw < 1 for edit in edits)
    assert [rephrase(s.answer, 0.0) for s in samples] == [s.answer for s in samples]
    assert rephrase(samples[0].prompt, 1.0, 1) != samples[0].prompt
    arguments = (tmp_path / "original.jsonl", tmp_path / "p.jsonl", tmp_path / "cache", "x")
    counts, _ = paraphrase_samples("rules", {"strength": 1.0, "seed": 0}, *arguments)
    assert counts["samples"] == 40 and counts["paraphrased"] >= 37
    first = (tmp_path / "p.jsonl").read_bytes()
    paraphrase_samples("rules", {"strength": 1.0, "seed": 0}, *arguments)
    assert (tmp_path / "p.jsonl").read_bytes() == first
    counts, _ = paraphrase_samples("rules", {"strength": 0.0, "seed": 0}, *arguments)
    assert read_samples(tmp_path / "p.jsonl") == samples  # the control: a copy
    assert counts["unchanged"] == {"prompt": 40, "answer": 40}


class Fake:
    """A paraphraser that counts what it is asked and can break off."""

    def __init__(self):
        self.asked, self.breaks_after = [], None

    def __call__(self, texts, attempt):
        for place in reversed(range(len(texts))):  # in any order
            if self.breaks_after is not None and len(self.asked) >= self.breaks_after:
                raise RuntimeError("broke off")
            self.asked.append((texts[place], attempt))
            text = texts[place]
            refuses = ("number 4" in text and attempt < 2) or "number 7" in text
            yield place, text if refuses else f"Again: {text}"


@pytest.fixture
def fake(monkeypatch):
    made = Fake()
    kind = Kind(lambda *_: None, dict, lambda *_: made, attempts=3, cached=True)
    monkeypatch.setitem(paraphrase.KINDS, "fake", kind)
    return made


def test_what_is_refused_is_asked_again_and_what_is_cached_is_not(fake, originals, tmp_path):
    output, cache = tmp_path / "out.jsonl", tmp_path / "cache"
    fake.breaks_after = 5
    with pytest.raises(RuntimeError, match=r"^broke off \(5 paraphrases are kept: run again"):
        paraphrase_samples("fake", {}, originals, output, cache, "x")
    assert not output.exists()
    file = next(cache.iterdir())
    file.write_bytes(file.read_bytes() + b'{"key": "torn')  # a crash in the midst of a line
    fake.breaks_after = None
    counts, notes = paraphrase_samples("fake", {}, originals, output, cache, "x")
    assert max(Counter(fake.asked).values()) == 1  # no text was paid for twice
    assert notes == {"asked": 18 - 5 + 2 + 2, "from_cache": 5}
    assert counts["paraphrased"] == 8 and counts["left_out"]["not_identical"] == 1
    assert [s.id for s in read_samples(output)] == list("01234568")
    assert read_samples(output)[4].prompt.startswith("Again: ")
    before, asked = output.read_bytes(), len(fake.asked)
    again, notes = paraphrase_samples("fake", {}, originals, output, cache, "x")
    assert again == counts and notes == {"asked": 0, "from_cache": 22}
    assert len(fake.asked) == asked and output.read_bytes() == before
    paraphrase_samples("fake", {"seed": 1}, originals, output, cache, "x")
    assert len(fake.asked) == 2 * asked  # other settings, another cache


def _append(path, name):
    for number in range(20):
        cache = Cache(path)
        cache.add(f"{name}{number}", "x" * 5000)
        cache.close()


def test_two_jobs_do_not_tear_the_cache(tmp_path):
    path = tmp_path / "cache.jsonl"
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_append, args=(path, name)) for name in "ab"]
    [job.start() for job in jobs]
    [job.join() for job in jobs]
    assert len(Cache(path).known) == 40 == len(path.read_text().splitlines())
    path.write_text('{"key": "a", "text": "b"}\nnonsense\n')
    with pytest.raises(InputError, match=r"line 2 of .*cache.jsonl is damaged"):
        Cache(path)


def test_identity_is_what_decides_the_text():
    settings = {"url": "http://a/v1", "model": "m", "temperature": 1.0, "seed": 1, "key": "K"}
    same = {**settings, "key": "OTHER", "concurrency": 9, "timeout": 1, "attempts": 7}
    assert identity("endpoint", settings) == identity("endpoint", same)
    for name, value in {"url": "http://b/v1", "model": "n", "temperature": 0.5, "seed": 2}.items():
        assert identity("endpoint", settings) != identity("endpoint", {**settings, name: value})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("other", {}, r"paraphraser has 'other' \(allowed: rules, endpoint, model\)"),
        ("rules", {"strength": 1.5}, r"x.paraphraser.rules.strength is 1.5 \(allowed: from 0 to 1"),
        ("endpoint", {"url": "localhost:80", "model": "m"}, r"endpoint.url is 'localhost:80'"),
        ("model", {"path": "/nowhere"}, r"model.path: /nowhere holds no config.json"),
        ("model", {}, r"give path, or hub and revision"),
    ],
)
def test_settings_that_can_not_work(originals, tmp_path, kind, settings, message):
    with pytest.raises(InputError, match=message):
        paraphrase_samples(kind, settings, originals, tmp_path / "o", tmp_path / "c", "x")


@pytest.fixture
def model(tmp_path, one_thread):
    """A random Llama whose vocabulary is the letters, so that anything it says is garbage."""
    import string

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<s>", "</s>", *string.ascii_letters, *string.digits, *" .,?:;'\"!\n-()"]
    tokenizer = Tokenizer(models.WordLevel({mark: i for i, mark in enumerate(marks)}, "<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(marks), num_attention_heads=2, eos_token_id=1, bos_token_id=0, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model", fast


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_local_model_gives_each_text_its_own(model, temperature):
    from headroom.corpora.paraphrase_model import paraphraser

    folder, tokenizer = model
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    )
    tokenizer.save_pretrained(folder)
    settings = {"path": str(folder), "temperature": temperature, "seed": 0, "new_tokens": 50}
    texts = ["What is it?", "A longer text that says more.", "x", "Why?", "And so on."]
    run = paraphraser({**settings, "batch": 3}, "k")
    run._read = run.tokenizer.decode  # what is cut as well: a random model seldom comes to an end
    found = dict(run(texts, 0))
    assert set(found) == set(range(5)) and dict(run(texts, 0)) == found
    assert (dict(run(texts, 1)) == found) == (temperature == 0)
    alone = {i: next(run([text], 0))[1] for i, text in enumerate(texts)}
    ends = [text.split("</s>")[0] for text in (*found.values(), *alone.values())]
    assert len(max(ends, key=len)) > 20
    for place, text in alone.items():  # neither its neighbours nor padding matter
        assert found[place].split("</s>")[0] == text.split("</s>")[0]


def test_garbage_of_a_local_model_is_left_out_and_kept_in_the_cache(model, originals, tmp_path):
    settings = {"path": str(model[0]), "temperature": 1.0, "seed": 0, "new_tokens": 20}
    arguments = (originals, tmp_path / "out.jsonl", tmp_path / "cache", "x")
    with pytest.raises(
        InputError, match=r"model: none of 9 samples passed the quality gates \(len"
    ):
        paraphrase_samples("model", {**settings, "attempts": 2}, *arguments)
    rows = [json.loads(line) for line in next((tmp_path / "cache").iterdir()).open()]
    assert len(rows) == 2 * 18 == len({row["key"] for row in rows})
