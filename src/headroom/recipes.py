"""Names of derived checkpoints: parse and format.

A recipe is a base checkpoint and the steps done to it, joined by ``+``::

    tiny+merge-relu-average-t0.99+remove-flap-drop-b4x2

It is the name of a folder under ``results/checkpoints/``, so parse and format are inverse, numbers
have one spelling, and no step contains a ``+`` or a path separator.
"""

import re
from dataclasses import dataclass, fields
from typing import ClassVar

from headroom.digest import registry_names
from headroom.errors import InputError

BASE = r"[a-z0-9][a-z0-9_.]*(?:-[a-z0-9_.]+)*"  # as the schema has it
NUMBER = r"(?:0|[1-9][0-9]*)"
METRICS = registry_names("headroom.heads.similarity", "METRICS")
WITH_SINK = registry_names("headroom.heads.similarity", "METRICS", flag="sink")
CRITERIA = (*METRICS, *(f"{metric}_nosink" for metric in WITH_SINK), "error")
METHODS = ("average", "aligned", "refit")
SCORES = registry_names("headroom.heads.importance", "SCORES")
# Never \d, which means the digits of all scripts: they would be second names of the same thing.
THRESHOLD, QUANTILE = r"t[01]\.[0-9]+", r"q0\.[0-9]+"
BUDGET = r"b(?:[1-9][0-9]*x[1-9][0-9]*|0\.[0-9]+)"
CONTROL = rf"random{NUMBER}|dissimilar"
SEED = r"s[0-9]+"
CHANNEL_SCORES = registry_names("headroom.ffn.importance", "SCORES")
GRADIENT_SCORES = registry_names("headroom.ffn.importance", "GRADIENT_SCORES")
REFITS = registry_names("headroom.ffn.fusion", "START")
FUSIONS = (
    *registry_names("headroom.ffn.fusion", "FUSIONS"),
    *(f"{name}_sequential" for name in REFITS),
)
DISTRIBUTIONS = (
    *registry_names("headroom.ffn.marginals", "DISTRIBUTIONS"),
    *registry_names("headroom.ffn.marginals", "GRADIENT_DISTRIBUTIONS"),
)
STRATEGIES = dict.fromkeys(
    (*registry_names("headroom.ffn.marginals", "STRATEGIES"), *DISTRIBUTIONS)
)
COSTS = (
    *registry_names("headroom.ffn.transport", "COSTS"),
    *registry_names("headroom.ffn.transport", "ACTIVATION_COSTS"),
)
SOLVERS = registry_names("headroom.ffn.transport", "SOLVERS")
HEAD_CHOICES = (*registry_names("headroom.gates.importance", "CHOICES"), "scratch")
PENALTIES = registry_names("headroom.gates.hard_concrete", "PENALTIES")
NAME_BYTES = 200  # a folder's name may have 255 bytes; logs and temporary names need the rest


def canonical(value: float) -> str:
    """Return the one spelling of a number between 0 and 1: ``0.99``, ``0.50``, ``1.00``.

    Two decimals at least, no trailing zeros beyond them, so that a value names one file.
    """
    text = f"{float(value):.6f}".rstrip("0")
    whole, _, decimals = text.partition(".")
    return f"{whole}.{decimals:0<2}"


def exact(value: float) -> str:
    """Return the one spelling of a number that it says whole.

    Raises:
        InputError: if it has more decimals than a name holds: another number would be meant.
    """
    text = canonical(value)
    if float(text) != value:
        raise InputError(
            f"{value} has more than six decimals (allowed: at most six, because it is part of file "
            f"names)"
        )
    return text


@dataclass(frozen=True)
class Merge:
    """Merge attention heads: which are alike by ``criterion``, how they become one, how many."""

    verb: ClassVar[str] = "merge"
    pattern: ClassVar[dict[str, str]] = {
        "criterion": "|".join(CRITERIA),
        "method": "|".join(METHODS),
        "selection": f"{THRESHOLD}|{QUANTILE}|{BUDGET}",
        "control": CONTROL,
    }
    criterion: str
    method: str
    selection: str
    control: str = ""

    def check(self) -> None:
        """Refuse combinations that mean nothing."""
        if self.criterion == "error" and not self.selection.startswith("b"):
            raise InputError(
                f"{format_step(self)}: criterion error ranks merges for a budget (b4x2, b0.50); "
                f"thresholds and quantiles need a similarity metric"
            )


@dataclass(frozen=True)
class Remove:
    """Remove the attention heads with the lowest ``score`` until a budget is met."""

    verb: ClassVar[str] = "remove"
    pattern: ClassVar[dict[str, str]] = {
        "score": "|".join(SCORES),
        "method": "drop|refit",
        "budget": BUDGET,
    }
    score: str
    method: str
    budget: str

    def check(self) -> None:
        """Every combination is allowed."""


