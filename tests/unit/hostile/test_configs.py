"""Configurations that nobody meant: each is loaded, or refused in one line that names the key."""

import copy
import datetime
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headroom import experiment
from headroom.configuration import filled, load_schema
from headroom.errors import InputError
from tests.workflow.conftest import SMALL

ROOT = Path(__file__).parents[3]
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
RULES = load_schema(SCHEMA)
READ = [yaml.safe_load(p.read_text()) for p in (ROOT / "config.yaml", *ROOT.glob("examples/*"))]
BASES = [SMALL, *READ, *(filled(config, RULES) for config in (SMALL, *READ))]


@pytest.fixture(autouse=True, scope="module")
def schema_is_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "load_schema", lambda path: RULES)
        yield


def load(config):
    return experiment.load(config, SCHEMA)


def places(node, path=()):
    """Every place below the top of a configuration."""
    entries = node.items() if isinstance(node, dict) else []
    for key, value in enumerate(node) if isinstance(node, list) else entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(config, path):
    for key in path:
        config = config[key]
    return config


def put(config, path, value):
    """A copy with another value; what is beside the path is shared, as it may be deep."""
    if not path:
        return value
    config, (key, *rest) = copy.copy(config), path
    config[key] = put(config[key], rest, value) if rest else value
    return config


def nested(levels):
    value = "deep"
    for level in range(levels):
        value = [value] if level % 2 else {"deeper": value}
    return value


NUMBERS = [0, -1, 1, 2, 3, 2.0, 0.5, 1.5, 0.9999999, 1e-9, 1e300, 10**30, 2**32, -0.0, True]
NUMBERS += [math.nan, math.inf, -math.inf]
TEXTS = ["", " ", "0,05", "3e-4", "no", "a,b", "../x", "/", "\0", "a\nb", "tiny\n", "x" * 300, "😀"]
TEXTS += ["tiny", "auto", "docs", "error", "relu", "flap", "random007", "random٣", "٣x1", "2x1\n"]
TEXTS += ["(", "**", "~nobody/x", "{x}", "\ud800", "\x1b[31m", "\u202e", "tiny+", "+", "fixed0"]
TEXTS += ["3-1", "merge-relu-average-t0.99", "prune-flap-drop-r0.50-s٣", "gate-k" + "9" * 5000]
TEXTS += ["tiny+merge-relu-average-t0.99", "prune-flap-ot_mass-r0.50", "https://u:p@h/x"]
JUNK = [None, [], {}, [[]], [{}], {"a": 1}, {1: 2}, {None: None}, b"bytes", {1}, nested(2000)]
JUNK += [datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), nested(20), [1, "a", None]]
KEYS = ["x", "tpyo", 1, None, True, 1.5, "a\nb", "../x", "a,b", "x" * 300, "😀", "", "\0", "Tiny"]
KEYS += ["tiny\n", "a+b", "a--b", "-a", ".a", "a/b", datetime.date(2020, 1, 1), math.nan]


def alike(value):
    """Values of the kind that stands there, to come as far as a study's own checks."""
    if isinstance(value, str):
        return st.sampled_from(TEXTS)
    if isinstance(value, int | float):
        return st.sampled_from(NUMBERS)
    if isinstance(value, list):
        return st.sampled_from([[], value[::-1], value * 2, value[:1]])
    return st.sampled_from([{}, *JUNK])


@st.composite
def mutated(draw):
    """A valid configuration with one value replaced, left out or added."""
    config = draw(st.sampled_from(BASES))
    path = draw(st.sampled_from(list(places(config))))
    value = at(config, path)
    kind = draw(st.sampled_from(["alike", "alike", "any", "left out", "added"]))
    if kind == "added" and isinstance(value, dict):
        key = draw(st.sampled_from(KEYS))
        return put(config, (*path, key), draw(st.sampled_from([*value.values(), {}, None, 1])))
    if kind == "left out":
        rest = copy.copy(at(config, path[:-1]))
        del rest[path[-1]]
        return put(config, path[:-1], rest)
    junk = st.sampled_from([*NUMBERS, *TEXTS, *JUNK])
    return put(config, path, draw(alike(value) if kind == "alike" else junk))


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=HealthCheck)
@given(mutated())
def test_a_mutated_configuration_is_loaded_or_refused_in_one_line(config):
    try:
        full = load(config)
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and message.isprintable()
        assert message.startswith(("config key ", "config needs ", "recipe "))
        assert "{'" not in message and "u:p@" not in message
        return
    experiment.sanitised(full)
    assert all(math.isfinite(v) for p in places(full) if isinstance(v := at(full, p), float))


