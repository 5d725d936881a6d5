"""Recipes: parse and format are inverse, one spelling a number, nothing escapes its folder."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headroom.errors import InputError
from headroom.recipes import (
    METRICS,
    SCORES,
    Merge,
    Recipe,
    Remove,
    canonical,
    format_recipe,
    format_step,
    parse_recipe,
    parse_step,
    recipe_regex,
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
        ("../tiny", "is not a name"),
        ("tiny/x", "is not a name"),
        ("tiny" + "+merge-relu-average-t0.99" * 10, "longer than"),
    ],
)
def test_refusals_name_what_is_wrong(name, said):
    with pytest.raises(InputError, match=re.escape(said)):
        parse_recipe(name)


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
