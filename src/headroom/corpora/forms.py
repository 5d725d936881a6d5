"""What Unicode CLDR and num2words can say in two languages, each form told apart from the others.

Forms that look alike in the source language but not in the target language would make a translation
ambiguous: a probe is rendered in each, and only the first of those that look alike is kept.
"""

import datetime
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from headroom.errors import InputError

if TYPE_CHECKING:
    from babel import Locale

DATE_FORMATS = ("full", "long", "medium", "short")
TIME_FORMATS = ("short", "medium")
# No skeleton with weeks: which week a date falls into depends on the country, not on the source.
DATE_SKELETONS = "yMMMM MMMMd yMMMEd yMMMd MMMEd yMEd yMd yQQQQ GyMMMEd GyMMMd"
TIME_SKELETONS = "Bhm EBhm Ehm EHm hm Hm hms Hms"
INTERVALS = "yMMMM yMMMd yMMMEd MMMd MMMEd yMd yMEd hm Hm"
LISTS = ("standard", "or")
LIST_PARTS = {"2", "start", "middle", "end"}  # Babel lacks what CLDR inherits of other styles
CURRENCIES = "EUR USD GBP JPY CHF CNY INR BRL CAD AUD SEK NOK DKK PLN CZK TRY MXN KRW ZAR RUB"
UNITS = """duration-second duration-minute duration-hour duration-day duration-week duration-month
    duration-year length-millimeter length-centimeter length-meter length-kilometer length-inch
    length-foot length-mile length-light-year mass-gram mass-kilogram mass-tonne mass-pound
    mass-ounce volume-milliliter volume-liter volume-cubic-meter volume-gallon volume-barrel
    volume-teaspoon volume-tablespoon area-square-meter area-square-kilometer area-hectare area-acre
    temperature-celsius temperature-fahrenheit speed-kilometer-per-hour speed-mile-per-hour
    speed-knot digital-byte digital-megabyte digital-gigabyte digital-terabyte power-watt
    power-kilowatt power-horsepower energy-joule energy-kilocalorie energy-kilowatt-hour
    frequency-hertz frequency-megahertz electric-volt electric-ampere pressure-hectopascal
    pressure-bar angle-degree graphics-pixel graphics-megapixel mass-carat"""
NUMERATORS = """length-meter length-kilometer mass-gram mass-kilogram mass-tonne volume-liter
    volume-cubic-meter digital-megabyte digital-gigabyte energy-kilowatt-hour graphics-pixel"""
DENOMINATORS = """duration-second duration-minute duration-hour duration-day duration-week
    duration-month duration-year length-meter length-kilometer volume-liter mass-kilogram"""
NUMERALS = {  # kind of num2words -> numbers; years before 2000, where they are said in hundreds
    "cardinal": (*range(1000), *range(1000, 100_000, 331), *range(10**5, 10**6, 9973)),
    "ordinal": tuple(range(1, 200)),
    "year": tuple(range(1100, 2000)),
}
NUMERAL_CODES = {"nb": "no", "nn": "no", "kk": "kz"}  # where num2words has its own
# Two digits each, so that forms with and without a leading zero count as alike.
EARLIER = datetime.datetime(2023, 10, 27, 21, 31, 38)
PROBE = datetime.datetime(2023, 11, 28, 22, 42, 37)

Forms = list[tuple[str, str]]  # of the source language and of the target language


class Side(NamedTuple):
    """One of the two languages."""

    index: int  # 0: source, 1: target
    locale: "Locale"


@dataclass
class Stock:
    """What both languages have; each form looks different from all others in the source."""

    sides: tuple[Side, Side]
    dates: Forms = field(default_factory=list)
    times: Forms = field(default_factory=list)
    intervals: list[str] = field(default_factory=list)
    units: list[tuple[str, str]] = field(default_factory=list)  # unit, length
    rates: list[tuple[str, str]] = field(default_factory=list)  # numerator, denominator
    amounts: list[tuple[str, str]] = field(default_factory=list)  # currency, format
    lists: list[str] = field(default_factory=list)
    names: dict[str, Forms] = field(default_factory=dict)  # territories, languages, currencies
    numerals: dict[str, Forms] = field(default_factory=dict)


