"""Which prunings the ffn study makes: families of the configuration spelled out as recipe steps.

Light: it runs while the workflow is read.
"""

from dataclasses import replace
from itertools import product

from headroom.checkpoints import Geometry
from headroom.errors import InputError
from headroom.ffn.marginals import needs_gradients
from headroom.recipes import (
    GRADIENT_SCORES,
    Prune,
    Step,
    canonical,
    format_step,
    parse_step,
)

TRANSPORTS = ("strategies", "costs", "solvers")
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
        if not isinstance(parse_step(step), Prune):
            raise InputError(f"config key ffn.saved: {step} is no prune step")


def _family(family: dict, ratios: list[float]) -> list[str]:
    """The steps of one family, without seeds; what transports nothing has no strategies."""
    selections = [
        f"{ALLOCATIONS[kind]}{canonical(ratio)}"
        for kind, ratio in product(family["allocations"], family.get("ratios", ratios))
    ]
    found = []
    for score, fusion, selection in product(family["scores"], family["fusions"], selections):
        plain = Prune(score, fusion, selection)
        if not fusion.startswith("ot_"):
            found.append(format_step(plain))
            continue
        for chosen in product(*(family[name] for name in TRANSPORTS)):
            given = dict(zip(("strategy", "cost", "solver"), chosen, strict=True))
            shown = {n: "" if v == plain.defaults[n] else v for n, v in given.items()}
            found.append(format_step(replace(plain, **shown)))
    return [format_step(parse_step(step)) for step in found]


def steps(settings: dict) -> list[str]:
    """Return the prune steps that are compared, without seeds, each once, in order."""
    found = [step for family in settings["prunes"] for step in _family(family, settings["ratios"])]
    return list(dict.fromkeys(found))


def seeded(step: str, seed: int) -> str:
    """Return a step with the calibration seed in its name, which leaves out seed 0."""
    return format_step(replace(parse_step(step), seed=f"s{seed}" if seed else ""))


def reads_gradients(step: Prune) -> bool:
    """Say whether a step needs the gradients' statistics."""
    transports = step.fusion.startswith("ot_")
    return step.score in GRADIENT_SCORES or (
        transports and needs_gradients(step.resolved("strategy"))
    )


def check_steps(recipe: str, chain: tuple[Step, ...], sizes: Geometry) -> None:
    """Refuse a pruning that the checkpoint's family can't hold.

    Raises:
        InputError: naming the recipe and what is possible.
    """
    for step in chain:
        if isinstance(step, Prune) and step.fusion == "bias" and sizes.family != "llama":
            raise InputError(
                f"recipe {recipe}: fusion bias needs an FFN with biases, which {sizes.family} has "
                f"not (allowed: llama)"
            )
