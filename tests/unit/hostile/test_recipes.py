"""Names of recipes from anywhere: one name a thing, inside its folder, or refused in one line."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headroom.errors import InputError
from headroom.recipes import (
    ALL_STEPS,
    NAME_BYTES,
    STEPS,
    Recipe,
    canonical,
    exact,
    format_recipe,
    parse_recipe,
    recipe_regex,
    translator_regex,
)

ROOT = Path("/somewhere/results/checkpoints")
ONE = settings(max_examples=120, derandomize=True, deadline=None)
bases = st.from_regex(r"[a-z0-9][a-z0-9_.]{0,8}(-[a-z0-9_.]{1,8}){0,3}", fullmatch=True)
ascii_only = st.characters(min_codepoint=32, max_codepoint=126)


def arguments(kind):
    """Steps of a kind with arguments that its patterns allow, meaningful or not."""
    drawn = {}
    for field in fields(kind):
        pattern = st.from_regex(kind.pattern[field.name], fullmatch=True, alphabet=ascii_only)
        pattern = pattern.filter(lambda text: len(text) < 24)
        drawn[field.name] = pattern if field.default != "" else st.one_of(st.just(""), pattern)
    return st.builds(kind, **drawn)


def canonical_recipes():
    """Recipes that are accepted as they are written."""
    steps = st.lists(st.one_of(*map(arguments, STEPS.values())), max_size=3).map(tuple)
    once = st.tuples(st.one_of(*map(arguments, ALL_STEPS.values())))
    return st.builds(Recipe, bases, st.one_of(steps, once))


def accepted(text):
    """The recipe that a text is, or None; whatever is refused is refused in one line."""
    try:
        return parse_recipe(text)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable()
        return None


def stays(name):
    path = ROOT / name
    assert path.parent == ROOT and path.name == name, "nothing escapes its folder"
    longest = f".{name}.4194304.json"  # staging folders and temporary files are called so
    assert len(longest.encode()) <= 255 and len(name.encode()) <= NAME_BYTES


@ONE
@given(canonical_recipes())
def test_parse_is_the_inverse_of_format(recipe):
    name = format_recipe(recipe)
    found = accepted(name)
    if found is None:
        return
    assert found == recipe and format_recipe(found) == name
    stays(name)
    wanted = translator_regex if any(s.verb in ("gate", "mask") for s in recipe.steps) else None
    assert re.fullmatch((wanted or recipe_regex)([recipe.base]), name)


def test_most_of_what_is_generated_is_read():
    seen = []

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(canonical_recipes())
    def count(recipe):
        seen.append(accepted(format_recipe(recipe)) is not None)

    count()
    assert sum(seen) > len(seen) / 10, "the property above would say nothing"


CHARACTERS = "abt0129+-._/\\ \n\0٣é😀\ud800merglupsnk"
PIECES = ["tiny", "+", "-", "merge", "relu", "average", "t0.99", "t1.00", "b2x1", "b٣x1", "random0"]
PIECES += ["random007", "random٣", "prune", "flap", "drop", "ot_mass", "r0.50", "r0.5", "s1", "s٣"]
PIECES += ["s01", "gate", "k6", "k06", "l0.05", "mask", "..", "/", "\n", "\0", "9" * 5000, "\ud800"]


@ONE
@given(
    st.one_of(
        st.text(st.sampled_from(CHARACTERS), max_size=300),
        st.text(st.characters(), max_size=30),
        st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
        st.lists(st.sampled_from(PIECES), max_size=7).map("-".join).map("tiny+{}".format),
    )
)
def test_any_text_is_a_canonical_name_or_refused_in_one_line(text):
    recipe = accepted(text)
    if recipe is not None:
        assert format_recipe(recipe) == text and text.isascii()
        stays(text)


@pytest.mark.parametrize(
    "name",
    [
        "tiny\n",
        "tiny+merge-relu-average-t0.99\n",
        "tiny+merge-relu-average-b٣x1",
        "tiny+merge-relu-average-t0.99-random٣",
        "tiny+merge-relu-average-t0.99-random07",
        "tiny+prune-flap-drop-r0.50-s٣",
        "tiny+gate-k" + "9" * 5000,
        "tiny+gate-k٣",
        "tiny+\ud800",
        "..",
        ".tiny",
        "tiny/../../x",
        "",
        "+",
        "tiny+",
        "+merge-relu-average-t0.99",
    ],
)
def test_second_names_and_ways_out_are_refused(name):
    assert accepted(name) is None


def test_names_of_models_as_they_are_published_are_names():
    for name in ("llama-instruct-7b", "opus-mt-en-ru", "qwen2.5-0.5b", "a"):
        assert parse_recipe(f"{name}+merge-relu-average-t0.99").base == name


@ONE
@given(st.floats(0, 1))
def test_a_number_has_one_spelling(value):
    text = canonical(value)
    assert canonical(float(text)) == text
    try:
        assert exact(value) == text and float(text) == value
    except InputError as error:
        assert float(text) != value and "more than six decimals" in str(error)