@dataclass(frozen=True)
class Prune:
    """Prune FFN channels: which by ``score``, what becomes of them, how many.

    The rest is left out where it is the default: a transport's marginals (``pushforward``), cost
    (``cosine``) and solver (``exact``), the seed of the calibration windows (0).
    """

    verb: ClassVar[str] = "prune"
    pattern: ClassVar[dict[str, str]] = {
        "score": "|".join((*CHANNEL_SCORES, *GRADIENT_SCORES)),
        "fusion": "|".join(FUSIONS),
        "ratio": r"[rga][01]\.[0-9]+",
        "strategy": (
            f"{'|'.join(STRATEGIES)}|"
            f"(?:{'|'.join(DISTRIBUTIONS)})_to_(?:{'|'.join(DISTRIBUTIONS)}|pushforward)"
        ),
        "cost": "|".join(COSTS),
        "solver": "|".join(SOLVERS),
        "seed": SEED,
    }
    defaults: ClassVar[dict[str, str]] = {
        "strategy": "pushforward",
        "cost": "cosine",
        "solver": "exact",
        "seed": "s0",
    }
    score: str
    fusion: str
    ratio: str
    strategy: str = ""
    cost: str = ""
    solver: str = ""
    seed: str = ""

    def resolved(self, name: str) -> str:
        """Return what an argument means where it may be left out."""
        return getattr(self, name) or self.defaults[name]

    @property
    def transports(self) -> bool:
        """Whether pruned channels are moved by a transport plan."""
        return self.fusion.startswith("ot_")

    @property
    def keeps_all(self) -> bool:
        """Whether nothing goes: ratio 0, the parent bit for bit."""
        return float(self.ratio[1:]) == 0

    def check(self) -> None:
        """Refuse combinations that mean nothing and second names for one thing."""
        text = format_step(self)
        if float(self.ratio[1:]) >= 1:
            raise InputError(
                f"recipe step {text!r}: ratio {self.ratio[1:]} leaves no channel (allowed: 0 to "
                f"below 1)"
            )
        for name, default in self.defaults.items():
            if getattr(self, name) == default:
                raise InputError(f"recipe step {text!r}: leave out the default {name} {default}")
            if name != "seed" and getattr(self, name) and not self.transports:
                raise InputError(
                    f"recipe step {text!r}: fusion {self.fusion} transports nothing, so it takes "
                    f"no {name}"
                )
        _check_seed(self)


@dataclass(frozen=True)
class Gate:
    """Train hard-concrete gates on a translator's heads and remove those that close.

    ``l0.05``: charged λ a layer's mean open probability; ``k6``: until six heads are left.
    """

    verb: ClassVar[str] = "gate"
    pattern: ClassVar[dict[str, str]] = {"strength": r"l[0-9]+\.[0-9]+|k[0-9]+", "seed": SEED}
    defaults: ClassVar[dict[str, str]] = {"seed": "s0"}
    strength: str
    seed: str = ""

    def resolved(self, name: str) -> str:
        """Return what an argument means where it may be left out."""
        return getattr(self, name) or self.defaults[name]

    def check(self) -> None:
        """Refuse second names for one thing."""
        _check_seed(self)


@dataclass(frozen=True)
class Mask:
    """Keep as many of a translator's heads, chosen otherwise, and train as long: the controls.

    All start from the translator but ``scratch``: from random weights with the heads that
    ``gate-k{n}`` kept.
    """

    verb: ClassVar[str] = "mask"
    pattern: ClassVar[dict[str, str]] = {
        "choice": "|".join(HEAD_CHOICES),
        "count": r"k[0-9]+",
        "seed": SEED,
    }
    defaults: ClassVar[dict[str, str]] = {"seed": "s0"}
    choice: str
    count: str
    seed: str = ""

    def resolved(self, name: str) -> str:
        """Return what an argument means where it may be left out."""
        return getattr(self, name) or self.defaults[name]

    def check(self) -> None:
        """Refuse second names for one thing."""
        _check_seed(self)


def _check_seed(step: "Step") -> None:
    """Refuse a seed that is written out where it is the default, or with leading zeros."""
    text = format_step(step)
    if step.seed == step.defaults["seed"]:
        raise InputError(f"recipe step {text!r}: leave out the default seed {step.seed}")
    if re.fullmatch(r"s0[0-9]+", step.seed):
        raise InputError(f"recipe step {text!r}: write s{int(step.seed[1:])}")


STEPS = {step.verb: step for step in (Merge, Remove, Prune)}  # done to a decoder
TRANSLATOR_STEPS = {step.verb: step for step in (Gate, Mask)}  # done to an encoder-decoder, once
ALL_STEPS = STEPS | TRANSLATOR_STEPS
Step = Merge | Remove | Prune | Gate | Mask


@dataclass(frozen=True)
class Recipe:
    """A base checkpoint's name and the steps done to it, in order."""

    base: str
    steps: tuple[Step, ...] = ()

    @property
    def parent(self) -> str:
        """The name of what the last step is done to."""
        return format_recipe(Recipe(self.base, self.steps[:-1]))


def format_step(step: Step) -> str:
    """Return ``verb-argument-argument…``; empty arguments are left out."""
    values = [getattr(step, field.name) for field in fields(step)]
    return "-".join([step.verb, *(value for value in values if value)])


