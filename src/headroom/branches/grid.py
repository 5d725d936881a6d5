"""Which runs a configuration asks for, which it can't mean, and who is trained together.

Nothing heavy here: this runs whenever the workflow is read.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from headroom.branches.runs import (
    BANDS,
    COORDINATES,
    MASKS,
    MOST_DECIMALS,
    STRIDE,
    Architecture,
    Group,
    Rotation,
    Run,
    Stack,
    branch_range,
    group,
    in_order,
    is_main,
    pairs_of,
    parse_stack,
    rotation,
)
from headroom.errors import InputError

NAME_BYTES = 150  # of a stack; a folder's name may have 255, logs and temporary names need the rest
SMALLEST_HEAD = 16
WIDTHS = 16  # hidden sizes are multiples: else AdamW rounds a stack otherwise than one run
ARMS = ("mask", "coordinate", "band", "stride")  # what a control may change


def runs(branches: Mapping) -> dict[Run, tuple[int, ...]]:
    """Return every run of all ablations, each once, with the evaluation branches asked of it.

    Args:
        branches: section of the configuration.
    """
    counts: dict[Run, set[int]] = {}
    for name, ablation in branches["ablations"].items():
        for run in ablation_runs(branches, name):
            counts.setdefault(run, set()).update(ablation["evaluation_branches"])
    return {run: tuple(sorted(asked)) for run, asked in counts.items()}


def ablation_runs(branches: Mapping, name: str) -> list[Run]:
    """Return the runs of an ablation, each once: the grid itself first, then its controls."""
    ablation = branches["ablations"][name]
    made = [
        Run(group(architecture, train_branch, mask, seed), rotated)
        for architecture in map(_architecture, ablation["architectures"])
        for arm in ({}, *_controls(ablation))
        for rotated, train_branch, mask in _arm(ablation, arm)
        for seed in branches["seeds"]
        # What a control changes nothing of is none, though its ratio or branches be others.
        if not arm or not is_main(Run(group(architecture, train_branch, mask), rotated))
    ]
    return list(dict.fromkeys(made))


def plan(branches: Mapping, root: Path) -> list[Stack]:
    """Return the stacks that hold all runs of the configuration, those that lie there first kept.

    The rest of a group is cut, in order, into stacks of one size. That depends on the wanted runs
    alone, so a stack that gets finished leaves the others as they were.

    Args:
        branches: section of the configuration.
        root: folder of all stacks; only names of folders are read.
    """
    wanted: dict[Group, list[Rotation]] = {}
    for run in runs(branches):
        wanted.setdefault(run.group, []).append(run.rotation)
    stacks: list[Stack] = []
    for shared, rotations in wanted.items():
        longest = max(len(member.name) for member in rotations)
        size = max(1, min(branches["stack"], (NAME_BYTES + 1) // (longest + 1)))
        kept, rest = _kept(shared, rotations, root)
        cut = [Stack(shared, tuple(rest[i : i + size])) for i in range(0, len(rest), size)]
        stacks += sorted(kept + cut, key=lambda stack: [r.place for r in stack.rotations])
    return stacks


def homes(branches: Mapping, stacks: Iterable[Stack]) -> dict[Run, Stack]:
    """Return the stack each run of the configuration is read from: the first that holds it."""
    wanted = runs(branches)
    found: dict[Run, Stack] = {}
    for stack in stacks:
        for run in stack.runs:
            if run in wanted:
                found.setdefault(run, stack)
    return found


def evaluations(branches: Mapping, stacks: Sequence[Stack]) -> list[tuple[Stack, int]]:
    """Return the evaluations: a stack and a number of branches that one of its runs is asked for.

    Args:
        branches: section of the configuration.
        stacks: of :func:`plan`.
    """
    wanted = runs(branches)
    counts: dict[Stack, set[int]] = {stack: set() for stack in stacks}
    for run, stack in homes(branches, stacks).items():
        counts[stack].update(wanted[run])
    return [(stack, count) for stack, asked in counts.items() for count in sorted(asked)]


def learning_rate(train: Mapping, hidden: int) -> float:
    """Return the peak learning rate of a hidden size: its own, or that of all."""
    own = {int(size): rate for size, rate in train["learning_rates"].items()}
    return own.get(hidden, train["learning_rate"])


def check(branches: Mapping) -> None:
    """Refuse sizes, ratios, numbers of branches and controls that can't be meant.

    Raises:
        InputError: naming the key and what is allowed.
    """
    for name, ablation in branches["ablations"].items():
        key = f"config key branches.ablations.{name}"
        for entry in ablation["architectures"]:
            _check_architecture(f"{key}.architectures", entry, branches["kv_heads"])
        sizes = {_architecture(entry).head_size for entry in ablation["architectures"]}
        arms = [(key, ablation)]
        arms += [(f"{key}.controls.{i}", arm) for i, arm in enumerate(_controls(ablation))]
        for place, arm in arms:
            for ratio in arm.get("ratios") or ():
                _check_ratio(f"{place}.ratios", ratio, sizes)
            for train_branch in arm.get("train_branches") or ():
                most = branches["train"]["texts"]
                _check_train_branch(f"{place}.train_branches", train_branch, most)
        for place, control in arms[1:]:
            _check_control(place, control, ablation)
    _check_evaluation(branches)
    _check_rates(branches)
    steps, warmup = branches["train"]["steps"], branches["train"]["warmup"]
    if branches["ablations"] and warmup >= steps:
        raise InputError(
            f"config key branches.train.warmup is {warmup}, but there are {steps} steps (allowed: "
            f"fewer than branches.train.steps)"
        )


def _architecture(entry: Mapping) -> Architecture:
    return Architecture(entry["hidden"], entry["heads"])


def _controls(ablation: Mapping) -> Sequence[Mapping]:
    return ablation.get("controls") or ()


def _arm(ablation: Mapping, arm: Mapping) -> Iterator[tuple[Rotation, str, str]]:
    """Yield rotation, training branches and mask of a control's runs; {}: of the grid itself."""
    given = {key: value for key, value in arm.items() if value is not None}
    turned = {key: given[key] for key in ARMS[1:] if key in given}
    for ratio in sorted(set(given.get("ratios", ablation["ratios"]))):
        for train_branch in given.get("train_branches", ablation["train_branches"]):
            yield rotation(ratio, **turned), train_branch, given.get("mask", "columns")


