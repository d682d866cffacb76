"""Writing files: always beside the target, then renamed.

A stage must never write into an existing file: DVC links outputs to its cache, and writing in place through such a
link changes the cached copy without a word. A rename replaces the link and leaves the cache alone.
"""

import fcntl
import glob
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.reading import reading

CHUNK_BYTES = 1 << 22


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file beside `target`, open for writing; at the end it is flushed to disk and renamed to `target`.

    On any error `target` stays as it was. A process that is killed leaves its temporary file; the next that writes the
    same target removes it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        # A name of its own for each process and thread, so that two runs at once never write into one file.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
        with temporary.open("w+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # held until closed, or until the process is gone
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            "cannot write",
            where=target,
            got=error.strerror or str(error),
            expected="to write a new file there",
            next_step="make room or give permission there, then run the command again",
        ) from None


def write_file(target: Path, write: Callable[[Path], None]) -> None:
    """`replacing` for a library that wants a path: `write(temporary path)` fills it."""
    with replacing(target) as file:
        write(Path(file.name))


def _remove_abandoned(target: Path) -> None:
    """Delete temporary files of `target` whose writer is gone: nobody holds their lock."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):
            continue


def write_bytes(target: Path, data: bytes) -> None:
    with replacing(target) as file:
        file.write(data)


def write_text(target: Path, text: str) -> None:
    write_bytes(target, text.encode())


def write_json(target: Path, value: object) -> None:
    """Write `value` as indented JSON; keys keep the order in which they were built."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict:
    """Name, size and digest of a file, as manifests and reports record it."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
