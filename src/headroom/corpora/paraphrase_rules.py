"""A paraphraser of fixed rules: no network, no model, the same text for the same seed.

Every edit that a text allows has a place and a draw in [0, 1), from a hash of seed, place and what
stands there; strength s makes those with a draw below s. Which of two overlapping edits there may
be does not depend on s, so the edits of a strength are among those of each greater one.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from headroom.corpora.paraphrase_gates import CODE
from headroom.corpora.paraphrase_words import (
    LOWERED,
    NOUNS,
    OTHERS,
    PHRASES,
    REFRAMED,
    VERBS,
    conjugated,
    entries,
    plural,
)

# Code, names, numbers, addresses and quotations, which stay as they are.
PROTECTED = re.compile(
    rf"{CODE.pattern}|^(?: {{4}}|\t)[^\n]*$|^[ \t]*>>>[^\n]*$"
    r"|:[\w:]+:(?=`)|\$[^$\n]+\$|<[^<>\n]+>|\]\([^)\n]*\)"
    r"|\"[^\"\n]{1,80}\"|“[^”\n]{1,80}”|\*[\w ]+\*"
    r"|\S*(?:://|@|\\)\S*|\w+(?:/\w+)+"
    r"|(?!e\.g\b|i\.e\b)\b\w+(?:\.\w+)+|\b\w+\([^()\n]*\)|\b\w*_\w*|\b\w*\d\w*"
    r"|\b\w*[a-z][A-Z]\w*|\b[A-Z]{2,}s?\b|\b\w+(?:-\w+)+",
    re.MULTILINE | re.DOTALL,
)
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?]+(?=\s|$)|\n")
MODALS = (
    "to can will may must should would could might shall not you we they i please and then also"
)
BEFORE_VERB = frozenset((*MODALS.split(), "don't", "cannot", "let's"))
BEFORE_THIRD = frozenset(("it", "that", "which", "this", "he", "she", "who", "also", "and"))
DETERMINERS = "the a an this that these those each every its their your our my his her some any no"
BEFORE_NOUN = frozenset((*DETERMINERS.split(), "of", "such", "same", "new", "other"))
NOT_AFTER_TO = re.compile(rf"\s+(?:{DETERMINERS.replace(' ', '|')})\b")  # "what they have to a …"
GOES_ON = re.compile(r"\s+[a-z]")  # "what it is." has no short form
VOWEL = re.compile(r"(?!uni|use|usu|one\b|eu)[aeiou]|hour|honest", re.IGNORECASE)


class Edit(NamedTuple):
    """A word or phrase that can be replaced."""

    start: int
    end: int
    replacement: str
    draw: float


class Frame(NamedTuple):
    """A sentence that can be put together in another way."""

    start: int
    end: int
    groups: tuple[tuple[int, int], ...]
    code: tuple[bool, ...]  # whether a group begins with what stays as it is
    template: str
    draw: float


class Entry(NamedTuple):
    """What may replace a word or phrase, and the words before it that say it is the right one."""

    replacement: str
    neighbours: frozenset[str] | None  # None: any
    opens: bool  # whether it may begin a sentence


def paraphraser(settings: Mapping, key: str) -> Callable:
    """Return a paraphraser of rules (interface in corpora.paraphrase).

    Args:
        settings: strength in [0, 1] and seed.
        key: the configuration key (nothing can fail here).
    """

    def paraphrase(texts: Sequence[str], attempt: int) -> Iterator[tuple[int, str]]:
        for place, text in enumerate(texts):
            yield place, rephrase(text, settings["strength"], settings.get("seed", 0) + attempt)

    return paraphrase


def rephrase(text: str, strength: float, seed: int = 0) -> str:
    """Return the text with every edit made whose draw is below ``strength`` (0: as it is)."""
    frames, edits = possible(text, seed)
    made = [edit for edit in edits if edit.draw < strength]
    parts, place = [], 0
    for frame in frames:
        if frame.draw < strength:
            parts += [_edited(text, place, frame.start, made), _reframed(text, frame, made)]
            place = frame.end
    return "".join((*parts, _edited(text, place, len(text), made)))


def possible(text: str, seed: int) -> tuple[list[Frame], list[Edit]]:
    """Return all edits that a text allows at strength 1; no two overlap."""
    fixed = [match.span() for match in PROTECTED.finditer(text)]
    frames = list(_frames(text, fixed, seed))
    for frame in frames:
        inside = [frame.start, *(edge for group in frame.groups for edge in group), frame.end]
        fixed += zip(inside[::2], inside[1::2], strict=True)  # what stands around the groups
    taken, edits = _marked(len(text), fixed), []
    for match in _lexicon()[1].finditer(text):
        start, end = match.span()
        replacement = _replacement(text, match)
        if replacement is not None and 1 not in taken[start:end]:
            edits.append(Edit(start, end, replacement, _draw(seed, start, match[0])))
    return frames, edits


def _marked(length: int, spans: Sequence[tuple[int, int]]) -> bytearray:
    """Return a byte a character, 1 inside the spans."""
    marked = bytearray(length)
    for start, end in spans:
        marked[start:end] = b"\1" * (end - start)
    return marked


@functools.cache
def _lexicon() -> tuple[dict[str, list[Entry]], re.Pattern]:
    """Return entries by lower-cased text, and a pattern of all, the longest first."""
    found: dict[str, list[Entry]] = {}

    def add(word: str, replacement: str, neighbours=None, opens: bool = True) -> None:
        found.setdefault(word, []).append(Entry(replacement, neighbours, opens))

    for table in (PHRASES, OTHERS):
        for word, replacement, ambiguous in entries(table):
            add(word, replacement, BEFORE_NOUN if ambiguous else None)
    for word, replacement, ambiguous in entries(VERBS):
        source, target = conjugated(word), conjugated(replacement)
        wanted = {"base": BEFORE_VERB, "third": BEFORE_THIRD} if ambiguous else {}
        for name, forms in source.items():
            if len(target[name]) == 1:  # "began" and "begun" for one "started": which?
                for form in set(forms):
                    add(form, target[name][0], wanted.get(name))
    for word, replacement, ambiguous in entries(NOUNS):
        neighbours = BEFORE_NOUN if ambiguous else None
        add(word, replacement, neighbours, not ambiguous)
        if word != "information":
            add(plural(word), plural(replacement), neighbours, not ambiguous)
    # By first letters, because each place of a text would else be held against every word.
    longest = sorted(found, key=lambda word: (word[:2], -len(word), word))
    groups = itertools.groupby(longest, key=lambda word: word[:2])
    words = "|".join(
        f"{re.escape(first)}(?:{'|'.join(_spaced(word[2:]) for word in some)})"
        for first, some in groups
    )
    pattern = rf"(?<![\w'’-])(?:(an?)\s+)?({words})(?![\w-]|['’]\w)"
    return found, re.compile(pattern, re.IGNORECASE)


def _spaced(word: str) -> str:
    return re.escape(word).replace(r"\ ", r"\s+")


def _replacement(text: str, match: re.Match) -> str | None:
    """Return what replaces a match where it stands, None if nothing fits."""
    article, word = match[1], match[2]
    behind = text[max(0, match.start() - 40) : match.start()]
    before, gap = re.search(r"([\w'’]+)\W*$", behind), behind.rstrip()
    opens = not gap or gap[-1] in ".!?:" or "\n" in behind[len(gap) :]
    previous = article or (before[1] if before and not opens else "")
    if word[0].isupper() and not (opens and not article) and word.split()[0].lower() != "i":
        return None  # a name
    for entry in _lexicon()[0][" ".join(word.lower().replace("’", "'").split())]:
        starts = opens and not article
        if not _goes_on(text, match.end(), word, entry.replacement):
            continue
        if entry.neighbours is None or (
            entry.opens if starts else previous.lower() in entry.neighbours
        ):
            found = entry.replacement
            if word[0].isupper() and word[:2] not in ("I ", "I'", "I’"):
                found = found[0].upper() + found[1:]
            if article:
                fitting = "an" if VOWEL.match(found) else "a"
                fitting = fitting.capitalize() if article[0].isupper() else fitting
                found = f"{fitting} {found}"
            return found
    return None


def _goes_on(text: str, end: int, word: str, replacement: str) -> bool:
    """Whether what follows lets a phrase be replaced."""
    if word.lower().endswith(" to"):
        return not NOT_AFTER_TO.match(text, end)
    short = replacement.endswith(("'s", "'re", "'m", "'ll"))
    return not short or GOES_ON.match(text, end) is not None


def _frames(text: str, fixed: Sequence[tuple[int, int]], seed: int) -> Iterator[Frame]:
    """Yield of each sentence the first other form that fits it."""
    start, inside = 0, _marked(len(text), fixed)
    ends = [match.end() for match in SENTENCE_END.finditer(text) if not inside[match.start()]]
    for end in dict.fromkeys((*ends, len(text))):
        sentence = text[start:end]
        first = start + len(sentence) - len(sentence.lstrip())
        start = end
        for pattern, templates in REFRAMED:
            match = re.compile(pattern).fullmatch(text, first, first + len(sentence.strip()))
            if match and _fits(text, match, inside):
                choices = templates.split("|")
                choice = choices[int(_draw(seed, first, match[0], "choice") * len(choices))]
                groups = tuple(match.span(i + 1) for i in range(len(match.groups())))
                code = tuple(bool(inside[begin]) for begin, _ in groups)
                draw = _draw(seed, first, match[0])
                yield Frame(first, match.end(), groups, code, choice, draw)
                break


def _fits(text: str, match: re.Match, inside: bytearray) -> bool:
    """Whether no border of a group cuts code, and the first word, if it moves, can be lowered."""
    borders = [edge for i in range(len(match.groups())) for edge in match.span(i + 1)]
    if any(inside[edge - 1] and inside[edge] for edge in borders if 0 < edge < len(text)):
        return False
    start = match.start(1)
    if start != match.start() or inside[start]:
        return True
    word = re.match(r"[\w'’]+", text[start:])
    return bool(word) and (word[0].lower() in LOWERED or word[0].lower() in _verb_forms())


@functools.cache
def _verb_forms() -> frozenset[str]:
    """Base and third person of the verbs, with which documentation begins its sentences."""
    forms = (conjugated(word) for word, _, _ in entries(VERBS))
    return frozenset(form for found in forms for name in ("base", "third") for form in found[name])


def _reframed(text: str, frame: Frame, made: Sequence[Edit]) -> str:
    found = [_edited(text, *group, made) for group in frame.groups]

    def fill(match: re.Match) -> str:
        group = found[int(match[2])]
        plain = group.split(" ")[0].isalpha() and group.split(" ")[0] != "I"
        if match[1] == "/" and plain:
            return group[0].lower() + group[1:]
        if (match[1] == "^" or (match.start() == 0 and not match[1])) and group[0].isalpha():
            return group if frame.code[int(match[2])] else group[0].upper() + group[1:]
        return group

    return re.sub(r"\{([/^]?)(\d)\}", fill, frame.template)


def _edited(text: str, start: int, end: int, made: Sequence[Edit]) -> str:
    """Return a stretch of the text with its edits."""
    parts = []
    for edit in made:
        if start <= edit.start and edit.end <= end:
            parts += [text[start : edit.start], edit.replacement]
            start = edit.end
    return "".join((*parts, text[start:end]))


def _draw(seed: int, place: int, found: str, purpose: str = "") -> float:
    parts = f"{seed}\0{place}\0{found}\0{purpose}"
    digest = hashlib.sha256(parts.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
