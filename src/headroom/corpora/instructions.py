"""Instruction samples (id, prompt, answer) from installed documentation, files or the hub.

Samples lie in JSONL files, one a line in the order of their source; rewritten versions of a set
carry the same ids in the same order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headroom.checkpoints import replacing
from headroom.corpora import text
from headroom.corpora.documented import questions
from headroom.corpora.rows import ENDINGS, read_rows
from headroom.errors import InputError

KINDS = ("packages", "path", "hub")
FIELDS = {"id": "id", "prompt": "prompt", "answer": "answer"}
TURNS = ["user", "assistant"]
SAMPLES = 64  # of documentation, where the configuration says nothing


class Sample(NamedTuple):
    """One instruction and its answer."""

    id: str
    prompt: str
    answer: str


class Row(NamedTuple):
    """A sample as its source holds it; a text is None where a chat has other turns."""

    place: str  # "line 3 of x.jsonl"
    id: str
    prompt: str | None
    answer: str | None


def write_instructions(settings: Mapping[str, Any], output: Path, name: str) -> dict:
    """Read a source of instructions and write them as JSONL in the source's order.

    Args:
        settings: exactly one of packages, path, hub; ``samples`` at most; of packages ``versions``
            and ``characters`` an answer has at most; of the others ``fields``, {id, prompt, answer}
            or {id, messages}, and ``where``, what other fields must be; of hub name, revision and
            hub_split.
        output: the file.
        name: of the set, for messages and for the ids of rows without one.

    Returns:
        samples; and, dropped, duplicates (the same prompt and answer), empty (no prompt or no
        answer), other_turns (chats that are not one user's and one assistant's turn) and beyond
        ``samples`` (None where a source is not read to its end: packages, hub).

    Raises:
        InputError: for a source that is missing, unreadable, lacks a field, gives an id twice or
            holds no sample, naming the key.
    """
    key = f"instructions.{name}"
    own = [kind for kind in KINDS if kind in settings]
    if len(own) != 1:
        raise InputError(f"config key {key} has {own} (allowed: exactly one of {', '.join(KINDS)})")
    most = settings.get("samples")
    if own == ["packages"]:
        most = most or SAMPLES
        found = questions(settings, f"{key}.packages")
        rows = (Row(identity, identity, *texts) for identity, *texts in found)
    else:
        rows = _field_rows(settings, key, name)
    samples, counts = _kept(rows, most, own == ["path"], key)
    if not samples:
        raise InputError(
            f"config key {key}: the source holds no sample ({counts['empty']} without prompt or "
            f"answer, {counts['other_turns']} with other turns; allowed: at least one)"
        )
    write_samples(output, samples)
    return counts


def write_brought(settings: Mapping[str, Any], originals: Path, output: Path, name: str) -> dict:
    """Write paraphrases that a user brings, in the order of the originals.

    Args:
        settings: ``path`` and ``fields`` as of :func:`write_instructions`; with ``partial`` true an
            original may lack its paraphrase.
        originals: the file of the originals, which ids refer to.
        output: the file.
        name: of the set of originals, for messages.

    Returns:
        samples; and, dropped, duplicates, empty, other_turns, unknown ids and originals missing
        a paraphrase.

    Raises:
        InputError: for unreadable files, an id given twice, originals without paraphrase.
    """
    key = f"instructions.{name}.paraphraser.path"
    samples, counts = _kept(_field_rows(settings, key, name), None, True, key)
    brought, wanted = {sample.id: sample for sample in samples}, read_samples(originals)
    missing = [sample.id for sample in wanted if sample.id not in brought]
    if len(missing) == len(wanted) or (missing and not settings.get("partial", False)):
        raise InputError(
            f"config key {key}: {len(missing)} of {len(wanted)} originals have no paraphrase "
            f"({', '.join(missing[:3])}; allowed: one for each id, not empty, or with partial: "
            f"true at least one)"
        )
    found = [brought[sample.id] for sample in wanted if sample.id in brought]
    write_samples(output, found)
    del counts["beyond"]
    unknown = len(samples) - len(found)
    return counts | {"samples": len(found), "unknown": unknown, "missing": len(missing)}


def read_samples(path: str | Path) -> list[Sample]:
    """Return the samples of a JSONL file in their order, whatever else its rows hold."""
    with Path(path).open(encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file]
    return [Sample(*(row[name] for name in Sample._fields)) for row in rows]


def write_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write samples as JSONL; the file appears whole or not at all."""
    with (
        replacing(path) as part,
        part.open("w", encoding="utf-8", errors="replace", newline="\n") as file,
    ):
        for sample in samples:  # files of others may hold lone surrogates, hence errors
            row = json.dumps(sample._asdict(), ensure_ascii=False, sort_keys=True)
            file.write(f"{row}\n")


