"""What every job does before and after its work: log, errors, staging, state, provenance.

Scripts call this with plain values, so that nothing here knows Snakemake.
"""

import atexit
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from headroom import attempts, sums
from headroom.checkpoints import digest_file, write_json
from headroom.errors import InputError, redacted
from headroom.locks import flock

STATE = Path("results/.state")
FINISHED = "finished"  # in a state whose job ended well
REPEATABLE = ("InputError", "DivergedError")  # errors that the same input brings again
PARENT = "HEADROOM_PARENT"  # environment variable: process number of the Snakemake, its namespace
STARTED = time.monotonic()
HELD: list = []  # until the process ends: where errors went at first, the lock of its job
FAILED: list[BaseException] = []  # what ended it


def start(job) -> int:
    """Begin a job: log, lock, errors in one line, inputs and outputs checked, end with the parent.

    A failure that would repeat (bad input, NaN loss) is remembered under the fingerprint of code
    and settings; later attempts of the same job say it at once instead of failing again slowly.

    Args:
        job: what Snakemake hands a script: ``log``, where file descriptors 1 and 2 both go, C
            code's output too; ``input``, which is compared with what was recorded when it was
            written, and ``output``, which is recorded when the job ends well; ``params.code`` and
            ``params.settings``, what it computes with; ``resources.failures``, how many attempts
            failed before this one. ``settings["compute"]["threads"]`` fixes the number of threads,
            which is part of the last bits of what is computed.

    Returns:
        How often the job is to halve its micro-batch before it starts: once for each attempt that
        died for want of memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends C code too, without a traceback
    log, settings = str(job.log[0]), job.params.settings
    own = fingerprint(log, job.params.code, settings)
    memo, note = STATE / "failures" / f"{own}.json", STATE / "attempts" / f"{own}.json"
    sys.excepthook = lambda kind, error, trace: _report(memo, note, error, trace)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    # Appending, so that a twin that still writes there and this job don't overwrite each other.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    HELD.append(os.dup(2))
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    die_with_parent()
    _wait_for_twin(STATE / "running" / fingerprint(log))
    os.ftruncate(file, 0)
    failures = job.resources.failures
    if failures and memo.is_file():
        sys.exit(json.loads(memo.read_text())["message"] + " (the same as before: not tried again)")
    memo.unlink(missing_ok=True)
    halvings = attempts.begin(note, failures)
    _guard(list(job.input), list(job.output))
    threads = settings.get("compute", {}).get("threads", 1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers asks it too
    return halvings


def _wait_for_twin(path: Path) -> None:
    """Hold this job's lock until the process ends; before, wait for another process that does.

    A killed Snakemake leaves its cluster jobs alive, and the next run submits them again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        lock = path.open("a+")
        try:
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                lock.seek(0)
                who = f"{lock.read().strip()}; if that is no more, delete {path}"
                _print(f"headroom: waits for the same job of an earlier run ({who})")
            told = True
            time.sleep(1)
            continue
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            break  # else it was taken away as unused in between
    lock.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
    HELD.append(lock)


def _guard(inputs: list[str], outputs: list[str]) -> None:
    """Refuse damaged inputs now, and record the outputs when the process ends well."""
    sums.check(inputs)
    sums.forget(outputs)
    for output in outputs:
        _remove_abandoned(Path(output))
    atexit.register(_record, outputs)


def _record(outputs: list[str]) -> None:
    """Record the outputs unless the job failed; what an exit hook raises would go unnoticed."""
    if FAILED:
        return
    try:
        sums.record(outputs)
    except BaseException as error:
        _print(_said(error))
        os._exit(1)


def _said(error: BaseException) -> str:
    if isinstance(error, InputError):
        return f"headroom: {error}"
    if _full(error):
        where = getattr(error, "filename", None) or Path.cwd() / STATE.parent
        return f"headroom: the disk of {where} is full: make room and run again"
    return redacted(f"headroom: {type(error).__name__}: {error}")


def _full(error: BaseException) -> bool:
    """Whether a disk or a quota is full; libraries that write by themselves only say so."""
    full = (errno.ENOSPC, errno.EDQUOT)
    words = [os.strerror(number) for number in full]
    return getattr(error, "errno", None) in full or any(word in str(error) for word in words)


def _print(text: str) -> None:
    """Print to the log, or where it can't take any more, to where errors went before."""
    text = redacted(text)
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.write(HELD[0] if HELD else 2, f"{text}\n".encode())


