"""Writing files: always beside the target, then renamed.

A stage must never write into an existing file. DVC links outputs to its cache, so writing through such a link would change
the cached copy without a word. A rename replaces the link and leaves the cache alone.
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
    """Open a new file beside `target`. At the end it is flushed to disk and renamed to `target`.

    On any error `target` stays as it was; an OSError becomes a UserError. A process that is killed leaves its temporary
    file, and the next one that writes the same target removes it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        # Each process and thread has its own name, so two runs at once never write into one file.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.part")
        with temporary.open("w+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # held until the file is closed or the process is gone
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
    """`replacing` for a library that wants a path: `write` gets the temporary one and fills it."""
    with replacing(target) as file:
        write(Path(file.name))


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