def test_each_value_of_another_kind_is_named():
    config = filled(SMALL, RULES)
    for path in places(config):
        value = at(config, path)
        for other, said in (
            ([[]], ""),
            (math.nan, " is nan"),
            (datetime.date(2020, 1, 1), " is a"),
        ):
            if isinstance(value, list) and isinstance(other, list):
                other = {"a": 1}
            with pytest.raises(InputError) as error:
                filled(put(config, path, other), RULES)
            key = f"config key {'.'.join(map(str, path))}"
            assert str(error.value).startswith(key + said), error.value


def test_each_misspelt_key_is_named():
    config, tried = filled(SMALL, RULES), 0
    named = {"corpora", "checkpoints", "pairs", "translators", "instructions", "ablations"}
    for path in places(config):
        if not isinstance(at(config, path), dict) or path[-1] in {*named, "learning_rates"}:
            continue
        for key, name in (("tpyo", "tpyo"), (7, "7"), (False, "False"), ("a\nb", r"a\nb")):
            with pytest.raises(InputError) as error:
                filled(put(config, (*path, key), 1), RULES)
            wanted = f"config key {'.'.join(map(str, path))}.{name} is unknown"
            assert str(error.value).startswith(wanted), error.value
            tried += 1
    assert tried > 100


REFUSED = ["../x", "a/b", "/", "..", ".", "a\0", "a\n", "a\nb", "x" * 300, "a,b", "é", "😀", ""]
REFUSED += ["a+b", "A", "-a", "a--b", "a-", " a", 1, None, False, 1.5]


@pytest.mark.parametrize("table", ["corpora", "checkpoints", "pairs", "translators", "ablations"])
def test_names_that_no_file_could_have_are_refused_by_name(table):
    path = ("branches", "ablations") if table == "ablations" else (table,)
    for name in REFUSED:
        config = put(SMALL, (*path, name), next(iter(at(SMALL, path).values())))
        with pytest.raises(InputError) as error:
            load(config)
        key = f"config key {'.'.join(path)}: "
        assert str(error.value).startswith(key) and "can't be a name there" in str(error.value)
        assert len(str(error.value)) < 400 and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "instructions.objects.paraphraser",
            {"rules": {}, "endpoint": {"model": "m"}},
            "needs exactly one of rules, endpoint, model, path; it has ['endpoint', 'rules']",
        ),
        ("ffn.ratios", [0.1234567], "0.1234567 has more than six decimals"),
        ("heads.merges.0.thresholds", [0.9999999], "0.9999999 has more than six decimals"),
        ("heads.ridge", "0,05", "write 3.0e-4 and 0.05"),
        ("corpora.docs.boundary", False, "allowed: auto, bos, eos, none"),
        (
            "checkpoints.tiny",
            {"hub": "https://me:sesame@host/x"},
            "holds an address with a user or",
        ),
        ("checkpoints.tiny", {"hub": "../x"}, "it must match"),
        ("evaluation.corpora", nested(3000), "is nested without end"),
    ],
)
def test_what_people_write_by_mistake_is_told(path, value, said):
    path = tuple(int(key) if key.isdigit() else key for key in path.split("."))
    with pytest.raises(InputError) as error:
        load(put(SMALL, path, value))
    assert said in str(error.value) and "sesame" not in str(error.value)


def test_references_that_multiply_or_run_in_circles_are_refused():
    lots = ["x"]
    for _ in range(12):
        lots = [lots] * 10
    circle = {}
    circle["again"] = circle
    for value in (lots, circle):
        with pytest.raises(InputError, match=r"config key corpora.* nested without end"):
            load({**SMALL, "corpora": value})


@pytest.mark.parametrize("top", [None, [], "x", 1, [SMALL]])
def test_a_configuration_is_keys_and_values(top):
    with pytest.raises(InputError, match=r"^the configuration is .* \(allowed: keys and values\)$"):
        load(top)


def test_what_the_schema_shares_is_not_shared_between_names():
    source = {"packages": ["yaml"]}
    full = load({**SMALL, "corpora": {"docs": source, "more": source}})
    full["corpora"]["docs"]["split"]["train"] = 0
    assert full["corpora"]["more"]["split"]["train"] != 0 and "split" not in source
