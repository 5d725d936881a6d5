"""Sentence pairs from any source, cleaned and split so that no test sentence is trained on."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headroom.corpora import text
from headroom.corpora.forms import plain
from headroom.corpora.phrases import phrases
from headroom.corpora.rows import read_rows
from headroom.errors import InputError
from headroom.progress import progress

SPLITS = ("train", "validation", "test")
SHARES = {"train": 0.9, "validation": 0.05, "test": 0.05}
FIELDS = ("source", "target")
KINDS = ("cldr", "path", "hub")
ROWS = (".jsonl", ".parquet")
# corpora.text.bucket knows the splits by its own names, in the same order.
NAMES = dict(zip(text.SPLITS, SPLITS, strict=True))
SEPARATOR = "\ud800"  # half a character, which no sentence holds, and no white space

Pair = tuple[str, str]  # source, target


def write_pairs(settings: Mapping[str, Any], outputs: Mapping[str, str | Path], name: str) -> dict:
    """Read a parallel corpus and write one Parquet file (id, source, target) a split.

    The test split is the yardstick and never changed. A training pair goes if its source sentence
    is in the validation or the test split, whatever its target, and a validation pair if its source
    is in the test split: a model that has seen another translation of a test sentence has still
    seen the question. For corpora with generic sentences ("Thank you.") this costs the training
    text some short ones, but each translation of the test is then one of a sentence that is new,
    and scores on a published test set stay comparable. Exact duplicates go from train only.

    Args:
        settings: one source (exactly one of cldr, path, hub and its options); ``split`` shares for
            cldr, ``fields``, ``limits`` by split, and the case policy ``lowercase``.
        outputs: a file for each of train, validation and test.
        name: of the corpus, for messages.

    Returns:
        for each split pairs, source_words and target_words; and, over all, what was dropped:
        duplicates, empty, leaked, and shared_sources, those of leaked with another target.

    Raises:
        InputError: for a source that is missing, empty, not aligned or lacks a field, an empty side
            in a held-out split, or an empty split, naming the key.
    """
    key = f"pairs.{name}"
    totals = dict.fromkeys(("duplicates", "empty", "leaked", "shared_sources"), 0)
    read = {split: _clean(it, settings, split, totals) for split, it in _read(settings, key)}
    kept = _keep_apart(read, totals)
    for split in SPLITS:
        if not kept[split]:
            raise InputError(
                f"config key {key}: the {split} split is empty after {len(read[split])} pairs read "
                f"(allowed: at least one pair that no later split holds)"
            )
        _write(kept[split], Path(outputs[split]))
    _assert_apart(outputs)
    print(
        f"pairs {name}: of {sum(map(len, read.values())) + totals['empty']} pairs dropped "
        f"{totals['leaked']} leaked ({totals['shared_sources']} by the source alone), "
        f"{totals['empty']} with an empty side, {totals['duplicates']} duplicates",
        file=sys.stderr,
    )
    return {split: _counts(kept[split]) for split in SPLITS} | totals


def read_pairs(path: str | Path) -> tuple[list[str], list[str]]:
    """Return the sources and the targets of a split in their order."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=["source", "target"])
    return table["source"].to_pylist(), table["target"].to_pylist()


def pair_id(source: str, target: str) -> str:
    """First 16 hexadecimal digits of SHA-256 of both sides."""
    return text.document_id(f"{source}{SEPARATOR}{target}")


def _read(settings: Mapping, key: str) -> Iterator[tuple[str, tuple[str, Iterable[Pair]]]]:
    """Yield of each split its name, and the key it is read from with its pairs."""
    own = [kind for kind in KINDS if kind in settings]
    if len(own) != 1:
        raise InputError(f"config key {key} has {own} (allowed: exactly one of {', '.join(KINDS)})")
    drawn = _drawn(settings, key) if own == ["cldr"] else {}
    for split in SPLITS:
        if own == ["cldr"]:
            place, pairs = f"{key}.cldr", drawn[split]
        elif own == ["path"]:
            place = f"{key}.path.{split}"
            pairs = _file_pairs(settings, split, place, key)
        else:
            place = f"{key}.hub_splits.{split}"
            pairs = _hub_pairs(settings, split, place, key)
        yield split, (place, itertools.islice(pairs, settings.get("limits", {}).get(split)))


def _drawn(settings: Mapping, key: str) -> dict[str, list[Pair]]:
    """Draw phrases and let the hash of its source, in its final form, decide a pair's split."""
    cldr, shares = settings["cldr"], SHARES | settings.get("split", {})
    if abs(sum(shares[split] for split in SPLITS) - 1) > 1e-9:
        total = sum(shares[split] for split in SPLITS)
        raise InputError(f"config key {key}.split: the shares sum to {total:g} (allowed: 1)")
    theirs = {own: shares[split] for own, split in NAMES.items()}
    drawn: dict[str, list[Pair]] = {split: [] for split in SPLITS}
    for pair in phrases(*cldr["locales"], cldr["pairs"], cldr.get("seed", 0), f"{key}.cldr"):
        source = _normal(pair[0], settings)
        drawn[NAMES[text.bucket(text.document_id(source), theirs)]].append(pair)
    return drawn


