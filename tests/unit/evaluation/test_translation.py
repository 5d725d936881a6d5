"""Translations do not depend on their neighbours; BLEU against sacreBLEU's command and brute force.

Spec: gates, check 4.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from headroom.errors import InputError
from headroom.evaluation.translation import (
    COUNTS,
    bleu,
    bleu_counts,
    bleu_difference,
    bleu_interval,
    check_case,
    score,
    translate,
)
from headroom.statistics import Interval, verdict

WORDS = 37
LONGEST = 24
BOOTSTRAP = {"resamples": 200, "confidence": 0.9, "seed": 3}
TEXT = """Ein Mann in einem blauen Hemd steht auf einer Leiter und putzt ein Fenster.
Zwei Hunde spielen im Schnee, während ein Kind zusieht.
Über den Dächern von Köln fliegt "ein Ballon" (rot, groß).
Die Frau kauft 3,5 kg Äpfel für 12.99 Euro am Markt!
Warum läuft der Junge vor dem grünen Bus davon?
Mehrere Leute warten am Bahnhof auf den Zug nach Berlin.
Das Mädchen mit dem gelben Hut liest ein Buch im Park.
Ein Koch schneidet Zwiebeln in der Küche eines Restaurants.""".splitlines()
REFERENCES = [f"{line} {other}" for line in TEXT for other in TEXT]


def disturbed(share, seed=0):
    """The references with some words taken from elsewhere or left out; one hypothesis is empty."""
    rng = np.random.default_rng(seed)
    pool = " ".join(TEXT).split()
    lines = [
        " ".join(
            str(rng.choice(pool)) if rng.random() < share else word
            for word in line.split()
            if rng.random() > share / 5
        )
        for line in REFERENCES
    ]
    return ["", *lines[1:]]


def build_tokenizer():
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    numbers = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build():
    """A model of random weights that says something else, of other length, to every source.

    The bans in its generation config make it so; without them it repeats one word. The rest of that
    config would warn, or cut, if decoding did not set its own.
    """
    config = MarianConfig(
        vocab_size=3 + WORDS,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=1,
        init_std=0.3,
        dropout=0.3,
        scale_embedding=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MarianMTModel(config)
    model.final_logits_bias[0, 1] = 0.5
    own = {"bad_words_ids": [[0]], "no_repeat_ngram_size": 1, "length_penalty": 0.8}
    limits = {"max_length": 512, "num_beams": 6, "early_stopping": True, "max_new_tokens": 3}
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    for name, value in {**own, **limits, **sampling}.items():
        setattr(model.generation_config, name, value)
    return model


def sources(count=40):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, count)
    return [" ".join(f"w{i}" for i in rng.integers(WORDS, size=length)) for length in lengths]


def greedy(model, tokenizer, sentence):
    """The likeliest token one at a time, in full, without a cache; no token twice, never pad."""
    ids, said = torch.tensor(tokenizer(sentence)["input_ids"])[None], [0]
    while len(said) <= LONGEST and said[-1] != 1:
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits[0, -1]
        logits[said] = -torch.inf
        said.append(1 if len(said) == LONGEST else int(logits.argmax()))
    return " ".join(f"w{token - 3}" for token in said if token > 2)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_translation_depends_on_its_sentence_alone(beams):
    model, tokenizer, sentences = build().eval(), build_tokenizer(), sources()
    alone = [translate(model, tokenizer, [s], beams, 1, LONGEST)[0] for s in sentences]
    assert len(set(alone)) > 30 and len({len(text.split()) for text in alone}) > 10
    shuffled = np.random.default_rng(1).permutation(len(sentences))
    for batch_tokens, places in ((10**6, range(len(sentences))), (150, shuffled), (40, shuffled)):
        found = translate(model, tokenizer, [sentences[i] for i in places], beams, batch_tokens, 24)
        assert found == [alone[i] for i in places]
    if beams == 1:
        assert alone == [greedy(model, tokenizer, sentence) for sentence in sentences]


def test_beam_search_is_the_models_own():
    """Its length penalty, bans and early stopping hold; its beams, limits and sampling do not."""
    model, tokenizer, sentences = build().eval(), build_tokenizer(), sources(12)
    found = translate(model, tokenizer, sentences, 3, 300, LONGEST)
    own = model.generation_config
    own.max_length, own.max_new_tokens, own.num_beams, own.do_sample = LONGEST + 1, None, 3, False
    for sentence, text in zip(sentences, found, strict=True):
        tokens = model.generate(torch.tensor(tokenizer(sentence)["input_ids"])[None])
        assert text == tokenizer.decode(tokens[0], skip_special_tokens=True)
    own.length_penalty = -2.0
    assert translate(model, tokenizer, sentences, 3, 300, LONGEST) != found


def test_batches_hold_no_more_tokens_than_asked(monkeypatch):
    model, tokenizer, shapes = build(), build_tokenizer(), []
    generate = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **inputs: shapes.append(inputs["input_ids"].shape) or generate(**inputs),
    )
    translate(model, tokenizer, [*sources(), " ".join(["w5"] * 50)], 2, 80, LONGEST)
    assert shapes[0] == (1, 51)  # more than asked for by itself
    assert all(rows * length * 2 <= 80 for rows, length in shapes[1:])
    assert len(shapes) < 20


def test_translating_leaves_no_trace(capfd):
    model, tokenizer = build().train(), build_tokenizer()
    model.model.encoder.eval()
    modes = [part.training for part in model.modules()]
    state, config = torch.get_rng_state(), model.generation_config.to_dict()
    kept = []
    model.model.encoder.register_forward_hook(lambda part, args, out: kept.append(out[0]))
    first = translate(model, tokenizer, sources(9), 1, 100, LONGEST)
    assert first == translate(model, tokenizer, sources(9), 1, 100, LONGEST)
    assert translate(model, tokenizer, [], 4, 100, LONGEST) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert model.generation_config.to_dict() == config
    assert not kept[0].is_inference()
    with pytest.raises(RuntimeError, match="no room"):
        model.generate = lambda **inputs: (_ for _ in ()).throw(RuntimeError("no room"))
        translate(model, tokenizer, sources(2), 1, 100, LONGEST)
    assert [part.training for part in model.modules()] == modes
    assert capfd.readouterr() == ("", "")


def test_sources_that_the_model_cannot_read_are_refused():
    model, tokenizer = build(), build_tokenizer()
    with pytest.raises(InputError, match="source sentence 2 of 2 is empty"):
        translate(model, tokenizer, ["w1", "  "], 1, 100, LONGEST)
    with pytest.raises(InputError, match=r"has 65 tokens \(allowed: at most 64"):
        translate(model, tokenizer, ["w1 " * 64], 1, 100, LONGEST)
    with pytest.raises(InputError, match=r"longest is 65 \(allowed: at most 64"):
        translate(model, tokenizer, ["w1"], 1, 100, 65)


def test_a_perfect_translation_has_100():
    found = score(REFERENCES, REFERENCES, lowercase=False)
    assert found["bleu"] == pytest.approx(100) and found["chrf"] == pytest.approx(100)
    assert (found["sentences"], found["brevity_penalty"], found["length_ratio"]) == (64, 1.0, 1.0)
    assert verdict(Interval(1, 0.5, 2), [0.5, 2.0]) == "better"


@pytest.mark.parametrize("lowercase", [False, True])
def test_scores_are_those_of_the_sacrebleu_command(tmp_path, lowercase):
    hypotheses = disturbed(0.2)
    for name, lines in (("hypotheses", hypotheses), ("references", REFERENCES)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    command = f"{sys.executable} -m sacrebleu references -i hypotheses -m bleu chrf -w 6 -f json"
    more = ["-lc", "--chrf-lowercase"] if lowercase else []
    output = subprocess.run(
        [*command.split(), *more], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    theirs, ours = json.loads(output), score(hypotheses, REFERENCES, lowercase)
    assert 40 < ours["bleu"] < 80 and ours["brevity_penalty"] < 1
    for name, found in zip(("bleu", "chrf"), theirs, strict=True):
        assert ours[name] == pytest.approx(found["score"], abs=1e-6)
        assert ours[f"{name}_signature"] == found["signature"]
    assert ("case:lc" if lowercase else "case:mixed") in ours["bleu_signature"]


def test_bleu_is_of_words_not_of_characters():
    """A wrong letter in every other word breaks half of the words, but few characters."""
    hypotheses = [
        " ".join(word[:-1] + "x" if place % 2 else word for place, word in enumerate(line.split()))
        for line in REFERENCES
    ]
    spelled = [[" ".join(line.replace(" ", "_")) for line in x] for x in (hypotheses, REFERENCES)]
    assert score(*spelled, lowercase=False, tokenize="none")["bleu"] > 60
    assert score(hypotheses, REFERENCES, lowercase=False)["bleu"] < 40


@pytest.mark.parametrize("language", ["de", "en"])
def test_lower_cased_hypotheses_are_caught(language):
    english = [line.lower().capitalize() for line in REFERENCES]  # only its first letter
    references = REFERENCES if language == "de" else english
    lowered = [line.lower() for line in (disturbed(0.2) if language == "de" else english)]
    wanted = r"key pairs.x.lowercase: hypotheses are lower-cased, references are not.*lowercase: tr"
    with pytest.raises(InputError, match=wanted):
        check_case(lowered, references, False, "pairs.x")
    check_case(lowered, references, True, "pairs.x")
    check_case(lowered, [line.lower() for line in references], False, "pairs.x")
    check_case(["Der", *lowered[1:]], references, False, "pairs.x")
    check_case(["ein mann in einem"] * 64, references, False, "pairs.x")  # broken, not lower-cased
    check_case(["123"] * 64, references, False, "pairs.x")


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("lowercase", [False, True])
def test_counts_add_up_to_corpus_bleu(share, lowercase):
    hypotheses = disturbed(share)
    if share == 1.0:
        hypotheses = [" ".join(line.split()[:2]) for line in hypotheses]  # some orders have none
    found = BLEU(lowercase=lowercase).corpus_score(hypotheses, [REFERENCES])
    counts_N10 = bleu_counts(hypotheses, REFERENCES, lowercase)
    assert counts_N10.dtype == np.int64 and counts_N10.shape == (64, len(COUNTS))
    sums = dict(zip(COUNTS, counts_N10.sum(0).tolist(), strict=True))
    orders = range(1, 5)
    assert [sums[f"correct_{order}"] for order in orders] == found.counts
    assert [sums[f"total_{order}"] for order in orders] == found.totals
    assert (sums["hypothesis_length"], sums["reference_length"]) == (found.sys_len, found.ref_len)
    assert bleu(counts_N10.sum(0)) == found.score


def resampled_scores(hypotheses):
    """corpus_score of the sentences that each resample draws, sentence by sentence."""
    rng = np.random.default_rng(BOOTSTRAP["seed"])
    draws = [rng.integers(0, 64, 64) for _ in range(BOOTSTRAP["resamples"])]
    return np.array(
        [
            BLEU().corpus_score([hypotheses[i] for i in d], [[REFERENCES[i] for i in d]]).score
            for d in draws
        ]
    )


def test_intervals_are_those_of_brute_force():
    """And of sacreBLEU's own bootstrap, within what 1000 resamples leave open."""
    first, second = disturbed(0.3), disturbed(0.25, seed=1)
    counts = [bleu_counts(lines, REFERENCES, False) for lines in (first, second)]
    scores = [resampled_scores(lines) for lines in (first, second)]
    single = bleu_interval(counts[0], BOOTSTRAP)
    assert single.value == BLEU().corpus_score(first, [REFERENCES]).score
    np.testing.assert_allclose(single[1:], np.quantile(scores[0], [0.05, 0.95]), rtol=1e-12)
    pair = bleu_difference(counts[0][None], counts[1][None], BOOTSTRAP)
    bounds = np.quantile(scores[1] - scores[0], [0.05, 0.95])
    np.testing.assert_allclose(pair[1:], bounds, rtol=1e-12)
    theirs = BLEU().corpus_score(first, [REFERENCES], n_bootstrap=1000)
    ours = bleu_interval(counts[0], {"resamples": 1000, "confidence": 0.95, "seed": 0})
    assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci, rel=0.15)