def _report(memo: Path, note: Path, error: BaseException, trace) -> None:
    """Print bad input as one line, anything else with its traceback and one line."""
    FAILED.append(error)
    repeats = any(base.__name__ in REPEATABLE for base in type(error).__mro__)
    if not repeats and not _full(error):
        _print("".join(traceback.format_exception(type(error), error, trace)))
    _print(_said(error))
    with contextlib.suppress(OSError):  # of a full disk, or the attempt hadn't begun
        if repeats:
            write_json(memo, {"message": _said(error)})
        attempts.failed(note, error)


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends (Linux; elsewhere nothing).

    A killed Snakemake would otherwise leave jobs alive that the next run starts a second time.
    """
    if sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    # It may have died before this call. Numbers of another container's processes say nothing here.
    number, _, namespace = os.environ.get(PARENT, "").partition(" ")
    if namespace == os.readlink("/proc/self/ns/pid") and not _runs(int(number)):
        os.kill(os.getpid(), signal.SIGTERM)


def name_parent() -> None:
    """Tell the jobs that this process will start who their parent is (Linux)."""
    if sys.platform == "linux":
        os.environ[PARENT] = f"{os.getpid()} {os.readlink('/proc/self/ns/pid')}"


def _runs(pid: int) -> bool:
    """Whether a process is there and not only waits to be buried (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def fingerprint(*parts: object) -> str:
    """Return a digest of plain values: what a state or a remembered failure belongs to."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@contextlib.contextmanager
def staged(output: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside ``output`` that takes its place when the block succeeds.

    Nothing half-written ever has the name of a result.
    """
    output = Path(output)
    _remove_abandoned(output)
    staging = output.with_name(f".{output.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        shutil.rmtree(output, ignore_errors=True)  # replace refuses a folder that holds files
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(output: Path) -> None:
    """Remove what killed processes left beside an output: staging folders, files half written.

    A living process of this host keeps its own. Numbers of other hosts' processes say nothing
    here, but Snakemake starts one job an output: nobody else works on this one.
    """
    for path in output.parent.glob(".*"):
        found = re.fullmatch(rf"\.{re.escape(output.name)}\.(\d+)", path.name)
        if not found or _alive(int(found[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True


@contextlib.contextmanager
def training_state(code: str, settings: object, inputs: list[str]) -> Iterator[Path]:
    """Yield the folder where a training keeps its state, locked against a twin of this job.

    It lies outside the declared outputs, which Snakemake removes when a job fails, under a
    fingerprint of code, settings and the inputs' bytes: a state found by name alone could belong
    to another experiment. The workflow removes all states when it ends well.
    """
    hashes = [digest_file(file) for name in inputs for file in _files(Path(name))]
    folder = STATE / "training" / fingerprint(code, settings, hashes)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        flock(lock, fcntl.LOCK_EX)
        yield folder
        (folder / FINISHED).touch()


@contextlib.contextmanager
def shared_state(code: str, keep: bool) -> Iterator[Path]:
    """Yield a folder that several jobs of the same code fill together.

    The workflow removes it when it ends well, unless it is to be kept: then it lies among the
    results. What lies in it must be told apart by its users.
    """
    folder = (STATE.parent if keep else STATE) / "features" / fingerprint(code)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        flock(lock, fcntl.LOCK_SH)
        yield folder
        (folder / FINISHED).touch()


def remove_states() -> None:
    """Remove what finished jobs leave: states, locks, remembered failures.

    What was interrupted stays: another run goes on with it. Only for a run that is alone here: a
    job that waits between two attempts holds no lock.
    """
    for mark in STATE.glob(f"*/*/{FINISHED}"):
        with (mark.parent / "lock").open("a+") as lock, contextlib.suppress(BlockingIOError):
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(mark.parent, ignore_errors=True)
        if mark.parent.is_dir() and not mark.exists():  # of an open file NFS keeps a name
            shutil.rmtree(mark.parent, ignore_errors=True)
    for path in (STATE / "running").glob("*"):
        with path.open("a") as lock, contextlib.suppress(BlockingIOError):
            flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    for name in ("failures", "attempts"):
        shutil.rmtree(STATE / name, ignore_errors=True)


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def write_provenance(
    path: str | os.PathLike, code: str, settings: object, notes: Mapping | None = None
) -> None:
    """Write beside a result how it came to be: settings, code, versions, commit, machine, time.

    Kept out of the result itself, so that equal work gives equal bytes.

    Args:
        path: the file.
        code, settings: what the job computed with.
        notes: what the job found out beside its result.
    """
    names = ("torch", "transformers", "tokenizers", "datasets", "numpy", "POT", "snakemake")
    write_json(
        Path(path),
        {
            **(notes or {}),
            "settings": settings,
            "code": code,
            "commit": _commit(),
            "versions": {name: _version(name) for name in names},
            "python": platform.python_version(),
            "machine": {"host": platform.node(), "system": platform.platform()},
            "seconds": round(time.monotonic() - STARTED, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The clone's commit, with ``+`` where files differ from it."""
    try:
        here = Path(__file__).parent
        run = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        return commit + (
            "+" if subprocess.run(["git", "status", "-s", "-uno"], **run).stdout else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
