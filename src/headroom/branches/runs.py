"""Names of the runs of the branch study: parse and format (nothing heavy here).

A run is a group (what the members of a stack share) and a rotation (what each has of its own)::

    512-d32-h16-r0875-time-isolated-b1-15-s2

A stack's folder is ``{group}/{rotation}_{rotation}_…`` and holds a folder a run. Parse and format
are inverse; what is the default, or changes nothing, is left out.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from headroom.digest import registry_names
from headroom.errors import InputError

COORDINATES = ("flat", "time")  # what the pairs turn with that are not two-dimensional
BANDS = ("low", "high")  # which frequencies are two-dimensional
MASKS = registry_names("headroom.branches.masks", "MASKS")  # who sees whom
COMMON_MASK = "columns"  # left out of names
STRIDE = 128  # of the branch coordinate, where a name says nothing else
COMMON_HEAD_SIZE = 64  # left out of names
TRAINED, DIVERGED = "trained", "diverged"  # what a run ends as
JOINT = "_"  # of a stack's members; SLURM jobs could not be given a name with commas
MOST_DECIMALS = 4  # of a ratio, because it is part of names

_COUNT = "[1-9][0-9]*"
_ARCHITECTURE = rf"{_COUNT}(?:-d{_COUNT})?-h{_COUNT}"
_ROTATION = (
    rf"r(?:00|10|0[0-9]{{0,{MOST_DECIMALS - 1}}}[1-9])(?:-time)?(?:-high)?(?:-stride{_COUNT})?"
)
_MASK = f"(?:-(?:{'|'.join(m for m in MASKS if m != COMMON_MASK)}))?"
_TRAIN_BRANCH = rf"(?:fixed{_COUNT}|{_COUNT}-{_COUNT})"
_SEED = rf"(?:-s{_COUNT})?"
_ENDING = rf"{_MASK}-b{_TRAIN_BRANCH}{_SEED}"


@dataclass(frozen=True, order=True)
class Architecture:
    """Width and number of query heads; what else a model has is the same for all."""

    hidden: int
    heads: int

    @property
    def head_size(self) -> int:
        """Return d = hidden / heads."""
        return self.hidden // self.heads

    @property
    def name(self) -> str:
        """Return ``512-h8``, or ``512-d32-h16`` where d is not 64."""
        size = "" if self.head_size == COMMON_HEAD_SIZE else f"-d{self.head_size}"
        return f"{self.hidden}{size}-h{self.heads}"


@dataclass(frozen=True, order=True)
class Rotation:
    """What a member of a stack has of its own; made by :func:`rotation`."""

    ratio: float
    coordinate: str = "flat"
    band: str = "low"
    stride: int = STRIDE

    @property
    def name(self) -> str:
        """Return ``r05``, ``r0875-time`` or ``r025-high-stride64``."""
        parts = ["r" + repr(float(self.ratio)).replace(".", "")]
        parts += [value for value in (self.coordinate, self.band) if value in ("time", "high")]
        parts += [f"stride{self.stride}"] if self.stride != STRIDE else []
        return "-".join(parts)

    @property
    def place(self) -> tuple:
        """Return what members of a stack are sorted by: the default's ratios come first."""
        kind = COORDINATES.index(self.coordinate), BANDS.index(self.band)
        return *kind, self.stride != STRIDE, self.stride, self.ratio


@dataclass(frozen=True, order=True)
class Group:
    """What the members of a stack share: the model's sizes and its data; made by :func:`group`."""

    architecture: Architecture
    train_branch: str
    mask: str = COMMON_MASK
    seed: int = 0

    @property
    def name(self) -> str:
        """Return ``512-h8-b1-15`` or ``512-d32-h16-isolated-bfixed4-s1``."""
        return self.architecture.name + self.ending

    @property
    def ending(self) -> str:
        """Return the part of a name after the architecture, or after a run's rotation."""
        mask = "" if self.mask == COMMON_MASK else f"-{self.mask}"
        return f"{mask}-b{self.train_branch}" + (f"-s{self.seed}" if self.seed else "")


@dataclass(frozen=True, order=True)
class Run:
    """One training: a member of a group."""

    group: Group
    rotation: Rotation

    @property
    def name(self) -> str:
        """Return ``512-h8-r05-bfixed4`` or ``512-d32-h16-r0875-time-isolated-b1-15-s2``."""
        return f"{self.group.architecture.name}-{self.rotation.name}{self.group.ending}"


@dataclass(frozen=True)
class Stack:
    """Runs of one group that are trained by one job, sorted by :attr:`Rotation.place`."""

    group: Group
    rotations: tuple[Rotation, ...]

    @property
    def name(self) -> str:
        """Return the rotations' names, joined."""
        return JOINT.join(rotation.name for rotation in self.rotations)

    @property
    def runs(self) -> tuple[Run, ...]:
        """Return the members."""
        return tuple(Run(self.group, rotation) for rotation in self.rotations)

    def folder(self, root: Path) -> Path:
        """Return the stack's folder below that of all stacks."""
        return root / self.group.name / self.name


def rotation(
    ratio: float, coordinate: str = "flat", band: str = "low", stride: int = STRIDE
) -> Rotation:
    """Return the one rotation that equals what was asked.

    At ratio 0 no pair is two-dimensional, so band and stride change nothing; at ratio 1 all are,
    so coordinate and band change nothing.
    """
    if ratio == 0:
        return Rotation(0.0, coordinate)
    if ratio == 1:
        return Rotation(1.0, stride=stride)
    return Rotation(float(ratio), coordinate, band, stride)


