"""The ways to choose heads, as figures and tables name and draw them."""

from collections.abc import Iterable

from headroom.plotting import COLOURS, MARKERS, NEUTRAL

UNTOUCHED = "none"  # the translator that all start from
METHODS = {
    "lambda": ("gates, price λ", COLOURS[0], "o"),
    "target": ("gates, number of heads", COLOURS[2], "D"),
    "michel": ("gradient importance (Michel)", COLOURS[1], "s"),
    "random": ("random heads", NEUTRAL, "^"),
    "scratch": ("trained from scratch", COLOURS[3], "v"),
}
OTHERS = tuple(zip((COLOURS[4], COLOURS[5], COLOURS[6]), MARKERS[4:7], strict=True))


def styles(methods: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Return words, colour and marker of the methods that are among the given ones, in order.

    A choice that was added since stands behind the known ones, under its own name.
    """
    found = set(methods) - {UNTOUCHED}
    new = sorted(found - METHODS.keys())
    added = {name: (name, *OTHERS[place % len(OTHERS)]) for place, name in enumerate(new)}
    return {name: style for name, style in (METHODS | added).items() if name in found}
