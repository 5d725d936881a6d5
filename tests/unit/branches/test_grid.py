"""The grid of the study: how many runs, who is trained together, and what can't be meant."""

import copy
import itertools
import random
import time

import pytest

from headroom.branches.grid import ablation_runs, check, evaluations, homes, plan, runs
from headroom.branches.runs import Architecture, parse_run, parse_stack
from headroom.errors import InputError

RATIOS = [0, 0.25, 0.5, 0.75, 0.875, 1]
TRAINED = ["fixed1", "fixed2", "fixed4", "fixed8", "fixed16", "1-3", "1-7", "1-15", "1-31"]
COUNTS = [1, 2, 4, 8, 16, 24, 32]
SIZES = {
    "branch": [(512, 8)],
    "heads": [(256, 4), (512, 8), (1024, 16), (1536, 24)],
    "headdim": [(512, 16), (512, 8), (512, 4)],
}


def ablation(sizes, ratios=RATIOS, trained=TRAINED, counts=COUNTS, **others):
    return {
        "architectures": [{"hidden": hidden, "heads": heads} for hidden, heads in sizes],
        "ratios": list(ratios),
        "train_branches": list(trained),
        "evaluation_branches": list(counts),
        **others,
    }


def section(ablations, **others):
    return {
        "kv_heads": 2,
        "seeds": [0],
        "stack": 6,
        "texts": {"train": None, "evaluation": 960},
        "train": {"texts": 64, "learning_rates": {}, "steps": 100, "warmup": 10},
        "ablations": ablations,
        **others,
    }


@pytest.fixture
def full():
    return section({name: ablation(sizes) for name, sizes in SIZES.items()})


@pytest.fixture
def small():
    return section({"branch": ablation([(64, 2)], [0, 0.5, 1], ["1-3"], [1, 2])})


def finish(stacks, root):
    for stack in stacks:
        stack.folder(root).mkdir(parents=True)


def trained_anew(branches, root):
    return [stack for stack in plan(branches, root) if not stack.folder(root).is_dir()]


def test_the_full_grid_trains_each_run_once(full, tmp_path):
    check(full)
    asked = runs(full)
    assert len(asked) == 324
    assert sum(map(len, asked.values())) == 2268
    assert len({run.name for run in asked}) == 324
    rows = {
        name: [
            (run, count)
            for run in ablation_runs(full, name)
            for count in full["ablations"][name]["evaluation_branches"]
        ]
        for name in SIZES
    }
    assert {name: len(found) for name, found in rows.items()} == {
        "branch": 378,
        "heads": 1512,
        "headdim": 1134,
    }
    assert all(len(set(found)) == len(found) for found in rows.values())
    stacks = plan(full, tmp_path)
    assert len(stacks) == 54
    assert {stack.name for stack in stacks} == {"r00_r025_r05_r075_r0875_r10"}
    members = [run for stack in stacks for run in stack.runs]
    assert sorted(members) == sorted(asked)
    assert len(evaluations(full, stacks)) == 54 * 7


def test_the_runs_are_the_product_of_the_axes(full):
    expected = {
        Architecture(hidden, heads).name + f"-r{str(float(ratio)).replace('.', '')}-b{trained}"
        for sizes in SIZES.values()
        for (hidden, heads), ratio, trained in itertools.product(sizes, RATIOS, TRAINED)
    }
    assert {run.name for run in runs(full)} == expected


