"""Which merges the heads study makes: families of the configuration spelled out as recipe steps.

Light: it runs while the workflow is read.
"""

import re
from itertools import product

from headroom.checkpoints import Geometry
from headroom.errors import InputError
from headroom.recipes import (
    CONTROL,
    CRITERIA,
    METRICS,
    SCORES,
    Merge,
    Remove,
    Step,
    exact,
    format_step,
    parse_step,
)


def check(settings: dict) -> None:
    """Refuse metrics, criteria and controls that don't exist.

    Raises:
        InputError: naming the key and what is allowed.
    """
    for metric in settings["metrics"]:
        if metric not in METRICS:
            raise InputError(
                f"config key heads.metrics: {metric} is unknown (allowed: {', '.join(METRICS)})"
            )
    for number, family in enumerate(settings["merges"]):
        key = f"heads.merges.{number}"
        if family["criterion"] not in CRITERIA:
            raise InputError(
                f"config key {key}.criterion: {family['criterion']} is unknown "
                f"(allowed: {', '.join(CRITERIA)})"
            )
        _check_controls(key, family)
        try:
            chosen = _selections(family)
            for step in _family(family):
                parse_step(step)
        except InputError as error:
            raise InputError(f"config key {key}: {error}") from None
        if not chosen:
            raise InputError(f"config key {key} needs thresholds, quantiles or budgets")


def _check_controls(key: str, family: dict) -> None:
    """Refuse controls that don't exist, and those that can't be made for the family's merges."""
    for name in family["controls"]:
        known = re.fullmatch(CONTROL, name) or name in SCORES
        if not known:
            raise InputError(
                f"config key {key}.controls: {name} is unknown (allowed: random0, random1, …, "
                f"dissimilar, {', '.join(SCORES)})"
            )
        if name in SCORES and (family["thresholds"] or family["quantiles"]):
            raise InputError(
                f"config key {key}.controls: {name} removes heads down to a budget (allowed: in a "
                f"family with budgets alone, without thresholds and quantiles)"
            )
    for method in family.get("control_methods", []):
        if method not in family["methods"]:
            raise InputError(
                f"config key {key}.control_methods: {method} is not among the family's methods "
                f"(allowed: {', '.join(family['methods'])})"
            )


def selection(kind: str, value: float | str) -> str:
    """Return how a threshold, a quantile or a budget is written in a recipe."""
    prefix = {"thresholds": "t", "quantiles": "q", "budgets": "b"}[kind]
    return prefix + (value if isinstance(value, str) else exact(value))


def _selections(family: dict) -> list[str]:
    kinds = ("thresholds", "quantiles", "budgets")
    return [selection(kind, value) for kind in kinds for value in family[kind]]


def _family(family: dict) -> list[str]:
    """The merge steps of one family, without controls."""
    return [
        format_step(Merge(family["criterion"], method, chosen))
        for method, chosen in product(family["methods"], _selections(family))
    ]


def steps(settings: dict) -> list[str]:
    """Return the merge steps of all families, each once, in the order of the configuration."""
    found = [step for family in settings["merges"] for step in _family(family)]
    return list(dict.fromkeys(found))


def controls(settings: dict) -> dict[str, list[str]]:
    """Return for each merge step the controls that are held against it."""
    found: dict[str, list[str]] = {}
    for family in settings["merges"]:
        for method, chosen in product(family["methods"], _selections(family)):
            if method not in family.get("control_methods", family["methods"]):
                continue
            step = format_step(Merge(family["criterion"], method, chosen))
            wanted = found.setdefault(step, [])
            wanted += [name for name in family["controls"] if name not in wanted]
    return {step: wanted for step, wanted in found.items() if wanted}


def control_steps(step: str, names: list[str]) -> dict[str, Step]:
    """Return the recipe steps that make the controls of one merge, by a name for each.

    A score removes heads with the same budget, once without and once with a refit of what stays.
    """
    merge = parse_step(step)
    found: dict[str, Step] = {}
    for name in names:
        if name in SCORES:
            for method in ("drop", "refit"):
                text = f"remove-{name}-{method}-{merge.selection}"
                found[f"{name}_{method}"] = parse_step(text)
        else:
            found[name] = Merge(merge.criterion, merge.method, merge.selection, name)
    return found


def check_budgets(recipe: str, chain: tuple[Step, ...], sizes: Geometry) -> None:
    """Follow the head counts through a recipe's steps and refuse a budget that can't be met.

    Raises:
        InputError: naming the recipe and what is possible.
    """
    from headroom.heads.budgets import resolve_budget

    heads, groups = sizes.heads, sizes.groups
    for step in chain:
        if not isinstance(step, Merge | Remove):
            continue  # other studies' steps leave the heads alone
        text = step.selection if isinstance(step, Merge) else step.budget
        if not text.startswith("b"):
            continue
        try:
            kept, each = resolve_budget(text, heads, groups, unite=isinstance(step, Merge))
        except InputError as error:
            raise InputError(f"recipe {recipe}: {error}") from None
        heads, groups = kept * each, kept


def metric_of(criterion: str) -> str:
    """Return the metric behind a criterion: ``relu_nosink`` is read from ``relu``."""
    return criterion.removesuffix("_nosink")