def test_differences_are_paired_over_sentences_and_seeds():
    base = bleu_counts(disturbed(0.3), REFERENCES, False)
    seeds = [bleu_counts(disturbed(0.2, seed), REFERENCES, False) for seed in (1, 2, 3)]
    same = bleu_difference(base[None], base[None], BOOTSTRAP)
    assert same == (0, 0, 0)
    found = bleu_difference(base[None], np.stack(seeds), BOOTSTRAP)
    assert found == bleu_difference(np.stack([base] * 3), np.stack(seeds), BOOTSTRAP)
    own = [bleu(counts.sum(0)) - bleu(base.sum(0)) for counts in seeds]
    assert found.value == pytest.approx(np.mean(own), rel=1e-12)
    back = bleu_difference(np.stack(seeds), base[None], BOOTSTRAP)
    np.testing.assert_allclose(back, (-found.value, -found.high, -found.low), rtol=1e-12)
    assert verdict(found, own) == "better" and verdict(back, [-x for x in own]) == "worse"
    # A seed drawn anew moves the mean of three, so the interval is wider than that of fixed ones.
    apart = np.stack([seeds[0], base, seeds[1]])
    drawn = bleu_difference(base[None], apart, BOOTSTRAP)
    assert drawn.high - drawn.low > 1.5 * (found.high - found.low)
    mixed = [bleu(counts.sum(0)) - bleu(base.sum(0)) for counts in apart]
    assert verdict(found, mixed) == "undecided"
    assert verdict(Interval(1, -0.1, 2), own) == "undecided"


def test_bad_input_is_refused(monkeypatch):
    counts = bleu_counts(REFERENCES, REFERENCES, False)
    for call in (score, bleu_counts):
        with pytest.raises(InputError, match=r"1 hypotheses for 2 references \(allowed"):
            call(["a"], ["a", "b"], False)
        with pytest.raises(InputError, match="0 hypotheses for 0"):
            call([], [], False)
        with pytest.raises(InputError, match=r"tokenize is 14a \(allowed: .*13a, intl"):
            call(["a"], ["a"], False, "14a")
        monkeypatch.setitem(sys.modules, "MeCab", None)  # a package that sacreBLEU does not require
        with pytest.raises(InputError, match=r"tokenize ja-mecab can't be used here: [^\n]*$"):
            call(["a"], ["a"], False, "ja-mecab")
    with pytest.raises(InputError, match=r"at least 2 sentences \(found 1\)"):
        bleu_interval(counts[:1], BOOTSTRAP)
    with pytest.raises(InputError, match="different references"):
        bleu_difference(counts[None], counts[None, ::-1], BOOTSTRAP)
