"""What Snakemake's locks lack: who holds them, so that a dead run's go and a living one's stay.

Every run leaves a note in ``.snakemake/holders`` while it lives, with what it locked. Runs begin
and end one at a time (a kernel's lock, which no crash leaves behind), because Snakemake looks and
locks in two steps, numbers lock files by what is there, and takes all of them away when any run
ends. A run that begins sets right what the next look will see.
"""

import atexit
import contextlib
import fcntl
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from headroom.checkpoints import write_json

GATE: list = []  # the open file whose lock lets one run at a time begin or end
OWN: dict = {}  # what this process' note says


def enter(folder: Path) -> None:
    """Note that this process begins a run, drop what dead runs left, restore what living ones hold.

    Args:
        folder: ``.snakemake``.
    """
    _close_gate(folder)
    notes = _others(folder)
    living = [holder for holder in notes.values() if not _dead(holder)]
    for note, holder in notes.items():
        if _dead(holder) and _drop(folder, holder, living):
            note.unlink(missing_ok=True)
    for holder in living:
        _restore(folder / "locks", holder.get("locks", {}))
        who = f"process {holder['pid']} on {holder['host']}, since {holder.get('since', '?')}"
        said = f"another run is at work here ({who}); what it makes is refused until it has ended"
        print(f"headroom: {said}", file=sys.stderr)
    OWN.update(host=socket.gethostname(), pid=os.getpid(), started=_started(os.getpid()))
    OWN.update(since=time.strftime("%F %T"), found=_times(folder))
    write_json(_own(folder), OWN)
    atexit.register(_leave, _own(folder), os.getpid())


def hold(folder: Path) -> None:
    """Note which locks Snakemake has taken for this run, and let others begin."""
    OWN["locks"] = {_kind(path): path.read_text() for path in _new(folder, OWN["found"])}
    write_json(_own(folder), OWN)
    while GATE:
        GATE.pop().close()


def alone(folder: Path) -> bool:
    """Whether no other run is at work, and none begins before this process has ended."""
    _close_gate(folder)
    return all(map(_dead, _others(folder).values()))


def forget(folder: Path) -> None:
    """Drop all notes: a person says that nobody is at work here (``snakemake --unlock``)."""
    for note in (folder / "holders").glob("*.json"):
        note.unlink(missing_ok=True)


def _started(pid: int) -> float | None:
    """When a process started (its identity beside the number), None if it runs no more."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _close_gate(folder: Path) -> None:
    """Wait until no other run begins or ends; none does until ``hold``, or this process ends."""
    if GATE:
        return
    folder.mkdir(exist_ok=True)
    gate = (folder / "gate").open("w")
    try:
        fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("headroom: waits for another run that begins or ends here", file=sys.stderr)
        fcntl.flock(gate, fcntl.LOCK_EX)
    GATE.append(gate)


def _own(folder: Path) -> Path:
    return folder / "holders" / f"{socket.gethostname()}.{os.getpid()}.json"


def _leave(note: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has inherited this exit hook
        note.unlink(missing_ok=True)


def _others(folder: Path) -> dict[Path, dict]:
    """Return the notes of other runs; of one that can't be read nothing is known but its name."""
    found = {}
    for note in sorted((folder / "holders").glob("*.json")):
        if note == _own(folder):
            continue
        host, _, pid = note.stem.rpartition(".")
        found[note] = {"host": host, "pid": pid}
        with contextlib.suppress(OSError, ValueError):
            found[note] |= json.loads(note.read_text())
    return found


def _dead(holder: dict) -> bool:
    """Whether a run surely is no more; of another host's, or one without a start, nobody knows."""
    known = holder["host"] == socket.gethostname() and "started" in holder
    return known and _started(holder["pid"]) != holder["started"]


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "locks").glob("*.lock"))


def _kind(path: Path) -> str:
    return path.name.split(".")[1]  # 0.output.lock


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in _files(folder)}


def _new(folder: Path, found: Mapping[str, int]) -> list[Path]:
    """Return the lock files that were written since others were found."""
    return [path for path in _files(folder) if path.stat().st_mtime_ns != found.get(path.name)]


def _drop(folder: Path, holder: dict, living: Sequence[dict]) -> bool:
    """Remove a dead run's locks, known by their text, and say whether that was possible.

    Where another had locked the same, ``_restore`` writes that again.
    """
    if "locks" in holder:
        stale = [p for p in _files(folder) if p.read_text() == holder["locks"].get(_kind(p))]
    elif all("locks" in other for other in living):
        # It died before it could say which. The others have said theirs: what is new is its own.
        claimed = [text for other in living for text in other["locks"].values()]
        new = _new(folder, holder.get("found", {}))
        stale = [path for path in new if path.read_text() not in claimed]
    else:
        return False
    for path in stale:
        path.unlink(missing_ok=True)
    return True


def _restore(folder: Path, locks: Mapping[str, str]) -> None:
    """Write a living run's locks again where they are gone, each under a free number."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in locks.items():
        there = {path.name: path.read_text() for path in folder.glob(f"*.{kind}.lock")}
        if text not in there.values():
            free = next(n for n in itertools.count() if f"{n}.{kind}.lock" not in there)
            (folder / f"{free}.{kind}.lock").write_text(text)
