"""Mending `.dvc/tmp/rwlock`, in which DVC notes what its running processes read and write.

DVC 3.67 (`dvc/rwlock.py`) truncates that file and writes it again, under a lock of its own. A kill in between leaves it
empty or cut off, and every later command of DVC's ends with "Unable to read RWLock-file". Nothing in it outlives the
processes that it names. So without any, it may go.
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
    """Delete a broken RWLOCK of the project in the working directory, unless a DVC works in it. Returns whether it did."""
    if not _is_broken():
        return False
    with contextlib.ExitStack() as held:
        for name in GUARDS:
            if not held.enter_context(_locked(DIRECTORY / name)):
                return False
        # While a stage's command runs, DVC holds neither lock.
        if not _is_broken() or _dvc_works_here():
            return False
        (DIRECTORY / RWLOCK).unlink(missing_ok=True)
    return True


def _is_broken() -> bool:
    """Whether DVC cannot read the file. No file is fine: DVC writes one."""
    try:
        found = json.loads((DIRECTORY / RWLOCK).read_text("utf-8"))
        readers, writers = found.get("read", {}), found.get("write", {})
        infos = [*writers.values(), *(info for each in readers.values() for info in each)]
        if found.keys() - {"read", "write"}:
            return True
        return not all(type(info["pid"]) is int and isinstance(info["cmd"], str) for info in infos)
    except OSError:  # it is not there, or DVC says why it cannot be read
        return False
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return True


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