def _kept(
    rows: Iterator[Row], most: int | None, to_the_end: bool, key: str
) -> tuple[list[Sample], dict]:
    """Drop what is no sample or there already, and refuse an id for two samples."""
    counts = {"duplicates": 0, "empty": 0, "other_turns": 0, "beyond": 0 if to_the_end else None}
    samples: list[Sample] = []
    places: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if row.prompt is None or row.answer is None:
            counts["other_turns"] += 1
        elif not row.prompt.strip() or not row.answer.strip():
            counts["empty"] += 1
        elif (row.prompt, row.answer) in seen:
            counts["duplicates"] += 1
        elif len(samples) == most:
            counts["beyond"] += 1  # only where rows are read to the end
        elif row.id in places:
            raise InputError(
                f"config key {key}: id {row.id!r} is in {places[row.id]} and in {row.place} "
                f"(allowed: each id once)"
            )
        else:
            seen.add((row.prompt, row.answer))
            places[row.id] = row.place
            samples.append(Sample(row.id, row.prompt, row.answer))
        if len(samples) == most and not to_the_end:
            break
    return samples, {"samples": len(samples), **counts}


# Files and the hub.


def _field_rows(settings: Mapping, key: str, name: str) -> Iterator[Row]:
    fields = settings.get("fields") or FIELDS
    chat, texts = "messages" in fields, {"prompt", "answer"} & set(fields)
    if chat == bool(texts) or (texts and len(texts) != 2):
        raise InputError(
            f"config key {key}.fields names {', '.join(sorted(fields))} (allowed: id, prompt and "
            f"answer, or id and messages)"
        )
    rows = _file_rows(settings["path"], key) if "path" in settings else _hub_rows(settings, key)
    wanted = settings.get("where") or {}
    for number, (place, row) in enumerate(rows):
        if any(str(_value(row, field, place, key)) != value for field, value in wanted.items()):
            continue
        identity = _identity(row, fields.get("id"), f"{name}_{number}", place, key)
        if chat:
            messages = _value(row, fields["messages"], place, key)
            yield Row(place, identity, *_turns(messages, fields["messages"], place, key))
            continue
        found = [_value(row, fields[part], place, key) for part in ("prompt", "answer")]
        for part, value in zip(("prompt", "answer"), found, strict=True):
            if not isinstance(value, str | None):
                raise InputError(
                    f"config key {key}.fields.{part}: {fields[part]!r} of {place} is no text"
                )
        yield Row(place, identity, *(value or "" for value in found))


def _identity(row: Mapping, field: str | None, numbered: str, place: str, key: str) -> str:
    if field is None or (field not in row and field == FIELDS["id"]):
        return numbered
    value = _value(row, field, place, key)
    if value is None:
        return numbered
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise InputError(
            f"config key {key}.fields.id: {field!r} of {place} is {value!r} (allowed: text or a "
            f"whole number)"
        )
    return str(value)


def _value(row: Mapping, field: str, place: str, key: str) -> Any:
    if field not in row:
        raise InputError(
            f"config key {key}.fields: no field {field!r} in {place} (allowed: one of "
            f"{', '.join(sorted(row))})"
        )
    return row[field]


def _turns(messages: Any, field: str, place: str, key: str) -> tuple[str | None, str | None]:
    """Return prompt and answer of a chat of two turns; plain texts are turns in this order."""
    turns = list(messages) if isinstance(messages, list | tuple) else None
    if turns and all(isinstance(turn, str) for turn in turns):
        return (turns[0], turns[1]) if len(turns) == 2 else (None, None)
    well_formed = turns is not None and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in turns
    )
    if not well_formed:
        raise InputError(
            f"config key {key}.fields.messages: {field!r} of {place} is no chat (allowed: a list "
            f"of objects with role and content, or of texts)"
        )
    if [turn["role"] for turn in turns] != TURNS:
        return None, None
    return turns[0]["content"], turns[1]["content"]


def _file_rows(paths: str | Sequence[str], key: str) -> Iterator[tuple[str, Mapping]]:
    for path in map(Path, [paths] if isinstance(paths, str) else paths):
        path = path.expanduser()
        if not path.is_file():
            raise InputError(f"config key {key}.path: there is no file {path} (allowed: a file)")
        if path.suffix not in ENDINGS:
            raise InputError(
                f"config key {key}.path: {path} has another ending than {', '.join(ENDINGS)}"
            )
        for place, row in read_rows(path, f"{key}.path"):
            yield f"{place} of {path.name}", row


def _hub_rows(settings: Mapping, key: str) -> Iterator[tuple[str, Mapping]]:
    from datasets.exceptions import DatasetGenerationError

    hub, split = settings["hub"], settings.get("hub_split", "train")
    options = {"split": split, "revision": settings.get("revision")}
    loaded = text.load_rows(key, hub, settings.get("name"), **options)
    rows = enumerate(loaded, 1)
    while True:
        try:  # what the caller raises on a row must not look like a fault of the source
            number, row = next(rows)
        except StopIteration:
            return
        except (DatasetGenerationError, OSError, ValueError) as error:
            first = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"config key {key}.hub: {hub} is unreadable: {type(error).__name__}: {first}"
            ) from error
        yield f"row {number} of {hub}", row