def format_recipe(recipe: Recipe) -> str:
    """Return the recipe's name, the inverse of :func:`parse_recipe`."""
    return "+".join([recipe.base, *map(format_step, recipe.steps)])


def step_regex(kind: type[Step]) -> str:
    """Return the regular expression of one kind of step, without groups or anchors."""
    parts = []
    for field in fields(kind):
        optional = field.default == ""
        part = f"(?:{kind.pattern[field.name]})"
        parts.append(f"(?:-{part})?" if optional else f"-{part}")
    return kind.verb + "".join(parts)


def translator_regex(bases: list[str]) -> str:
    """Return the regular expression of every recipe over the given translators."""
    base = "|".join(re.escape(name) for name in sorted(bases)) or "-"
    return rf"(?:{base})(?:\+(?:{'|'.join(map(step_regex, TRANSLATOR_STEPS.values()))}))?"


def recipe_regex(bases: list[str]) -> str:
    """Return the regular expression of every recipe over the given base checkpoints."""
    base = "|".join(re.escape(name) for name in sorted(bases)) or "-"
    steps = "|".join(step_regex(kind) for kind in STEPS.values())
    return rf"(?:{base})(?:\+(?:{steps}))*"


def _check_length(place: str, name: str) -> None:
    if len(name.encode("utf-8", "surrogatepass")) > NAME_BYTES:
        raise InputError(f"{place}: longer than {NAME_BYTES} bytes; use fewer steps")


def parse_step(text: str) -> Step:
    """Parse one step.

    Raises:
        InputError: naming the argument that is wrong and what is allowed.
    """
    _check_length(f"recipe step {text[:20]!r}…", text)
    verb, *arguments = text.split("-")
    if verb not in ALL_STEPS:
        allowed = ", ".join(sorted(ALL_STEPS))
        raise InputError(f"recipe step {text!r}: {verb!r} is unknown (allowed: {allowed})")
    kind = ALL_STEPS[verb]
    step = kind(**_assigned(kind, arguments, text))
    for field in fields(kind):
        _check_number(field.name, getattr(step, field.name), text)
    step.check()
    return step


def _assigned(kind: type[Step], arguments: list[str], text: str) -> dict[str, str]:
    """Give each argument its name: the needed ones in order, the others where they match."""
    names = [field.name for field in fields(kind)]
    needed = [field.name for field in fields(kind) if field.default != ""]
    usage = f"{kind.verb}-" + "-".join(f"{{{name}}}" for name in needed)
    usage += "".join(f"[-{{{name}}}]" for name in names[len(needed) :])
    if len(arguments) < len(needed):
        raise InputError(f"recipe step {text!r}: write {usage}")
    found = {}
    for name, value in zip(needed, arguments, strict=False):
        if not re.fullmatch(kind.pattern[name], value):
            allowed = kind.pattern[name].replace("(?:", "(")
            raise InputError(f"recipe step {text!r}: {name} {value!r} is not one of {allowed}")
        found[name] = value
    rest = names[len(needed) :]
    for value in arguments[len(needed) :]:
        place = next((i for i, n in enumerate(rest) if re.fullmatch(kind.pattern[n], value)), None)
        if place is None:
            raise InputError(
                f"recipe step {text!r}: {value!r} is no {' or '.join(rest) or 'argument'} that "
                f"could stand there: write {usage}"
            )
        found[rest[place]], rest = value, rest[place + 1 :]
    return found


def _check_number(name: str, value: str, text: str) -> None:
    """Refuse a second spelling of a number and shares above 1."""
    number = re.fullmatch(r"([tqbrgal])([0-9]+\.[0-9]+)", value) or re.fullmatch(
        r"(k)([0-9]+)", value
    )
    if not number:
        return
    shape = str(int(number[2])) if number[1] == "k" else canonical(float(number[2]))
    if shape != number[2]:
        spelling = number[1] + shape
        raise InputError(f"recipe step {text!r}: write {spelling}, not {value} (one name a file)")
    if number[1] not in "lk" and float(number[2]) > 1:
        raise InputError(f"recipe step {text!r}: {name} {value!r} is above 1")


def parse_recipe(name: str) -> Recipe:
    """Parse a recipe's name, the inverse of :func:`format_recipe`.

    Raises:
        InputError: naming the part that is wrong and what is allowed.
    """
    base, *steps = name.split("+")
    if not re.fullmatch(BASE, base):
        raise InputError(
            f"recipe {name!r}: base {base!r} is not a name (letters a-z, digits, '_', '.', '-')"
        )
    _check_length(f"recipe {name!r}", name)
    parsed = tuple(map(parse_step, steps))
    if len(parsed) > 1 and any(step.verb in TRANSLATOR_STEPS for step in parsed):
        raise InputError(
            f"recipe {name!r}: {' and '.join(TRANSLATOR_STEPS)} are done to a translator, once"
        )
    return Recipe(base, parsed)
