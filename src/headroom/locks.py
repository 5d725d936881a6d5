"""What Snakemake's locks lack: who holds them, so that a dead run's go and a living one's stay.

Every run leaves a note in ``.snakemake/holders`` with what it locked, and holds a lock of the
kernel's beside it, which no crash leaves behind. Runs begin and end one at a time, because
Snakemake looks and locks in two steps, numbers lock files by what is there, and takes all of them
away when any run ends. A run that begins sets right what the next look will see.
"""

import atexit
import contextlib
import fcntl
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from headroom.checkpoints import write_json

GATE: list = []  # the open file whose lock lets one run at a time begin or end
OWN: dict = {}  # what this process' note says
NOTE: list[Path] = []  # where it is
LIFE: list = []  # the open file whose lock says that this process lives
LOOKS = (  # what starts no job
    r"-[a-zA-Z]*n[a-zA-Z]*|--dry-?run|--(d3)?dag|--(rule|file)graph|-[SDl]|--(detailed-)?summary"
    r"|--list.*|--lt|--lint|--report|--containerize|--cleanup-metadata|--generate-unit-tests"
)


def looks(arguments: Sequence[str]) -> bool:
    """Whether a command line of Snakemake's asks for something and runs nothing."""
    return any(re.fullmatch(LOOKS, argument) for argument in arguments)


def flock(file, how: int) -> None:
    """Lock an open file; where the file system has no locks nothing is locked.

    Raises:
        BlockingIOError: where another holds it and ``how`` says not to wait.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        said = f"headroom: no file locks here ({error}); don't start two runs at once"
        print(said, file=sys.stderr, flush=True)


def enter(folder: Path) -> None:
    """Note that this process begins a run, drop what dead runs left, restore what living ones hold.

    Args:
        folder: ``.snakemake``.
    """
    _close_gate(folder)
    notes = _others(folder)
    dead = {note for note in notes if _dead(note, notes[note])}
    living = [holder for note, holder in notes.items() if note not in dead]
    for note in dead:
        if _drop(folder, notes[note], living):
            _remove(note)
    for holder in living:
        _restore(folder / "locks", holder.get("locks", {}))
        who = f"process {holder['pid']} on {holder['host']}, since {holder.get('since', '?')}"
        said = f"another run is at work here ({who}); what it makes is refused until it has ended"
        print(f"headroom: {said}", file=sys.stderr)
    host, pid = socket.gethostname(), os.getpid()
    NOTE.append(folder / "holders" / f"{host}.{pid}.{time.time_ns()}.json")
    NOTE[0].parent.mkdir(exist_ok=True)
    LIFE.append(_life(NOTE[0]).open("w"))
    flock(LIFE[0], fcntl.LOCK_EX)
    OWN.update(host=host, pid=pid, since=time.strftime("%F %T"), found=_times(folder))
    write_json(NOTE[0], OWN)
    atexit.register(_leave, pid)
    threading.Thread(target=_watch, args=[folder], daemon=True).start()


def _watch(folder: Path) -> None:
    """Let others begin when Snakemake has taken its locks, also where no hook says so."""
    while GATE:
        time.sleep(1)
        if _new(folder, OWN["found"]):
            time.sleep(1)  # it writes two
            hold(folder)


def hold(folder: Path) -> None:
    """Note which locks Snakemake has taken for this run, and let others begin."""
    if GATE:
        OWN["locks"] = {_kind(path): path.read_text() for path in _new(folder, OWN["found"])}
        write_json(NOTE[0], OWN)
        with contextlib.suppress(IndexError):
            GATE.pop().close()


def alone(folder: Path) -> bool:
    """Whether no other run is at work, and none begins before this process has ended."""
    closed = _close_gate(folder, wait=False)
    return closed and all(_dead(note, holder) for note, holder in _others(folder).items())


def forget(folder: Path) -> None:
    """Drop all notes: a person says that nobody is at work here (``snakemake --unlock``)."""
    for note in (folder / "holders").glob("*.json"):
        _remove(note)


def _close_gate(folder: Path, wait: bool = True) -> bool:
    """Let no other run begin or end until ``hold``, or until this process ends.

    Returns:
        Whether that is so; False only without ``wait``, where another run begins or ends.
    """
    if GATE:
        return True
    folder.mkdir(exist_ok=True)
    gate = (folder / "gate").open("w")
    try:
        flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        print("headroom: waits for another run that begins or ends here", file=sys.stderr)
        flock(gate, fcntl.LOCK_EX)
    GATE.append(gate)
    return True


def _life(note: Path) -> Path:
    return note.with_suffix(".life")


def _remove(note: Path) -> None:
    note.unlink(missing_ok=True)
    _life(note).unlink(missing_ok=True)


def _leave(pid: int) -> None:
    if os.getpid() == pid:  # a forked child has inherited this exit hook
        _remove(NOTE[0])


def _others(folder: Path) -> dict[Path, dict]:
    """Return the notes of other runs; of one that can't be read nothing is known but its name."""
    found = {}
    for note in sorted((folder / "holders").glob("*.json")):
        if note in NOTE:
            continue
        host, pid, _ = (*note.stem.rsplit(".", 2), "", "")[:3]
        found[note] = {"host": host, "pid": pid}
        with contextlib.suppress(OSError, ValueError):
            found[note] |= json.loads(note.read_text())
    return found


def _dead(note: Path, holder: dict) -> bool:
    """Whether a run surely is no more; of another host's nobody knows."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        with _life(note).open("r+") as life:
            fcntl.flock(life, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:  # it is held, or can't be
        return False
    return True


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