def _file_pairs(settings: Mapping, split: str, place: str, key: str) -> Iterator[Pair]:
    named = settings["path"].get(split)
    named = [named] if isinstance(named, str) else named or []
    paths = [Path(path).expanduser() for path in named]
    for path in paths:
        if not path.is_file():
            raise InputError(f"config key {place}: there is no file {path} (allowed: a file)")
    if len(paths) == 1 and paths[0].suffix in ROWS:
        found = read_rows(paths[0], place)
        return _fields(((f"{at} of {paths[0]}", row) for at, row in found), settings, key)
    if len(paths) != 2:
        raise InputError(
            f"config key {place} names {len(paths)} files (allowed: two aligned text files, or one "
            f"that ends in {' or '.join(ROWS)})"
        )
    sides = [_lines(path, place) for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise InputError(
            f"config key {place}: {paths[0].name} has {len(sides[0])} lines and {paths[1].name} "
            f"{len(sides[1])} (allowed: as many)"
        )
    return zip(*sides, strict=True)


def _lines(path: Path, place: str) -> list[str]:
    # Nothing but "\n" ends a line: one U+2028 inside a sentence would shift all that follow.
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"config key {place}: {path} is no text in line {line} (allowed: UTF-8)"
        ) from None
    return text.removesuffix("\n").split("\n") if text else []


def _hub_pairs(settings: Mapping, split: str, place: str, key: str) -> Iterator[Pair]:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(
            settings["hub"],
            settings.get("name"),
            split=settings.get("hub_splits", {}).get(split, split),
            revision=settings.get("revision"),
            streaming=True,
        )
        placed = ((f"row {n} of {settings['hub']}", row) for n, row in enumerate(loaded, 1))
        yield from _fields(placed, settings, key)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"config key {place}: {settings['hub']} can't be read: {type(error).__name__}: {first}"
        ) from error


def _fields(placed: Iterable[tuple[str, Mapping]], settings: Mapping, key: str) -> Iterator[Pair]:
    fields = settings.get("fields", FIELDS)
    if len(fields) != 2:
        raise InputError(
            f"config key {key}.fields is {list(fields)} (allowed: the field names of source and "
            f"target, such as [en, de] or [translation.en, translation.de])"
        )
    for place, row in placed:
        found = [_field(row, field) for field in fields]
        for field, value in zip(fields, found, strict=True):
            if not isinstance(value, str):
                raise InputError(
                    f"config key {key}.fields: no text in field {field!r} of {place} "
                    f"(allowed: one of {', '.join(_names(row))})"
                )
        yield found[0], found[1]


def _field(row: Any, field: str) -> Any:
    if isinstance(row, Mapping) and field in row:
        return row[field]
    first, dot, rest = field.partition(".")
    return _field(row.get(first), rest) if dot and isinstance(row, Mapping) else None


def _names(row: Mapping, prefix: str = "") -> list[str]:
    return [
        name
        for field, value in sorted(row.items())
        for name in (
            _names(value, f"{prefix}{field}.") if isinstance(value, Mapping) else [prefix + field]
        )
    ]


def _normal(sentence: str, settings: Mapping) -> str:
    sentence = sentence.encode("utf-8", "replace").decode()  # JSON may hold lone surrogates
    return plain(sentence.lower() if settings.get("lowercase", False) else sentence)


def _clean(
    read: tuple[str, Iterable[Pair]], settings: Mapping, split: str, totals: dict[str, int]
) -> list[Pair]:
    """Normalise both sides; an empty one is dropped in training text and refused elsewhere."""
    place, pairs = read
    cleaned = []
    for number, pair in enumerate(progress(pairs, f"{split} pairs", unit="pair", delay=5), 1):
        source, target = (_normal(side, settings) for side in pair)
        if source and target:
            cleaned.append((source, target))
        elif split == "train":
            totals["empty"] += 1
        else:
            raise InputError(
                f"config key {place}: line {number} has an empty {'target' if source else 'source'}"
                f" (allowed: text on both sides in held-out pairs)"
            )
    return cleaned


def _keep_apart(read: Mapping[str, list[Pair]], totals: dict[str, int]) -> dict[str, list[Pair]]:
    """Drop from each split what a later one holds, and from train what it holds twice."""
    kept: dict[str, list[Pair]] = {"test": read["test"]}
    pairs, sources = set(read["test"]), {source for source, _ in read["test"]}
    for split in ("validation", "train"):
        apart = [pair for pair in read[split] if pair[0] not in sources]
        totals["leaked"] += len(read[split]) - len(apart)
        totals["shared_sources"] += sum(
            s in sources and (s, t) not in pairs for s, t in read[split]
        )
        kept[split] = apart
        pairs |= set(apart)
        sources |= {source for source, _ in apart}
    kept["train"] = list(dict.fromkeys(kept["train"]))
    totals["duplicates"] += len(apart) - len(kept["train"])
    return kept


def _write(pairs: list[Pair], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "id": [pair_id(source, target) for source, target in pairs],
        "source": [source for source, _ in pairs],
        "target": [target for _, target in pairs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema([(column, "string") for column in columns])
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), path)


def _assert_apart(outputs: Mapping[str, str | Path]) -> None:
    """Read ids and sources back from the files: what counts is what was written."""
    import pyarrow.parquet

    for column in ("id", "source"):
        held = {
            split: set(pyarrow.parquet.read_table(outputs[split])[column].to_pylist())
            for split in SPLITS
        }
        for one, other in itertools.combinations(SPLITS, 2):
            if held[one] & held[other]:
                folder = Path(outputs[one]).parent
                raise RuntimeError(f"{folder}: the {one} and {other} splits share a {column}")


def _counts(pairs: list[Pair]) -> dict[str, int]:
    return {
        "pairs": len(pairs),
        "source_words": sum(len(source.split()) for source, _ in pairs),
        "target_words": sum(len(target.split()) for _, target in pairs),
    }
