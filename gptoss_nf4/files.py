"""Writing files: always beside the target, then renamed.

A stage must never write into an existing file: DVC links outputs to its cache, and writing in place through such a
link changes the cached copy without a word. A rename replaces the link and leaves the cache alone.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 1 << 22


def write_file(target: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path)`, flush it to disk and rename it to `target`; on any error leave `target` as it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes files private to the user
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, data: bytes) -> None:
    write_file(target, lambda path: path.write_bytes(data))


def write_text(target: Path, text: str) -> None:
    write_bytes(target, text.encode())


def write_json(target: Path, value: object) -> None:
    """Write `value` as indented JSON; keys keep the order in which they were built."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path: Path) -> dict:
    """Name, size and digest of a file, as manifests and reports record it."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
