"""Documents from any source, split into train, calibration and evaluation by content.

A document's id is a hash of its text. Duplicates are dropped, and which split a document falls into
depends on its id alone, so more documents move none of those that were there.
"""

import glob
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headroom.corpora.documentation import documentation
from headroom.corpora.rows import ENDINGS, read_rows
from headroom.errors import InputError
from headroom.progress import progress

SPLITS = ("train", "calibration", "evaluation")
# Of separate sources, the held-out text is read first: what recurs is dropped where it comes later.
READING_ORDER = ("evaluation", "train", "calibration")
FRACTIONS = {"train": 0.8, "calibration": 0.1, "evaluation": 0.1}
KINDS = ("packages", "path", "hub")
PLAIN = (".txt", ".raw", ".tokens")
REPLACEMENT = "\ufffd"  # what stands for a byte that is no UTF-8, or half a character
BATCH = 1000  # documents held before they are written


def write_splits(settings: Mapping[str, Any], outputs: Mapping[str, str | Path], name: str) -> dict:
    """Read a corpus, split it and write one Parquet file (id, text) a split.

    Args:
        settings: one source (exactly one of packages, path, hub and its options) with fractions
            ``split``, or one source for each of train, calibration, evaluation.
        outputs: a file for each of train, calibration and evaluation.
        name: of the corpus, for messages.

    Returns:
        for each split documents and characters; and, over all, duplicates dropped and documents
        with characters that could not be decoded.

    Raises:
        InputError: for a source that is missing, empty or lacks the text field, an empty split,
            naming the key.
    """
    key = f"corpora.{name}"
    counts = {split: {"documents": 0, "characters": 0} for split in SPLITS}
    totals = {"duplicates": 0, "undecodable": 0}
    owner: dict[str, str] = {}
    with _Writers(outputs) as writers:
        for split, text in split_documents(settings, key):
            text = re.sub("[\ud800-\udfff]", REPLACEMENT, text)  # JSON may hold lone surrogates
            identity = document_id(text)
            found = split or bucket(identity, settings.get("split") or FRACTIONS)
            if identity in owner:
                totals["duplicates"] += 1
                continue
            owner[identity] = found
            totals["undecodable"] += REPLACEMENT in text
            counts[found]["documents"] += 1
            counts[found]["characters"] += len(text)
            writers.add(found, identity, text)
    for split in SPLITS:
        optional = split == "train" and "evaluation" in settings and "train" not in settings
        if not counts[split]["documents"] and not optional:
            raise InputError(
                f"config key {key}: the {split} split is empty ({len(owner)} documents in all; "
                f"give more documents or other fractions)"
            )
    _assert_disjoint(outputs)
    return {**counts, **totals}


def split_documents(settings: Mapping, key: str) -> Iterator[tuple[str | None, str]]:
    """Yield (split, text) of a corpus; None where the text decides its split by its hash.

    Raises:
        InputError: for sources that don't fit, naming the key.
    """
    own = [kind for kind in KINDS if kind in settings]
    splits = [split for split in SPLITS if split in settings]
    if len(own) == 1 and not splits:
        for text in documents(settings, key):
            yield None, text
    elif not own and {"calibration", "evaluation"} <= set(splits):
        for split in READING_ORDER:
            if split not in settings:
                continue  # only a model trained here needs training text
            for text in documents(settings[split], f"{key}.{split}"):
                yield split, text
    else:
        raise InputError(
            f"config key {key} has {own + splits}: give exactly one of packages, path, hub, or a "
            f"source for each of calibration, evaluation and, to train on, train"
        )


def documents(source: Mapping, key: str) -> Iterator[str]:
    """Yield the documents of one source in a fixed order, up to its caps.

    ``documents`` and ``characters`` cap what is read, before duplicates are dropped; the document
    that crosses ``characters`` is the last one.

    Raises:
        InputError: if the source is missing, empty or lacks the text field, naming the key.
    """
    characters, count = 0, 0
    texts = itertools.islice(_texts(source, key), source.get("documents"))
    for text in progress(texts, "documents", source.get("documents"), "document", delay=5):
        yield text
        count, characters = count + 1, characters + len(text)
        if characters >= source.get("characters", float("inf")):
            break
    if not count:
        raise InputError(f"config key {key}: the source holds no text")


