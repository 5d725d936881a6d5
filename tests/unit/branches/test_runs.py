"""Names of runs, groups and stacks: inverse to their parse, one for a model, fit for wildcards."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headroom.branches.runs
from headroom.branches.runs import (
    Architecture,
    Rotation,
    Run,
    Stack,
    branch_range,
    group,
    group_regex,
    in_order,
    pairs_of,
    parse_group,
    parse_rotation,
    parse_run,
    parse_stack,
    rotation,
    stack_regex,
)
from headroom.errors import InputError

SOURCE = str(Path(headroom.branches.runs.__file__).parents[2])
WHOLE, NARROW, WIDE = Architecture(512, 8), Architecture(512, 16), Architecture(512, 4)


def random_run(rng):
    architecture = Architecture(64 * rng.choice((1, 2, 8, 24)), rng.choice((1, 2, 4)))
    low = rng.randint(1, 9)
    branches = rng.choice((f"fixed{low}", f"{low}-{low + rng.randint(1, 40)}"))
    mask, seed = rng.choice(("columns", "isolated")), rng.choice((0, 1, 12))
    ratio = rng.choice((0, 1, 0.5, 0.875, 0.0625, rng.randint(0, 10000) / 10000))
    turned = rotation(
        ratio, rng.choice(("flat", "time")), rng.choice(("low", "high")), rng.choice((128, 64, 1))
    )
    return Run(group(architecture, branches, mask, seed), turned)


@pytest.mark.parametrize(
    "architecture, ratio, train_branch, name",
    [
        (WHOLE, 0.5, "fixed4", "512-h8-r05-bfixed4"),
        (NARROW, 0.875, "1-15", "512-d32-h16-r0875-b1-15"),
        (WIDE, 0.75, "1-15", "512-d128-h4-r075-b1-15"),
        (Architecture(1536, 24), 0, "1-31", "1536-h24-r00-b1-31"),
    ],
)
def test_the_default_is_left_out_of_a_run_s_name(architecture, ratio, train_branch, name):
    run = Run(group(architecture, train_branch), rotation(ratio))
    assert run.name == name
    assert parse_run(name) == run


def test_what_differs_from_the_default_is_in_the_name():
    shared = group(NARROW, "1-15", "isolated", 2)
    assert Run(shared, rotation(0.875, "time")).name == "512-d32-h16-r0875-time-isolated-b1-15-s2"
    assert shared.name == "512-d32-h16-isolated-b1-15-s2"
    assert rotation(0.5, "time", "high", 64).name == "r05-time-high-stride64"
    assert rotation(1, stride=64).name == "r10-stride64"


def test_names_are_inverse_to_parse_and_fit_the_wildcards():
    rng = random.Random(0)
    made = [random_run(rng) for _ in range(3000)]
    assert len({run.name for run in made}) == len(set(made))
    for run in made:
        assert parse_run(run.name) == run
        assert parse_group(run.group.name) == run.group
        assert parse_rotation(run.rotation.name) == run.rotation
        assert re.fullmatch(group_regex(), run.group.name)
        assert not re.fullmatch(stack_regex(), run.group.name)
    for _ in range(300):
        rotations = [run.rotation for run in rng.sample(made, rng.randint(1, 8))]
        stack = Stack(rng.choice(made).group, tuple(in_order(rotations)))
        assert parse_stack(stack.group.name, stack.name) == stack
        assert re.fullmatch(stack_regex(), stack.name)
        assert [parse_run(run.name).rotation for run in stack.runs] == list(stack.rotations)


def test_patterns_are_wildcard_constraints():
    for pattern in (group_regex(), stack_regex()):
        assert re.compile(pattern).groups == 0
        for text in ("", ".x", "a/b", "512-h8-b1-15/r05", "r05+r10", "r05,", "r05\n", "r٠٥"):
            assert not re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    "asked, same",
    [
        ((0, "flat", "high", 64), "r00"),
        ((0, "time", "high", 64), "r00-time"),
        ((1, "time", "high", 64), "r10-stride64"),
        ((-0.0,), "r00"),
    ],
)
def test_what_changes_nothing_makes_no_second_run(asked, same):
    assert rotation(*asked) == parse_rotation(same)
    assert rotation(*asked).name == same


def test_a_single_branch_has_no_others_to_be_isolated_from():
    assert group(WHOLE, "fixed1", "isolated", 3) == group(WHOLE, "fixed1", "columns", 3)
    assert group(WHOLE, "fixed2", "isolated") != group(WHOLE, "fixed2")


@pytest.mark.parametrize(
    "parse, name",
    [
        (parse_rotation, "r050"),
        (parse_rotation, "r1"),
        (parse_rotation, "r11"),
        (parse_rotation, "r012345"),
        (parse_rotation, "r05-high-time"),
        (parse_rotation, "r05-stride128"),
        (parse_rotation, "r00-high"),
        (parse_rotation, "r10-time"),
        (parse_rotation, "r10-high-stride64"),
        (parse_group, "512-d64-h8-b1-15"),
        (parse_group, "512-d16-h16-b1-15"),
        (parse_group, "512-h16-b1-15"),
        (parse_group, "512-h7-b1-15"),
        (parse_group, "512-h8-b15-1"),
        (parse_group, "512-h8-bfixed0"),
        (parse_group, "512-h8-bfixed04"),
        (parse_group, "512-h8-b1-15-s0"),
        (parse_group, "512-h8-isolated-bfixed1"),
        (parse_group, "512-h8-r05-b1-15"),
        (parse_run, "512-h8-b1-15"),
        (parse_run, "512-h8-isolated-r05-b1-15"),
        (lambda name: parse_stack("512-h8-b1-15", name), "r05_r00"),
        (lambda name: parse_stack("512-h8-b1-15", name), "r05_r05"),
        (lambda name: parse_stack("512-h8-b1-15", name), "r00-time_r05"),
        (lambda name: parse_stack("512-h8-b1-15", name), "r05,.partial"),
    ],
)
def test_other_names_are_refused_in_one_line(parse, name):
    with pytest.raises(InputError) as error:
        parse(name)
    assert "\n" not in str(error.value)
    assert any(word in str(error.value) for word in ("write ", "allowed: ", "divide"))


def test_numbers_of_branches():
    assert branch_range("fixed4") == (4, 4)
    assert branch_range("1-15") == (1, 15)
    for text in ("4", "fixed", "fixed0", "0-3", "3-3", "5-2", "1-", "1-3-5", ""):
        with pytest.raises(InputError, match=r"allowed: fixedN .* a-b with 1 <= a < b"):
            branch_range(text)


def test_pairs_of_a_head():
    ratios = (0, 0.25, 0.5, 0.75, 0.875, 1)
    assert [pairs_of(ratio, 64) for ratio in ratios] == [0, 8, 16, 24, 28, 32]
    assert [pairs_of(ratio, 16) for ratio in ratios] == [0, 2, 4, 6, 7, 8]


def test_rotation_is_sorted_with_the_default_first():
    mixed = [rotation(0.5, band="high"), rotation(0, "time"), rotation(1), rotation(0.5)]
    assert [made.name for made in in_order(mixed)] == ["r05", "r10", "r05-high", "r00-time"]
    assert Rotation(0.5) < Rotation(1.0)


def test_reading_the_workflow_loads_nothing_heavy():
    code = (
        f"import sys; sys.path.insert(0, {SOURCE!r}); before = set(sys.modules); "
        "import headroom.branches.grid; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) - set(sys.stdlib_module_names) == {"headroom"}