def _kept(
    shared: Group, rotations: Iterable[Rotation], root: Path
) -> tuple[list[Stack], list[Rotation]]:
    """Return the stacks that lie there and hold a run no other does, and the runs that lie nowhere.

    Folders with other names are someone else's; one without its models is made again by its rule.
    """
    rest = in_order(rotations)
    kept: list[Stack] = []
    for name in _folders(root / shared.name):
        try:
            stack = parse_stack(shared.name, name)
        except InputError:
            continue
        if not set(rest).isdisjoint(stack.rotations):
            kept.append(stack)
            rest = [member for member in rest if member not in stack.rotations]
    return kept, rest


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _check_architecture(key: str, entry: Mapping, kv_heads: int) -> None:
    hidden, heads = entry["hidden"], entry["heads"]
    if hidden % heads:
        raise InputError(f"{key}: {heads} heads don't divide hidden {hidden} (allowed: a divisor)")
    size = hidden // heads
    if size % 2 or size < SMALLEST_HEAD:
        raise InputError(
            f"{key}: hidden {hidden} over {heads} heads is a head size of {size} (allowed: even "
            f"and at least {SMALLEST_HEAD})"
        )
    if hidden % WIDTHS:
        raise InputError(f"{key}: hidden {hidden} (allowed: multiples of {WIDTHS})")
    if heads % kv_heads:
        raise InputError(
            f"{key}: {heads} heads share branches.kv_heads {kv_heads} unevenly (allowed: a "
            f"multiple of {kv_heads})"
        )


def _check_ratio(key: str, ratio: float, head_sizes: Iterable[int]) -> None:
    if not 0 <= ratio <= 1:
        raise InputError(f"{key}: {ratio} is no share of the pairs (allowed: 0 to 1)")
    if round(ratio, MOST_DECIMALS) != ratio:
        raise InputError(
            f"{key}: {ratio} has more than {MOST_DECIMALS} decimals (allowed: at most "
            f"{MOST_DECIMALS}, because ratios are part of file names)"
        )
    for size in sorted(head_sizes):
        if ratio and not pairs_of(ratio, size):
            raise InputError(
                f"{key}: {ratio} turns none of the {size // 2} pairs of head size {size} "
                f"(allowed: 0, or above {1 / size:.4g})"
            )


def _check_train_branch(key: str, train_branch: str, texts: int) -> None:
    try:
        high = branch_range(train_branch)[1]
    except InputError as error:
        raise InputError(f"{key}: {error}") from None
    if high > texts:
        raise InputError(
            f"{key}: {train_branch} has {high} branches, but a step has {texts} texts "
            f"(allowed: at most branches.train.texts)"
        )


def _check_control(key: str, control: Mapping, ablation: Mapping) -> None:
    if all(control.get(name) is None for name in ARMS):
        raise InputError(f"{key} changes nothing (allowed: one or more of {', '.join(ARMS)})")
    for name, allowed in (("mask", MASKS), ("coordinate", COORDINATES), ("band", BANDS)):
        if control.get(name) not in (None, *allowed):
            raise InputError(f"{key}.{name} is {control[name]!r} (allowed: {', '.join(allowed)})")
    if control.get("stride") is not None and control["stride"] < 1:
        raise InputError(f"{key}.stride is {control['stride']} (allowed: at least 1)")
    anyone = _architecture(ablation["architectures"][0])
    if all(
        is_main(Run(group(anyone, train_branch, mask), rotated))
        for rotated, train_branch, mask in _arm(ablation, control)
    ):
        raise InputError(
            f"{key} is the same as the ablation without it (allowed: mask isolated beyond fixed1, "
            f"coordinate time below ratio 1, band high between ratios 0 and 1, stride other than "
            f"{STRIDE} above ratio 0)"
        )


def _check_rates(branches: Mapping) -> None:
    found = branches["ablations"].values()
    sizes = {str(entry["hidden"]) for ablation in found for entry in ablation["architectures"]}
    for size in map(str, branches["train"]["learning_rates"]):
        if size not in sizes:
            raise InputError(
                f"config key branches.train.learning_rates: {size} is no hidden size of an "
                f"ablation (allowed: {', '.join(sorted(sizes, key=int))})"
            )


def _check_evaluation(branches: Mapping) -> None:
    """Refuse a number of evaluation texts that leaves the last sample fewer branches."""
    texts, every = branches["texts"]["evaluation"], 1
    for name, ablation in branches["ablations"].items():
        for count in ablation["evaluation_branches"]:
            key = f"config key branches.ablations.{name}.evaluation_branches"
            if count < 1:
                raise InputError(f"{key}: {count} is no number of branches (allowed: at least 1)")
            if count > texts:
                raise InputError(
                    f"{key}: {count} branches, but there are {texts} texts (allowed: at most "
                    f"branches.texts.evaluation)"
                )
            every = math.lcm(every, count)
    if texts % every:
        raise InputError(
            f"config key branches.texts.evaluation is {texts}, so some last sample would hold "
            f"fewer branches (allowed: a multiple of {every}, the least common multiple of all "
            f"evaluation_branches; the next is {-(-texts // every) * every})"
        )
