"""Mending `.dvc/tmp/rwlock`, in which DVC notes what its running processes read and write.

DVC 3.67 (`dvc/rwlock.py`) truncates that file and writes it again, under a lock of its own. A kill in between leaves it
empty or cut off, and every later command of DVC's ends with "Unable to read RWLock-file". And to DVC a zombie, which ended
and was not waited for yet, is a process at work: it says "is busy", and in a container whose first process waits for nobody
that stays so. Nothing in the file outlives the processes that it names. So without any, it may go.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

DIRECTORY = Path(".dvc/tmp")
RWLOCK, GUARDS = "rwlock", ("lock", "rwlock.lock")  # DVC holds the first while it works, the second while it writes RWLOCK
SCRIPTS = ("dvc", "quiet_dvc.py")  # how a process of DVC's is called: `dvc`, `python -m dvc`, and ours


def mend() -> bool:
    """Delete RWLOCK of the project in the working directory where it keeps DVC from working, though no DVC works there.

    Returns whether it did.
    """
    if not _is_in_the_way():
        return False
    with contextlib.ExitStack() as held:
        for name in GUARDS:
            if not held.enter_context(_locked(DIRECTORY / name)):
                return False
        # While a stage's command runs, DVC holds neither lock.
        if not _is_in_the_way() or _dvc_works_here():
            return False
        (DIRECTORY / RWLOCK).unlink(missing_ok=True)
    return True


def _is_in_the_way() -> bool:
    """Whether DVC cannot read the file, or would wait for zombies. What names no process, or one at work, stays."""
    try:
        processes = _named()
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return True
    states = {_state(process) for process in processes}
    return psutil.STATUS_ZOMBIE in states and not states - {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


def _named() -> set[int]:
    """The processes in the file, none where there is no file. Another error than OSError's where DVC cannot read it."""
    try:
        found = json.loads((DIRECTORY / RWLOCK).read_text("utf-8"))
    except OSError:  # it is not there, or DVC says why it cannot be read
        return set()
    readers, writers = found.get("read", {}), found.get("write", {})
    infos = [*writers.values(), *(info for each in readers.values() for info in each)]
    readable = all(isinstance(info["cmd"], str) and type(info["pid"]) is int for info in infos)
    if found.keys() - {"read", "write"} or not readable:
        raise ValueError
    return {info["pid"] for info in infos}


def _state(process: int) -> str:
    """psutil's word for the state of `process`, STATUS_DEAD where there is none."""
    try:
        return str(psutil.Process(process).status())
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return str(psutil.STATUS_DEAD)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock in `path` as DVC does (zc.lockfile: flock without waiting). False where another has it."""
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
    except OSError:
        yield False


def _dvc_works_here() -> bool:
    """Whether a process of DVC's runs below this directory, or, for another user's process, might."""
    here = os.path.realpath(".")
    for process in psutil.process_iter(["pid", "cmdline"]):
        names = [os.path.basename(word) for word in (process.info["cmdline"] or [])[:4]]
        if process.pid == os.getpid() or not any(name in SCRIPTS for name in names):
            continue
        try:
            place = process.cwd()
        except psutil.AccessDenied:
            return True
        except psutil.NoSuchProcess:
            continue
        if os.path.commonpath([here, os.path.realpath(place)]) == here:
            return True
    return False
