"""Sentence pairs without a download: dates, amounts, measures, names and numbers in two languages.

A phrase is drawn once, as values, and rendered on both sides, so both say the same.
"""

import datetime
import random
from collections.abc import Callable
from decimal import Decimal

from headroom.corpora.forms import Side, Stock, plain, stock_of
from headroom.errors import InputError

LEAST_WORDS, MOST_WORDS = 3, 25
LEAST_CHARACTERS = 15  # as good as three words: not every script puts spaces between words
PATIENCE = 1000  # phrases in a row that are there already, before the supply counts as exhausted
PARTS = (  # quantities that are said in several units, with what the smaller ones count up to
    (("duration-day", 60), ("duration-hour", 24), ("duration-minute", 60)),
    (("duration-hour", 48), ("duration-minute", 60), ("duration-second", 60)),
    (("duration-year", 100), ("duration-month", 12), ("duration-day", 31)),
    (("length-foot", 40), ("length-inch", 12)),
    (("length-kilometer", 200), ("length-meter", 1000)),
    (("mass-pound", 100), ("mass-ounce", 16)),
    (("mass-kilogram", 60), ("mass-gram", 1000)),
)
AGO = ("second", "minute", "hour", "day", "week", "month", "year")
FIRST, DAYS = datetime.datetime(1970, 1, 1), 36524  # a century: two digits tell its years apart
Render = Callable[[Side], str]


def phrases(
    source_locale: str, target_locale: str, count: int, seed: int, key: str = "pairs.cldr.cldr"
) -> list[tuple[str, str]]:
    """Draw sentence pairs; no source sentence comes twice.

    The same seed gives the same pairs wherever Babel (the Unicode CLDR data in it) and num2words
    are of the same version: neither clock nor time zone nor locale of the machine is read.

    Args:
        source_locale: of CLDR, such as ``en`` or ``pt_BR``.
        target_locale: another one.
        count: number of pairs.
        seed: of the draw.
        key: the configuration key, for messages.

    Returns:
        (source, target) in the order drawn, of about 3 to 25 words.

    Raises:
        InputError: for an unknown locale, twice the same one, or more phrases than there are.
    """
    stock = stock_of(source_locale, target_locale, key)
    draw = random.Random(seed)
    kinds = [(kind, share) for kind, share, has in KINDS if has(stock)]
    found: dict[str, str] = {}
    misses = 0
    while len(found) < count:
        render = _phrase(draw, stock, kinds)
        source, target = (plain(render(side)) for side in stock.sides)
        misses = misses + 1 if source in found or not _fits(source, target) else 0
        if misses > PATIENCE:
            raise InputError(
                f"config key {key}.pairs is {count}: {source_locale} and {target_locale} give no "
                f"more than about {len(found)} phrases (allowed: fewer)"
            )
        if not misses:
            found[source] = target
    return list(found.items())


def _fits(source: str, target: str) -> bool:
    words = sorted(len(text.split()) for text in (source, target))
    long_enough = words[1] >= LEAST_WORDS or len(source) >= LEAST_CHARACTERS
    return long_enough and words[0] > 0 and words[1] <= MOST_WORDS


def _phrase(draw: random.Random, stock: Stock, kinds: list) -> Render:
    """Draw one quantity, one with another in parentheses, or a list of up to four."""
    shapes = {"single": 30, "aside": 10} | ({"same": 20, "mixed": 40} if stock.lists else {})
    shape = draw.choices(list(shapes), list(shapes.values()))[0]
    pick = [kind for kind, _ in kinds]
    shares = [share for _, share in kinds]
    first = draw.choices(pick, shares)[0]
    if shape == "single":
        return first(draw, stock)
    if shape == "aside":
        outer, inner = first(draw, stock), draw.choices(pick, shares)[0](draw, stock)
        return lambda side: f"{outer(side)} ({inner(side)})"
    size = draw.randint(2, 4)
    chosen = [first] * size if shape == "same" else draw.choices(pick, shares, k=size)
    return _list([kind(draw, stock) for kind in chosen], draw.choice(stock.lists))


def _list(items: list[Render], style: str) -> Render:
    from babel.lists import format_list

    return lambda side: format_list([item(side) for item in items], style, side.locale)


def _moment(draw: random.Random) -> datetime.datetime:
    return FIRST + datetime.timedelta(days=draw.randrange(DAYS), seconds=draw.randrange(86400))


def _number(draw: random.Random) -> Decimal:
    """Draw a number of one to six digits, small ones more often, every third with decimals."""
    digits = draw.choices((1, 2, 3, 4, 5, 6), (4, 6, 5, 3, 1, 1))[0]
    places = draw.choice((0, 0, 0, 0, 1, 2))
    return Decimal(draw.randrange(1, 10**digits) * 10**places + draw.randrange(10**places)).scaleb(
        -places
    )


