"""Rows of JSON and Parquet files, one at a time, each with its place in the file.

Readers that guess the columns' types from the first rows take a text like 2020-01-01 for a time
and can't say which line is broken; here a row is what its line says.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headroom.errors import InputError

ENDINGS = (".jsonl", ".json", ".parquet")
BOM = "\ufeff"


def read_rows(path: Path, key: str, replace: bool = False) -> Iterator[tuple[str, Mapping]]:
    """Yield (place, row) of a file: ``line 3`` of .jsonl, ``row 3`` of .json lists and .parquet.

    Empty lines are passed over; a .json file may hold lines too.

    Args:
        path: ends in one of :data:`ENDINGS`.
        key: of the configuration, for messages.
        replace: whether bytes that are no UTF-8 become U+FFFD instead of an error.

    Raises:
        InputError: naming the file and the place of what is no JSON object, no UTF-8 or no Parquet.
    """
    listed = _list(path, replace) if path.suffix == ".json" else None
    if path.suffix == ".parquet":
        unit, rows = "row", _parquet(path, key)
    elif listed is not None:
        unit, rows = "row", enumerate(listed, 1)
    else:
        unit, rows = "line", _lines(path, key, replace)
    for number, row in rows:
        place = f"{unit} {number}"
        if not isinstance(row, Mapping) or not row:
            raise InputError(f"config key {key}: {place} of {path} is no JSON object")
        yield place, row


def _list(path: Path, replace: bool) -> list | None:
    try:
        text = path.read_bytes().decode("utf-8-sig", "replace" if replace else "strict")
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _lines(path: Path, key: str, replace: bool) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:  # which ends lines at \n alone: U+2028 inside a text ends none
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8", "replace" if replace else "strict").removeprefix(BOM)
            except UnicodeDecodeError:
                raise InputError(
                    f"config key {key}: {path} is no text in line {number} (allowed: UTF-8)"
                ) from None
            if text.strip():
                yield number, _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError too for numbers of thousands of digits
        return None


def _parquet(path: Path, key: str) -> Iterator[tuple[int, Mapping]]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"config key {key}: {path} is no Parquet file, or damaged ({type(error).__name__})"
        ) from None