def test_the_plan_is_cheap(full, tmp_path):
    finish(plan(full, tmp_path), tmp_path)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        plan(full, tmp_path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1


def test_only_what_is_new_is_trained(full, tmp_path):
    first = plan(full, tmp_path)
    finish(first, tmp_path)
    assert plan(full, tmp_path) == first

    more = copy.deepcopy(full)
    more["ablations"]["branch"]["ratios"].append(0.125)
    new = trained_anew(more, tmp_path)
    assert [stack.name for stack in new] == ["r0125"] * 9
    assert {stack.group.architecture for stack in new} == {Architecture(512, 8)}

    seeded = copy.deepcopy(full) | {"seeds": [0, 1]}
    new = trained_anew(seeded, tmp_path)
    assert len(new) == 54 and {stack.group.seed for stack in new} == {1}

    counted = copy.deepcopy(full)
    counted["ablations"]["branch"]["evaluation_branches"].append(48)
    assert plan(counted, tmp_path) == first
    added = set(evaluations(counted, first)) - set(evaluations(full, first))
    assert {count for _, count in added} == {48} and len(added) == 9

    fewer = copy.deepcopy(full)
    for part in fewer["ablations"].values():
        part["ratios"] = [0.5]
    assert plan(fewer, tmp_path) == first
    assert len(homes(fewer, first)) == 54
    assert plan(full | {"stack": 2}, tmp_path) == first


def test_a_finished_stack_leaves_the_others_as_they_were(tmp_path):
    rng = random.Random(0)
    ratios = [0, 0.1234, 0.2345, 0.25, 0.5, 0.75, 0.875, 1]
    for case in range(25):
        controls = rng.sample(
            [{"coordinate": "time"}, {"band": "high", "stride": 4096}, {"mask": "isolated"}], 2
        )
        branches = section(
            {"one": ablation([(64, 2)], ratios, ["1-3"], [1], controls=controls)},
            stack=rng.randint(1, 9),
        )
        root = tmp_path / str(case)
        shared = plan(branches, root)[0].group.name
        for name in rng.sample(
            ["r05_r10", "r0999", "r00_r00-time", "r05-high-stride4096", ".r05", "tmp"], 3
        ):
            (root / shared / name).mkdir(parents=True)  # of an earlier configuration, or no stack
        (root / shared / "r025_r0999").write_text("no folder")
        before = plan(branches, root)
        assert all(len(stack.name.encode()) <= 150 for stack in before)
        assert all(parse_stack(stack.group.name, stack.name) == stack for stack in before)
        assert set(homes(branches, before)) == set(runs(branches))
        new = [stack for stack in before if not stack.folder(root).is_dir()]
        for stack in rng.sample(new, len(new)):
            finish([stack], root)
            assert plan(branches, root) == before


def test_any_subset_of_the_stacks_may_be_finished(tmp_path):
    ratios = [place / 20 for place in range(21)]
    branches = section({"one": ablation([(64, 2)], ratios, ["1-3"], [1])}, stack=4)
    before = plan(branches, tmp_path)
    assert [len(stack.rotations) for stack in before] == [4, 4, 4, 4, 4, 1]
    for size in range(len(before) + 1):
        for case, done in enumerate(itertools.combinations(before, size)):
            root = tmp_path / f"{size}-{case}"
            finish(done, root)
            assert plan(branches, root) == before


def test_a_run_that_lies_twice_is_read_once(small, tmp_path):
    shared = plan(small, tmp_path)[0].group.name
    for name in ("r00_r05", "r05_r10", "r10"):
        (tmp_path / shared / name).mkdir(parents=True)
    stacks = plan(small, tmp_path)
    assert [stack.name for stack in stacks] == ["r00_r05", "r05_r10"]
    read = homes(small, stacks)
    assert {run.rotation.name: stack.name for run, stack in read.items()} == {
        "r00": "r00_r05",
        "r05": "r00_r05",
        "r10": "r05_r10",
    }


def test_evaluations_are_only_those_asked_for(small, tmp_path):
    small["ablations"]["more"] = ablation([(64, 2)], [0.25], ["1-3", "1-7"], [3])
    small["stack"] = 3
    stacks = plan(small, tmp_path)
    found = {(stack.group.train_branch, stack.name, n) for stack, n in evaluations(small, stacks)}
    assert found == {
        ("1-3", "r00_r025_r05", 1),
        ("1-3", "r00_r025_r05", 2),
        ("1-3", "r00_r025_r05", 3),
        ("1-3", "r10", 1),
        ("1-3", "r10", 2),
        ("1-7", "r025", 3),
    }


def test_controls_change_what_they_name_and_train_no_model_twice(small):
    small["ablations"]["branch"] |= {
        "train_branches": ["fixed1", "1-3"],
        "controls": [
            {"mask": "isolated", "coordinate": None},
            {"coordinate": "time", "train_branches": ["1-7"]},
            {"band": "high", "stride": 64, "ratios": [0, 0.25, 1], "train_branches": ["1-3"]},
        ],
    }
    check(small)
    names = [run.name for run in ablation_runs(small, "branch")]
    grid = [f"64-d32-h2-{r}-b{b}" for r in ("r00", "r05", "r10") for b in ("fixed1", "1-3")]
    assert names[: len(grid)] == grid
    assert sorted(names[len(grid) :]) == sorted(
        [
            *(f"64-d32-h2-{ratio}-isolated-b1-3" for ratio in ("r00", "r05", "r10")),
            *(f"64-d32-h2-{ratio}-b1-7" for ratio in ("r00-time", "r05-time")),
            *(f"64-d32-h2-{ratio}-b1-3" for ratio in ("r025-high-stride64", "r10-stride64")),
        ]
    )
    assert all(parse_run(name).name == name for name in names)


A = "config key branches.ablations.branch"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"architectures": [{"hidden": 64, "heads": 3}]},
            f"{A}.architectures: 3 heads don't divide hidden 64 (allowed: a divisor)",
        ),
        (
            {"architectures": [{"hidden": 34, "heads": 2}]},
            f"{A}.architectures: hidden 34 over 2 heads is a head size of 17 (allowed: even and "
            f"at least 16)",
        ),
        (
            {"architectures": [{"hidden": 64, "heads": 8}]},
            f"{A}.architectures: hidden 64 over 8 heads is a head size of 8 (allowed: even and at "
            f"least 16)",
        ),
        (
            {"architectures": [{"hidden": 36, "heads": 2}]},
            f"{A}.architectures: hidden 36 (allowed: multiples of 16)",
        ),
        (
            {"architectures": [{"hidden": 64, "heads": 1}]},
            f"{A}.architectures: 1 heads share branches.kv_heads 2 unevenly (allowed: a multiple "
            f"of 2)",
        ),
        ({"ratios": [1.5]}, f"{A}.ratios: 1.5 is no share of the pairs (allowed: 0 to 1)"),
        (
            {"ratios": [0.12345]},
            f"{A}.ratios: 0.12345 has more than 4 decimals (allowed: at most 4, because ratios "
            f"are part of file names)",
        ),
        (
            {"ratios": [0.03]},
            f"{A}.ratios: 0.03 turns none of the 16 pairs of head size 32 (allowed: 0, or above "
            f"0.03125)",
        ),
        (
            {"controls": [{"coordinate": "time", "ratios": [-0.5]}]},
            f"{A}.controls.0.ratios: -0.5 is no share of the pairs (allowed: 0 to 1)",
        ),
        (
            {"train_branches": ["7-3"]},
            f"{A}.train_branches: training branches '7-3' are no number of branches (allowed: "
            f"fixedN with N at least 1, or a-b with 1 <= a < b)",
        ),
        (
            {"train_branches": ["1-65"]},
            f"{A}.train_branches: 1-65 has 65 branches, but a step has 64 texts (allowed: at most "
            f"branches.train.texts)",
        ),
        (
            {"evaluation_branches": [0]},
            f"{A}.evaluation_branches: 0 is no number of branches (allowed: at least 1)",
        ),
        (
            {"evaluation_branches": [1, 1920]},
            f"{A}.evaluation_branches: 1920 branches, but there are 960 texts (allowed: at most "
            f"branches.texts.evaluation)",
        ),
        (
            {"evaluation_branches": [32, 7]},
            "config key branches.texts.evaluation is 960, so some last sample would hold fewer "
            "branches (allowed: a multiple of 224, the least common multiple of all "
            "evaluation_branches; the next is 1120)",
        ),
        (
            {"controls": [{"ratios": [0.5]}]},
            f"{A}.controls.0 changes nothing (allowed: one or more of mask, coordinate, band, "
            f"stride)",
        ),
        (
            {"controls": [{"mask": "isolated"}, {"mask": "none"}]},
            f"{A}.controls.1.mask is 'none' (allowed: columns, isolated)",
        ),
        ({"controls": [{"stride": 0}]}, f"{A}.controls.0.stride is 0 (allowed: at least 1)"),
    ],
)
def test_what_can_t_be_meant_is_refused(small, changes, message):
    check(small)
    small["ablations"]["branch"] |= changes
    with pytest.raises(InputError) as error:
        check(small)
    assert str(error.value) == message


def test_a_rate_of_no_width_is_refused(small):
    small["train"]["learning_rates"] = {48: 1e-3}
    with pytest.raises(InputError, match=r"learning_rates: 48 is no hidden size of an ablation"):
        check(small)


def test_a_warm_up_that_never_ends_is_refused(small):
    small["train"]["warmup"] = 100
    with pytest.raises(InputError, match="warmup is 100, but there are 100 steps"):
        check(small)


@pytest.mark.parametrize(
    "control",
    [
        {"mask": "columns"},
        {"coordinate": "flat", "band": "low", "stride": 128, "ratios": [0.75]},
        {"band": "high", "ratios": [0, 1]},
        {"stride": 64, "ratios": [0]},
        {"coordinate": "time", "ratios": [1]},
        {"mask": "isolated", "train_branches": ["fixed1"]},
    ],
)
def test_a_control_that_equals_the_ablation_is_refused(small, control):
    small["ablations"]["branch"]["controls"] = [{"mask": "isolated"}, control]
    with pytest.raises(InputError) as error:
        check(small)
    assert str(error.value).startswith(f"{A}.controls.1 is the same as the ablation without it (")
    assert "\n" not in str(error.value)
