"""Recipes: parse and format are inverse, one spelling a number, nothing escapes its folder."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headroom.errors import InputError
from headroom.recipes import (
    METRICS,
    SCORES,
    Gate,
    Mask,
    Merge,
    Recipe,
    Remove,
    canonical,
    format_recipe,
    format_step,
    parse_recipe,
    parse_step,
    recipe_regex,
    translator_regex,
)

fractions = st.integers(1, 999).map(lambda n: canonical(n / 1000))
budgets = st.one_of(
    st.tuples(st.integers(1, 64), st.integers(1, 64)).map(lambda p: f"b{p[0]}x{p[1]}"),
    fractions.map("b{}".format),
)
controls = st.one_of(st.just(""), st.just("dissimilar"), st.integers(0, 99).map("random{}".format))
merges = st.builds(
    Merge,
    st.sampled_from([*METRICS, "relu_nosink"]),
    st.sampled_from(["average", "aligned", "refit"]),
    st.one_of(fractions.map("t{}".format), fractions.map("q{}".format), budgets),
    controls,
)
removals = st.builds(
    Remove, st.sampled_from(list(SCORES)), st.sampled_from(["drop", "refit"]), budgets
)
recipes = st.builds(
    Recipe,
    st.sampled_from(["tiny", "smollm2-135m", "llama-3.1-8b"]),
    st.lists(st.one_of(merges, removals), max_size=4).map(tuple),
)


@given(recipes)
def test_parse_inverts_format_and_the_wildcard_matches(recipe):
    name = format_recipe(recipe)
    assert parse_recipe(name) == recipe
    bases = ["tiny", "smollm2-135m", "llama-3.1-8b"]
    assert re.fullmatch(recipe_regex(bases), name)
    assert "/" not in name and ".." not in name


prices = st.integers(0, 3_000_000).map(lambda n: f"l{canonical(n / 1e6)}")
heads = st.integers(0, 200).map("k{}".format)
seeds = st.one_of(st.just(""), st.integers(1, 99).map("s{}".format))
translator_steps = st.one_of(
    st.builds(Gate, st.one_of(prices, heads), seeds),
    st.builds(Mask, st.sampled_from(["michel", "random", "scratch"]), heads, seeds),
)


@given(translator_steps)
def test_a_translator_is_gated_once(step):
    name, pattern = format_step(step), translator_regex(["cldr", "opus-en.de"])
    assert parse_step(name) == step
    for base in ("cldr", "opus-en.de"):
        assert re.fullmatch(pattern, base)
        assert re.fullmatch(pattern, f"{base}+{name}")
        assert not re.fullmatch(pattern, f"{base}+{name}+{name}")
    assert not re.fullmatch(pattern, f"opus-enxde+{name}")
    assert not re.fullmatch(pattern, f"cldr+{name}-s0x")
    assert not re.fullmatch(pattern, "cldr+merge-relu-average-t0.99")
    assert not re.fullmatch(recipe_regex(["cldr"]), f"cldr+{name}")
    assert not re.fullmatch(translator_regex([]), f"+{name}")


@pytest.mark.parametrize(
    "name", ["gate-l0.05", "gate-l2.00", "gate-k6-s1", "mask-michel-k6", "mask-scratch-k0-s12"]
)
def test_steps_of_translators_have_these_names(name):
    assert format_step(parse_step(name)) == name


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused_in_one_line(text):
    try:
        recipe = parse_recipe(text)
    except InputError as error:
        assert "\n" not in str(error).replace(repr(text), "")
    else:
        assert format_recipe(recipe) == text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny+mrge-relu-average-t0.99", "'mrge' is unknown"),
        ("tiny+merge-rely-average-t0.99", "criterion 'rely'"),
        ("tiny+merge-relu-mean-t0.99", "method 'mean'"),
        ("tiny+merge-relu-average-t0.990", "write t0.99"),
        ("tiny+merge-relu-average-t0.9", "write t0.90"),
        ("tiny+merge-relu-average-t1.50", "above 1"),
        ("tiny+merge-relu-average", "write merge-"),
        ("tiny+merge-error-refit-t0.99", "criterion error"),
        ("tiny+remove-flap-drop-b0x2", "budget 'b0x2'"),
        ("cldr+gate-l0.5", "write l0.50, not l0.5"),
        ("cldr+gate-l00.50", "write l0.50, not l00.50"),
        ("cldr+gate-l0.0000001", "write l0.00, not l0.0000001"),
        ("cldr+gate-k06", "write k6, not k06"),
        ("cldr+mask-random-k00", "write k0, not k00"),
        ("cldr+gate-l0.05-s0", "leave out the default seed s0"),
        ("cldr+gate-k6-s01", "write s1"),
        ("cldr+gate-l-1", "strength 'l' is not one of"),
        ("cldr+gate-0.05", "strength '0.05' is not one of"),
        ("cldr+gate-k3-k4", "'k4' is no seed that could stand there"),
        ("cldr+mask-best-k3", "choice 'best' is not one of michel|random|scratch"),
        ("cldr+mask-michel-l0.05", "count 'l0.05' is not one of"),
        ("cldr+mask-michel", "write mask-{choice}-{count}[-{seed}]"),
        ("cldr+gate-l0.05+gate-k3", "once"),
        ("cldr+gate-l0.05+merge-relu-average-t0.99", "once"),
        ("../tiny", "is not a name"),
        ("tiny/x", "is not a name"),
        ("tiny" + "+merge-relu-average-t0.99" * 10, "longer than"),
    ],
)
def test_refusals_name_what_is_wrong(name, said):
    with pytest.raises(InputError, match=re.escape(said)) as error:
        parse_recipe(name)
    assert "\n" not in str(error.value)


def test_numbers_have_one_spelling():
    assert [canonical(x) for x in (0.99, 0.5, 0.995, 1, 0)] == [
        "0.99",
        "0.50",
        "0.995",
        "1.00",
        "0.00",
    ]
    assert format_step(parse_step("merge-relu-average-t0.99")) == "merge-relu-average-t0.99"
    assert parse_recipe("tiny+merge-relu-average-t0.99+remove-flap-drop-b4x2").parent == (
        "tiny+merge-relu-average-t0.99"
    )
