"""Writing files: always beside the target, then renamed.

A stage must never write into an existing file. DVC links outputs to its cache, so writing through such a link would change
the cached copy without a word. A rename replaces the link and leaves the cache alone.
"""

import errno
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
    """Open a new file beside `target`. At the end it is flushed to disk, renamed to `target`, and its name flushed.

    On any error `target` stays as it was; an OSError becomes a UserError. A process that is killed leaves its temporary
    file, and the next one that writes the same target removes it.
    """
    try:
        made = _make_directories(target.parent)
        _remove_abandoned(target)
        # Each process and thread has its own name, so two runs at once never write into one file.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
        with _open_locked(temporary) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)
                for directory in (target.parent, *made):  # a power cut must not take the name from what was written
                    _sync_directory(directory)
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


def _make_directories(directory: Path) -> list[Path]:
    """Make `directory`, and those above it that are missing. Returns the directories that have a new one in them."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return [path.parent for path in missing]


def _open_locked(path: Path) -> BinaryIO:
    """Open a new file at `path` under a lock that is held until it is closed or the process is gone.

    Before the lock is there, another writer of the same target may take the file for abandoned and remove it. Then what was
    opened has no name any more, and is opened again.
    """
    while True:
        file = path.open("w+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _sync_directory(directory: Path) -> None:
    """Flush the names in `directory` to disk, where its file system can do that for a directory."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def _remove_abandoned(target: Path) -> None:
    """Delete the temporary files of `target` that nobody holds a lock on: their writers are gone."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):
            continue


def write_bytes(target: Path, data: bytes) -> None:
    """Write `data` by `replacing`."""
    with replacing(target) as file:
        file.write(data)


def write_text(target: Path, text: str) -> None:
    """Write `text` in UTF-8 by `replacing`."""
    write_bytes(target, text.encode())


def write_json(target: Path, value: object) -> None:
    """Write `value` as indented JSON by `replacing`. Keys keep their order."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file, in hex. The file is read in pieces, and `advance` told the bytes of each."""
    return _digest_of(path, hashlib.sha256(), advance)


def git_blob_sha1(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """git's blob id of a file, in hex, as `sha256_of`. The hub reports it for files outside LFS."""
    return _digest_of(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False), advance)


def _digest_of(path: Path, digest: "hashlib._Hash", advance: Callable[[int], None]) -> str:
    with reading(path), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def describe_file(path: Path) -> dict:
    """Name, size and digest of a file, as manifests and reports record it."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
