"""Which prunings the ffn study makes: families of the configuration spelled out as recipe steps.

Light: it runs while the workflow is read.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

from headroom.errors import InputError
from headroom.ffn.marginals import needs_gradients
from headroom.recipes import (
    GRADIENT_SCORES,
    REFITS,
    Prune,
    Step,
    exact,
    format_step,
    parse_step,
)

TRANSPORTS = ("strategies", "costs", "solvers")
ALWAYS = (("random", "drop"), ("flap", "drop"), ("flap", "ridge"))
SEQUENTIAL = "_sequential"
DENSE = "dense"  # how tables name the unpruned checkpoint
ALLOCATIONS = {"uniform": "r", "global": "g", "angular": "a"}


def check(settings: dict) -> None:
    """Refuse scores, fusions and the like that don't exist, and seeds that are not measured.

    Raises:
        InputError: naming the key and what is allowed.
    """
    for number, family in enumerate(settings["prunes"]):
        try:
            _family(family, settings["ratios"])
        except InputError as error:
            raise InputError(f"config key ffn.prunes.{number}: {error}") from None
    for step in settings["saved"]:
        try:
            parsed = parse_step(step)
        except InputError as error:
            raise InputError(f"config key ffn.saved: {error}") from None
        if not isinstance(parsed, Prune):
            raise InputError(f"config key ffn.saved: {step} is no prune step")


def _family(family: dict, ratios: list[float]) -> list[str]:
    """The steps of one family, without seeds; what transports nothing has no strategies."""
    selections = [
        f"{ALLOCATIONS[kind]}{exact(ratio)}"
        for kind, ratio in product(family["allocations"], family.get("ratios", ratios))
    ]
    found = []
    for score, fusion, selection in product(family["scores"], family["fusions"], selections):
        plain = Prune(score, fusion, selection)
        if not plain.transports:
            found.append(format_step(plain))
            continue
        for chosen in product(*(family[name] for name in TRANSPORTS)):
            given = dict(zip(("strategy", "cost", "solver"), chosen, strict=True))
            shown = {n: "" if v == plain.defaults[n] else v for n, v in given.items()}
            found.append(format_step(replace(plain, **shown)))
    return [format_step(parse_step(step)) for step in found]


def steps(settings: dict) -> list[str]:
    """Return the prune steps that are compared, without seeds, each once, in order.

    What every comparison needs comes with it: each step's own baseline, and at every ratio random
    and FLAP channels dropped and FLAP's refitted.
    """
    found = [step for family in settings["prunes"] for step in _family(family, settings["ratios"])]
    for step in list(found):
        ratio = parse_step(step).ratio
        found += [format_step(Prune(*pair, ratio)) for pair in ALWAYS]
        found += [other for other in (baseline(step),) if other]
    return list(dict.fromkeys(found))


def baseline(step: str) -> str | None:
    """Return the step that a step has to beat, with the same keep set; None for a baseline.

    A transport that refits (``ot_ridge``) has to beat that refit alone, sequential against
    sequential; every other fusion has to beat ``drop``.
    """
    if step == DENSE or (parsed := parse_step(step)).fusion == "drop":
        return None
    refits = parsed.transports and parsed.fusion.removesuffix(SEQUENTIAL) in REFITS
    fusion = parsed.fusion.removeprefix("ot_") if refits else "drop"
    return format_step(Prune(parsed.score, fusion, parsed.ratio))


def seeded(step: str, seed: int) -> str:
    """Return a step with the calibration seed in its name, which leaves out seed 0."""
    return format_step(replace(parse_step(step), seed=f"s{seed}" if seed else ""))


def reads_gradients(step: Prune) -> bool:
    """Say whether a step needs the gradients' statistics."""
    return step.score in GRADIENT_SCORES or (
        step.transports and needs_gradients(step.resolved("strategy"))
    )


def check_family(key: str, steps: Iterable[Step], family: str) -> None:
    """Refuse a pruning that a model's family can't hold.

    Args:
        key: what to name: a recipe, a key of the configuration.

    Raises:
        InputError: naming the key and what is possible.
    """
    for step in steps:
        if isinstance(step, Prune) and step.fusion == "bias" and family != "llama":
            raise InputError(
                f"{key}: fusion bias needs an FFN with biases, which {family} has not "
                f"(allowed: llama)"
            )
