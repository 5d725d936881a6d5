"""The built-in sentence pairs: the same everywhere, and the same said on both sides."""

import os
import re
import subprocess
import sys
import time
import unicodedata

import pytest

from headroom.corpora.phrases import phrases
from headroom.errors import InputError


@pytest.fixture(scope="module")
def german():
    start = time.process_time()
    pairs = phrases("en", "de", 4000, 0)
    assert time.process_time() - start < 10
    return pairs


def test_unique_clean_and_of_the_length_of_sentences(german):
    assert len(german) == len({source for source, _ in german}) == 4000
    for text in (text for pair in german for text in pair):
        assert text == " ".join(unicodedata.normalize("NFC", text).split())
        assert not {c for c in text if unicodedata.category(c) in ("Zs", "Cc")} - {" "}
    words = [max(len(text.split()) for text in pair) for pair in german]
    assert max(words) <= 25 and 6 < sum(words) / len(words) < 12
    assert sum(count >= 3 for count in words) > 0.9 * len(words)


def test_another_machine_draws_the_same(german):
    code = (
        "import sys; from headroom.corpora.phrases import phrases; import hashlib;"
        "print(hashlib.sha256(repr(phrases('en', 'de', 300, 0)).encode()).hexdigest())"
    )
    digests = set()
    for zone, language, hashing in (("Asia/Tokyo", "fr_FR.UTF-8", "1"), ("UTC", "C", "2")):
        environment = os.environ | {
            "TZ": zone,
            "LC_ALL": language,
            "LANGUAGE": language,
            "PYTHONHASHSEED": hashing,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) == 1
    assert phrases("en", "de", 300, 0) == german[:300]  # a longer draw begins with a shorter one
    assert phrases("en", "de", 300, 1) != german[:300]


def test_both_sides_carry_the_same_numbers(german):
    import random

    from headroom.corpora import phrases as module
    from headroom.corpora.forms import stock_of

    def numbers(text, group, point):
        found = re.findall(r"\d[\d.,]*\d|\d", text)
        return sorted(number.replace(group, "").replace(point, ".") for number in found)

    stock, draw = stock_of("en", "de", "pairs.x.cldr"), random.Random(0)
    for kind in (module._amount, module._measure, module._rate, module._plain_number):
        for _ in range(200):
            source, target = map(kind(draw, stock), stock.sides)
            assert numbers(source, ",", ".") == numbers(target, ".", ",") != [], (source, target)
    for kind in (module._parts, module._ago):
        for _ in range(200):
            source, target = map(kind(draw, stock), stock.sides)
            assert numbers(source, ",", ".") == numbers(target, ",", ".") != [], (source, target)
    years = 0
    for source, target in german:
        for year in re.findall(r"(?<![\d.,])(?:19|20)\d\d\b(?![,.]\d)", source):
            assert year in target, (source, target)
            years += 1
    assert years > 800


def test_known_phrases(german):
    from headroom.corpora.forms import stock_of

    stock = stock_of("en", "de", "pairs.x.cldr")
    assert ("Germany", "Deutschland") in stock.names["territories"]
    numerals = [form for forms in stock.numerals.values() for form in forms]
    assert ("forty-two", "zweiundvierzig") in numerals and ("tenth", "zehnte") in numerals
    assert len({source for source, _ in numerals}) == len(numerals)
    # "5 days" is said long and short in English; the German "5 Tg." must not be among the targets.
    assert ("duration-day", "long") in stock.units and ("duration-day", "short") not in stock.units
    for shape in (r" \(", r", or ", r" ago\b", r" per ", r" – ", r"\d%", r"€", r"AD\b", r"euros"):
        assert any(re.search(shape, source) for source, _ in german), shape


@pytest.mark.parametrize(
    ("source", "target"), [("de", "en"), ("en", "ja"), ("ar", "fr"), ("pt_BR", "zh"), ("ia", "hi")]
)
def test_any_two_locales(source, target):
    pairs = phrases(source, target, 60, 0)
    assert len(pairs) == 60 and all(left and right for left, right in pairs)
    assert sum(left != right for left, right in pairs) > 50


def test_locales_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"config key pairs.x.cldr: .*'xx'.*allowed: .*pt_BR"):
        phrases("en", "xx", 5, 0, key="pairs.x.cldr")
    with pytest.raises(InputError, match=r"pairs.x.cldr: de twice"):
        phrases("de", "de", 5, 0, key="pairs.x.cldr")


def test_exhausted_supply_is_named(monkeypatch):
    from headroom.corpora import phrases as module

    monkeypatch.setattr(module, "KINDS", ((module._ago, 1, lambda stock: True),))
    monkeypatch.setattr(module, "_phrase", lambda draw, stock, kinds: module._ago(draw, stock))
    with pytest.raises(InputError, match=r"pairs.x.cldr.pairs is 2000: .*allowed: fewer"):
        phrases("en", "de", 2000, 0, key="pairs.x.cldr")