def plain(text: str) -> str:
    """Return text in Unicode NFC with each run of white space, of whatever kind, as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _locale(identifier: str, key: str) -> "Locale":
    from babel import Locale, UnknownLocaleError

    try:
        return Locale.parse(str(identifier).replace("-", "_"))
    except (UnknownLocaleError, ValueError):
        raise InputError(
            f"config key {key}: CLDR knows no locale {identifier!r} "
            f"(allowed: Babel locale identifiers such as en, de, pt_BR)"
        ) from None


def check_locales(identifiers: Sequence[str], key: str) -> None:
    """Refuse a language that CLDR doesn't know, naming the key.

    Raises:
        InputError: naming an identifier that is allowed.
    """
    for identifier in identifiers:
        _locale(identifier, key)


def stock_of(source_locale: str, target_locale: str, key: str) -> Stock:
    """Collect what both languages have and the source language tells apart.

    Raises:
        InputError: for a locale that CLDR doesn't know, or twice the same one.
    """
    source, target = (_locale(name, key) for name in (source_locale, target_locale))
    if source == target:
        raise InputError(f"config key {key}: {source} twice (allowed: two different locales)")
    stock = Stock((Side(0, source), Side(1, target)))
    _add_dates(stock)
    _add_quantities(stock)
    stock.names, stock.numerals = _names(source, target), _numerals(source, target)
    return stock


def _add_dates(stock: Stock) -> None:
    from babel.dates import format_datetime, format_interval

    sides, source = stock.sides, stock.sides[0].locale
    dates = _patterns(sides, "date_formats", DATE_FORMATS, DATE_SKELETONS.split())
    stock.dates = _distinct(dates, lambda form: format_datetime(PROBE, form[0], locale=source))
    times = _patterns(sides, "time_formats", TIME_FORMATS, TIME_SKELETONS.split())
    stock.times = _distinct(times, lambda form: format_datetime(PROBE, form[0], locale=source))
    stock.intervals = _distinct(
        [s for s in INTERVALS.split() if all(s in side.locale.interval_formats for side in sides)],
        lambda skeleton: format_interval(EARLIER, PROBE, skeleton, locale=source),
    )


def _add_quantities(stock: Stock) -> None:
    from babel.lists import format_list
    from babel.numbers import format_currency
    from babel.units import format_compound_unit, format_unit

    sides, source = stock.sides, stock.sides[0].locale
    stock.units = _distinct(
        [
            (unit, length)
            for length in ("long", "short")
            for unit in UNITS.split()
            if all(_has_unit(side.locale, unit, length) for side in sides)
        ],
        lambda unit: format_unit(5, *unit, locale=source),
    )
    known = {unit for unit, length in stock.units if length == "long"}
    stock.rates = _distinct(
        [
            (n, d)
            for n in NUMERATORS.split()
            for d in DENOMINATORS.split()
            if n != d and {n, d} <= known
        ],
        lambda rate: format_compound_unit(5, rate[0], 1, rate[1], locale=source),
    )
    stock.amounts = _distinct(
        [(currency, form) for form in ("standard", "name") for currency in CURRENCIES.split()],
        lambda it: format_currency(5, it[0], locale=source, format_type=it[1]),
    )
    stock.lists = _distinct(
        [
            style
            for style in LISTS
            if all(set(side.locale.list_patterns.get(style, ())) >= LIST_PARTS for side in sides)
        ],
        lambda style: format_list("AB", style, source),
        lambda style: format_list("ABC", style, source),
    )


def _patterns(
    sides: tuple[Side, Side], formats: str, names: Iterable[str], skeletons: Iterable[str]
) -> Forms:
    """Return CLDR patterns of the same format or the same skeleton in both languages."""
    first, second = (
        {name: getattr(side.locale, formats)[name].pattern for name in names}
        | {s: found[s].pattern for s in skeletons if s in (found := side.locale.datetime_skeletons)}
        for side in sides
    )
    return [(first[name], second[name]) for name in first if name in second]


def _distinct(candidates: Iterable, *probes: Callable) -> list:
    """Keep the first of all candidates that a probe can't tell apart."""
    seen: set = set()
    kept = []
    for candidate in candidates:
        looks = {(number, plain(probe(candidate))) for number, probe in enumerate(probes)}
        if not looks & seen:
            kept.append(candidate)
        seen |= looks
    return kept


def _has_unit(locale: "Locale", unit: str, length: str) -> bool:
    from babel.units import UnknownUnitError, format_unit

    try:
        return unit not in format_unit(5, unit, length, locale=locale)  # what Babel falls back to
    except UnknownUnitError:
        return False


def _names(source: "Locale", target: "Locale") -> dict[str, Forms]:
    """Names of territories, languages and currencies; none that stands for two things."""
    found, seen = {}, set()
    for kind, allowed in (
        ("territories", None),
        ("languages", None),
        ("currencies", CURRENCIES.split()),
    ):
        first, second = getattr(source, kind), getattr(target, kind)
        codes = [
            code
            for code in sorted(set(first) & set(second))
            if (code in allowed if allowed else len(code) == 2)
        ]
        found[kind] = [(first[code], second[code]) for code in codes if first[code] not in seen]
        seen |= {first[code] for code in codes}
    return found


def _numerals(source: "Locale", target: "Locale") -> dict[str, Forms]:
    """Numbers in words by kind; a kind that one of the languages lacks has none."""
    codes = [_numeral_code(locale) for locale in (source, target)]
    found, seen = {}, set()
    for kind, numbers in NUMERALS.items() if all(codes) else ():
        said = [[_said(number, kind, code) for code in codes] for number in numbers]
        found[kind] = [(s, t) for s, t in said if s and t and s not in seen]
        seen |= {s for s, _ in said}
    return found


def _numeral_code(locale: "Locale") -> str | None:
    from num2words import CONVERTER_CLASSES

    code = NUMERAL_CODES.get(locale.language, locale.language)
    own = [f"{code}_{locale.territory}", code]
    return next((name for name in own if name in CONVERTER_CLASSES), None)


def _said(number: int, kind: str, code: str) -> str | None:
    from num2words import num2words

    try:
        said = num2words(number, lang=code, to=kind)
    except Exception:  # each language says in its own way that it can't: there is no common class
        return None
    return plain(said) if isinstance(said, str) else None