def document_id(text: str) -> str:
    """First 16 hexadecimal digits of SHA-256 of the text, blind to Unicode form and white space."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def bucket(identity: str, fractions: Mapping[str, float]) -> str:
    """Return the split of a document: its id, read as a number in [0, 1), falls into a share.

    Raises:
        InputError: if the shares don't sum to 1.
    """
    total = sum(fractions[split] for split in SPLITS)
    if abs(total - 1) > 1e-9:
        raise InputError(f"corpora split shares sum to {total:g} (allowed: 1)")
    place, edge = int(identity, 16) / 16 ** len(identity), 0.0
    for split in SPLITS:
        edge += fractions[split]
        if place < edge:
            return split
    return next(split for split in reversed(SPLITS) if fractions[split])


def _texts(source: Mapping, key: str) -> Iterator[str]:
    if "packages" in source:
        found = documentation(source["packages"], source.get("versions", {}), f"{key}.packages")
    else:
        lines = _file_rows(source, key) if "path" in source else _hub_rows(source, key)
        found = grouped(lines, source, key)
    return (text.strip() for text in found if text.strip())


def grouped(texts: Iterable[str], source: Mapping, key: str) -> Iterator[str]:
    """Join texts to documents: at a separator, at headings, or each is one.

    Raises:
        InputError: for a heading that is no regular expression.
    """
    if "separator" not in source and "heading" not in source:
        yield from texts
        return
    separator = source.get("separator")
    try:
        heading = re.compile(source["heading"]) if "heading" in source else None
    except re.error as error:
        raise InputError(f"config key {key}.heading is no regular expression: {error}") from None
    lines: list[str] = []
    for text in texts:
        for line in text.removesuffix("\n").split("\n"):
            if line.strip() == separator or (heading and heading.search(line)):
                yield "\n".join(lines)
                lines = []
            if line.strip() != separator:
                lines.append(line)
    yield "\n".join(lines)


def _file_rows(source: Mapping, key: str) -> Iterator[str]:
    for path in _paths(source["path"], f"{key}.path"):
        if path.suffix in PLAIN:
            whole = "separator" in source or "heading" in source
            yield from _lines(path) if whole else _paragraphs(_lines(path))
        elif path.suffix in ENDINGS:
            found = read_rows(path, key, replace=True)
            placed = ((f"{place} of {path}", row) for place, row in found)
            yield from _fields(placed, source.get("text", "text"), key)
        else:
            allowed = ", ".join((*PLAIN, *ENDINGS))
            raise InputError(f"config key {key}.path: {path} has another ending than {allowed}")


def _paths(patterns: str | list[str], key: str) -> list[Path]:
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        full = Path(pattern).expanduser()
        hits = [str(full)] if full.is_file() else sorted(glob.glob(str(full), recursive=True))
        files = [Path(hit) for hit in hits if Path(hit).is_file()]
        if not files:
            raise InputError(f"config key {key}: there is no file {pattern}")
        found += files
    return found


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for blank, block in itertools.groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield "\n".join(block)


def _hub_rows(source: Mapping, key: str) -> Iterator[str]:
    loaded = load_rows(
        key,
        source["hub"],
        source.get("name"),
        split=source.get("hub_split", "train"),
        revision=source.get("revision"),
    )
    placed = ((f"row {number} of {source['hub']}", row) for number, row in enumerate(loaded, 1))
    return _fields(placed, source.get("text", "text"), key)


def load_rows(key: str, *args: Any, **options: Any):
    """Return the rows of a data set as a stream (arguments of ``datasets.load_dataset``).

    Raises:
        InputError: if it can't be read, naming the key.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, streaming=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"config key {key}: {args[0]} can't be read: {type(error).__name__}: {first}"
        ) from error


def _fields(placed: Iterable[tuple[str, Mapping]], field: str, key: str) -> Iterator[str]:
    try:
        for place, row in placed:
            if not isinstance(row.get(field), str):
                names = ", ".join(sorted(map(str, row)))
                raise InputError(
                    f"config key {key}.text: no text in field {field!r} of {place} (allowed: one "
                    f"of {names})"
                )
            yield row[field]
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: what datasets raises
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"config key {key}: unreadable: {type(error).__name__}: {first}"
        ) from error


class _Writers:
    """Parquet files of all splits, written in batches so that no corpus has to fit into memory."""

    def __init__(self, outputs: Mapping[str, str | Path]):
        self.outputs = {split: Path(outputs[split]) for split in SPLITS}
        self.rows: dict[str, list[dict]] = {split: [] for split in SPLITS}

    def __enter__(self):
        import pyarrow
        import pyarrow.parquet

        self.arrow, self.schema = pyarrow, pyarrow.schema([("id", "string"), ("text", "string")])
        for path in self.outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        self.files = {
            split: pyarrow.parquet.ParquetWriter(path, self.schema)
            for split, path in self.outputs.items()
        }
        return self

    def add(self, split: str, identity: str, text: str) -> None:
        self.rows[split].append({"id": identity, "text": text})
        if len(self.rows[split]) >= BATCH:
            self._flush(split)

    def _flush(self, split: str) -> None:
        self.files[split].write_table(self.arrow.Table.from_pylist(self.rows[split], self.schema))
        self.rows[split] = []

    def __exit__(self, *error: object) -> None:
        for split in SPLITS:
            if self.rows[split]:
                self._flush(split)
            self.files[split].close()


def read_texts(path: str | Path) -> list[str]:
    """Return the texts of a split in their order."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()


def _assert_disjoint(outputs: Mapping[str, str | Path]) -> None:
    """Read the ids back from the files: what counts is what was written."""
    ids = [identity for split in SPLITS for identity in _read_ids(outputs[split])]
    if len(ids) != len(set(ids)):
        folder = Path(outputs["evaluation"]).parent
        raise RuntimeError(f"{folder}: two splits share a document, or one holds it twice")


def _read_ids(path: str | Path) -> list[str]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["id"])["id"].to_pylist()


def check_unseen(documents: str | Path, rows: Sequence[int], seen: Sequence[str | Path]) -> None:
    """Refuse held-out documents that are among those of other corpora.

    The splits of one corpus are disjoint by themselves; two corpora may hold the same document.

    Args:
        documents: the Parquet file of the held-out split, in a folder named like its corpus.
        rows: which of its documents are read.
        seen: Parquet files of other corpora, in folders named like them.

    Raises:
        InputError: naming both corpora.
    """
    if not seen:
        return
    ids = _read_ids(documents)
    wanted, corpus = {ids[row] for row in rows}, Path(documents).parent.name
    for path in map(Path, seen):
        if shared := wanted.intersection(_read_ids(path)):
            raise InputError(
                f"config key evaluation.corpora: {len(shared)} of {len(wanted)} documents that "
                f"are read of {corpus} are also in the {path.stem} split of corpus "
                f"{path.parent.name}, which the checkpoint has seen (allowed: corpora without "
                f"common documents, or one corpus for both)"
            )
