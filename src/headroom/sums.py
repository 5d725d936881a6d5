"""Sizes and hashes of what jobs wrote, so that damage is named before it is computed with.

Files have a record each, folders without a manifest one for all that they hold; folders with a
manifest carry their own. Records mirror ``results/`` in ``results/.sums/``.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from headroom.checkpoints import MANIFEST, check_manifest, digest_file, write_json
from headroom.errors import InputError

RESULTS = Path("results")
SUMS = ".sums"


def record(outputs: Iterable[str], results: Path = RESULTS) -> None:
    """Record what a job wrote.

    Args:
        outputs: files and folders; those outside of the results are left out.
        results: the folder of all results.
    """
    for path, note in _noted(outputs, results):
        if path.is_dir() and not (path / MANIFEST).is_file():
            write_json(note, {"files": {name: _entry(path / name) for name in _names(path)}})
        elif path.is_file():
            write_json(note, _entry(path))


def forget(outputs: Iterable[str], results: Path = RESULTS) -> None:
    """Drop what is recorded of outputs that are about to be made anew."""
    for _, note in _noted(outputs, results):
        note.unlink(missing_ok=True)


def check(inputs: Iterable[str], results: Path = RESULTS, hashes: bool = False) -> None:
    """Compare files and folders with what was recorded when they were written.

    Sizes alone cost nothing, and find what a crash or a full disk does; what has no record, because
    somebody put it there, passes.

    Args:
        inputs: files and folders; those outside of the results are left out.
        results: the folder of all results.
        hashes: whether contents are compared too.

    Raises:
        InputError: naming the first damaged file and how to go on.
    """
    for path, note in _noted(inputs, results):
        if (path / MANIFEST).is_file():
            check_manifest(path, hashes)
        elif note.is_file():
            _compare(path, note, hashes)


def damaged(results: Path) -> list[str]:
    """Return a line for each file under a folder of results that isn't as it was written."""
    notes = sorted(p for p in (results / SUMS).rglob("*") if p.is_file())
    recorded = [results / note.relative_to(results / SUMS) for note in notes]
    manifests = [path.relative_to(results) for path in sorted(results.rglob(MANIFEST))]
    # What jobs are still at work on lies in hidden folders.
    folders = [results / path.parent for path in manifests if not str(path).startswith(".")]
    found = []
    for path in [*filter(Path.exists, recorded), *folders]:
        try:
            check([str(path)], results, hashes=True)
        except InputError as error:
            found.append(str(error))
    return sorted(set(found))


def _noted(paths: Iterable[str], results: Path) -> Iterator[tuple[Path, Path]]:
    for path in map(Path, paths):
        if path.is_relative_to(results):
            yield path, results / SUMS / path.relative_to(results)


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": digest_file(path)}


def _size(path: Path) -> int | None:
    """Bytes of a file; of an open one, since network file systems remember old sizes."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def _compare(path: Path, note: Path, hashes: bool) -> None:
    try:
        entry = json.loads(note.read_text())
    except ValueError:
        raise InputError(f"{note} is damaged: delete it and run `make verify` again") from None
    for name, part in entry.get("files", {"": entry}).items():
        file = path / name
        size = _size(file)
        if size != part["bytes"]:
            said = "it is missing" if size is None else f"{size} bytes"
            what = f"{said}, {part['bytes']} were written"
        elif hashes and digest_file(file) != part["sha256"]:
            what = f"{size} bytes as were written, but others"
        else:
            continue
        raise InputError(
            f"{file} is damaged: {what}; delete {path} and run again, it is made anew (if it was "
            f"replaced on purpose, delete {note} instead)"
        )