def group(
    architecture: Architecture, train_branch: str, mask: str = COMMON_MASK, seed: int = 0
) -> Group:
    """Return the one group that is trained as asked: a single branch has no other to see."""
    alone = train_branch == "fixed1" and mask == "isolated"
    return Group(architecture, train_branch, COMMON_MASK if alone else mask, seed)


def is_main(run: Run) -> bool:
    """Return whether a run is no control: flat coordinate, low band, common stride and mask."""
    return run.rotation == Rotation(run.rotation.ratio) and run.group.mask == COMMON_MASK


def pairs_of(ratio: float, head_size: int) -> int:
    """Return how many of a head's d/2 frequency pairs are two-dimensional: round(d/2 · ratio)."""
    return round(head_size // 2 * ratio)


def branch_range(train_branch: str) -> tuple[int, int]:
    """Return the fewest and the most branches of a sample: ``fixed4`` → (4, 4), ``1-15`` → (1, 15).

    Raises:
        InputError: naming what is allowed.
    """
    if re.fullmatch(_TRAIN_BRANCH, train_branch):
        fixed = re.fullmatch(f"fixed({_COUNT})", train_branch)
        low, high = [int(fixed[1])] * 2 if fixed else map(int, train_branch.split("-"))
        if fixed or low < high:
            return low, high
    raise InputError(
        f"training branches {train_branch!r} are no number of branches (allowed: fixedN with N at "
        f"least 1, or a-b with 1 <= a < b)"
    )


def parse_rotation(name: str) -> Rotation:
    """Parse a rotation's name, the inverse of :attr:`Rotation.name`.

    Raises:
        InputError: if it is none, or a second name of one.
    """
    if not re.fullmatch(_ROTATION, name):
        raise InputError(
            f"rotation {name!r} is unknown (allowed: r00 to r10[-time][-high][-stride64], the "
            f"ratio without its dot)"
        )
    ratio, *parts = name.split("-")
    strides = [int(part.removeprefix("stride")) for part in parts if part.startswith("stride")]
    made = rotation(
        float(f"{ratio[1]}.{ratio[2:]}"),
        "time" if "time" in parts else "flat",
        "high" if "high" in parts else "low",
        *strides,
    )
    if made.name != name:
        raise InputError(f"rotation {name!r}: write {made.name} (the same model has one name)")
    return made


def parse_group(name: str) -> Group:
    """Parse a group's name, the inverse of :attr:`Group.name`.

    Raises:
        InputError: if it is none, or a second name of one.
    """
    found = re.fullmatch(f"({_ARCHITECTURE})({_MASK})-b({_TRAIN_BRANCH})({_SEED})", name)
    if not found:
        raise InputError(
            f"group {name!r} is unknown (allowed: a name like 512-h8-b1-15 or "
            f"512-d32-h16-isolated-bfixed4-s1)"
        )
    sizes, mask, train_branch, seed = found.groups()
    hidden, heads = int(sizes.split("-")[0]), int(sizes.rsplit("h", 1)[1])
    if hidden % heads:
        raise InputError(f"group {name!r}: {heads} heads don't divide hidden {hidden}")
    branch_range(train_branch)
    made = group(
        Architecture(hidden, heads), train_branch, mask[1:] or COMMON_MASK, int(seed[2:] or 0)
    )
    if made.name != name:
        raise InputError(f"group {name!r}: write {made.name} (the same model has one name)")
    return made


def parse_run(name: str) -> Run:
    """Parse a run's name, the inverse of :attr:`Run.name`.

    Raises:
        InputError: if it is none, or a second name of one.
    """
    found = re.fullmatch(f"({_ARCHITECTURE})-({_ROTATION})({_ENDING})", name)
    if not found:
        raise InputError(
            f"run {name!r} is unknown (allowed: a name like 512-h8-r05-bfixed4 or "
            f"512-d32-h16-r0875-time-isolated-b1-15-s2)"
        )
    return Run(parse_group(found[1] + found[3]), parse_rotation(found[2]))


def parse_stack(group_name: str, name: str) -> Stack:
    """Parse a stack's two names, those of its folder and of the one above.

    Raises:
        InputError: if one is unknown, or members are out of order or twice there.
    """
    rotations = tuple(map(parse_rotation, name.split(JOINT)))
    if list(rotations) != in_order(rotations):
        raise InputError(
            f"stack {name!r}: write {JOINT.join(r.name for r in in_order(rotations))} (members "
            f"in order, each once)"
        )
    return Stack(parse_group(group_name), rotations)


def in_order(rotations: Iterable[Rotation]) -> list[Rotation]:
    """Return each rotation once, in the order of a stack."""
    return sorted(set(rotations), key=lambda rotation: rotation.place)


def architecture_regex() -> str:
    """Return the regular expression of an architecture's name, without groups or anchors."""
    return _ARCHITECTURE


def group_regex() -> str:
    """Return the regular expression of a group's name, without groups or anchors."""
    return _ARCHITECTURE + _ENDING


def stack_regex() -> str:
    """Return the regular expression of a stack's name, without groups or anchors."""
    return f"{_ROTATION}(?:{JOINT}{_ROTATION})*"