def _date(draw: random.Random, stock: Stock) -> Render:
    from babel.dates import format_datetime

    moment, forms = _moment(draw), draw.choice(stock.dates)
    return lambda side: format_datetime(moment, forms[side.index], locale=side.locale)


def _time(draw: random.Random, stock: Stock) -> Render:
    from babel.dates import format_datetime

    moment, forms = _moment(draw), draw.choice(stock.times)
    return lambda side: format_datetime(moment, forms[side.index], locale=side.locale)


def _date_and_time(draw: random.Random, stock: Stock) -> Render:
    from babel.dates import get_datetime_format

    parts = _time(draw, stock), _date(draw, stock)

    def render(side: Side) -> str:
        pattern = str(get_datetime_format("long", locale=side.locale)).replace("'", "")
        return pattern.format(*(part(side) for part in parts))

    return render


def _interval(draw: random.Random, stock: Stock) -> Render:
    from babel.dates import format_interval

    start, skeleton = _moment(draw), draw.choice(stock.intervals)
    span = {"minutes": draw.randint(5, 600)} if "m" in skeleton else {"days": draw.randint(1, 300)}
    end = start + datetime.timedelta(**span)
    return lambda side: format_interval(start, end, skeleton, locale=side.locale)


def _ago(draw: random.Random, stock: Stock) -> Render:
    from babel.dates import TIMEDELTA_UNITS, format_timedelta

    unit = draw.choice(AGO)
    count = draw.choice((-1, 1)) * draw.randint(1, 99)
    options = {"granularity": unit, "threshold": float("inf"), "add_direction": True}
    seconds = count * dict(TIMEDELTA_UNITS)[unit]
    return lambda side: format_timedelta(seconds, locale=side.locale, **options)


def _amount(draw: random.Random, stock: Stock) -> Render:
    from babel.numbers import format_currency

    value, (currency, form) = _number(draw), draw.choice(stock.amounts)
    return lambda side: format_currency(value, currency, locale=side.locale, format_type=form)


def _measure(draw: random.Random, stock: Stock) -> Render:
    from babel.units import format_unit

    value, (unit, length) = _number(draw), draw.choice(stock.units)
    return lambda side: format_unit(value, unit, length, locale=side.locale)


def _rate(draw: random.Random, stock: Stock) -> Render:
    from babel.units import format_compound_unit

    value, (numerator, denominator) = _number(draw), draw.choice(stock.rates)
    return lambda side: format_compound_unit(value, numerator, 1, denominator, locale=side.locale)


def _parts(draw: random.Random, stock: Stock) -> Render:
    from babel.units import format_unit

    known = [parts for parts in PARTS if _known(parts, stock)]
    parts = [(draw.randrange(1, most), unit) for unit, most in draw.choice(known)]
    items = [lambda s, p=part: format_unit(*p, locale=s.locale) for part in parts]
    return _list(items, stock.lists[0])


def _known(parts: tuple[tuple[str, int], ...], stock: Stock) -> bool:
    return bool(stock.lists) and all((unit, "long") in stock.units for unit, _ in parts)


def _plain_number(draw: random.Random, stock: Stock) -> Render:
    from babel.numbers import format_decimal, format_percent

    value = _number(draw)
    if draw.random() < 0.5:
        return lambda side: format_decimal(value, locale=side.locale)
    share = value.scaleb(-2)
    return lambda side: format_percent(share, locale=side.locale, decimal_quantization=False)


def _numeral(draw: random.Random, stock: Stock) -> Render:
    kinds = [kind for kind in stock.numerals if stock.numerals[kind]]
    forms = draw.choice(stock.numerals[draw.choice(kinds)])
    return lambda side: forms[side.index]


def _name(draw: random.Random, stock: Stock) -> Render:
    kinds = [kind for kind in stock.names if stock.names[kind]]
    forms = draw.choice(stock.names[draw.choice(kinds)])
    return lambda side: forms[side.index]


KINDS: tuple[
    tuple[Callable[[random.Random, Stock], Render], int, Callable[[Stock], object]], ...
] = (
    (_date, 16, lambda stock: stock.dates),
    (_time, 6, lambda stock: stock.times),
    (_date_and_time, 12, lambda stock: stock.dates and stock.times),
    (_interval, 8, lambda stock: stock.intervals),
    (_ago, 10, lambda stock: True),
    (_amount, 12, lambda stock: stock.amounts),
    (_measure, 12, lambda stock: stock.units),
    (_rate, 8, lambda stock: stock.rates),
    (_parts, 8, lambda stock: any(_known(parts, stock) for parts in PARTS)),
    (_plain_number, 4, lambda stock: True),
    (_numeral, 10, lambda stock: any(stock.numerals.values())),
    (_name, 12, lambda stock: any(stock.names.values())),
)
