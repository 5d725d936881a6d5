"""Snakemake's locks after a crash: taken away when every process that could hold one is gone."""

import json
import os
import shutil
import socket
from pathlib import Path


def _started(pid: int) -> float | None:
    """When a process started (its identity beside the number), None if there is none."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def hold(folder: Path) -> None:
    """Record in ``.snakemake`` that this process holds a lock there."""
    note = folder / "holders" / f"{socket.gethostname()}.{os.getpid()}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    note.write_text(json.dumps(holder))


def release(folder: Path) -> None:
    """Take this process' record away again."""
    note = folder / "holders" / f"{socket.gethostname()}.{os.getpid()}.json"
    note.unlink(missing_ok=True)


def remove_stale(folder: Path) -> bool:
    """Remove the locks that were left by Snakemakes that died on this host.

    Returns:
        Whether locks were removed. Where one holder lives, or is on another host, or none is
        recorded, they stay: ``snakemake --unlock`` is for a person to say.
    """
    locks, notes = folder / "locks", list((folder / "holders").glob("*.json"))
    if not notes or not locks.is_dir() or not any(locks.iterdir()):
        return False
    for note in notes:
        try:
            holder = json.loads(note.read_text())
            dead = holder["host"] == socket.gethostname() and (
                _started(holder["pid"]) != holder["started"]
            )
        except (OSError, ValueError, KeyError):
            dead = False
        if not dead:
            return False
    shutil.rmtree(locks)
    locks.mkdir()
    for note in notes:
        note.unlink(missing_ok=True)
    return True
