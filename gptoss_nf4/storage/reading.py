"""Reading files that somebody else wrote: errors in one line, sizes bounded, nothing outside the directory."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptoss_nf4.errors import COPY_AGAIN, UserError

# The files beside the weights are read whole, so their size is bounded. gpt-oss's tokenizer.json has 28 MB.
MAX_SIDE_FILE_BYTES = 128 << 20
SIDE_FILE_SUFFIXES = (".json", ".jinja")
# Half of a UTF-16 pair, as JSON may write it. Alone it is no text: no file and no terminal takes it.
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is read into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "cannot read",
            where=path,
            got=error.strerror or error,
            expected="a file that can be read",
            next_step="make it readable or check the disk, then run the command again",
        ) from None


def require_plain_files(directory: Path, *below: str) -> None:
    """Refuse a directory that holds a link out of it, a device, a pipe, or a side file too large to be one. UserError.

    `below` names directories in it whose files are read too. Links to one place outside are allowed: the hub's cache links
    from models--x/snapshots/commit/ to models--x/blobs/.
    """
    root = directory.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    with reading(directory):
        for path in sorted(directory.iterdir()) + [path for name in below for path in sorted((directory / name).glob("*"))]:
            target = Path(os.path.realpath(path))  # a loop of links leads to itself; Path.resolve would raise
            if not any(target.is_relative_to(place) for place in allowed):
                raise UserError(
                    "link out of the checkpoint",
                    where=path,
                    got=f"a link to {target}",
                    expected="a file in the directory",
                    next_step="put a copy of the file there if you trust it",
                )
            if not path.exists() or path.is_dir():
                continue
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise UserError(
                    "not a file",
                    where=path,
                    got="a device, pipe or socket",
                    expected="a regular file",
                    next_step="do not use this checkpoint",
                )
            if path.suffix in SIDE_FILE_SUFFIXES and found.st_size > MAX_SIDE_FILE_BYTES:
                raise UserError(
                    "file too large",
                    where=path,
                    got=f"{found.st_size} bytes",
                    expected=f"at most {MAX_SIDE_FILE_BYTES}",
                    next_step="do not use this checkpoint",
                )


def read_bytes(path: Path) -> bytes:
    """The bytes in `path`. UserError where it cannot be read."""
    with reading(path):
        return path.read_bytes()


def read_text(path: Path) -> str:
    """The text in `path`, with line ends as Python reads them. UserError where it cannot be read or is not UTF-8."""
    try:
        return read_bytes(path).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError("not text", where=path, got=error, expected="UTF-8", next_step=COPY_AGAIN) from None


def parsed_json(text: str, **options: Any) -> Any:
    """The value of a JSON text; `options` are json.loads'. ValueError for text that is not JSON, or no text when read."""
    value = json.loads(text, **options)
    if _HALF_OF_A_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json_object(path: Path) -> dict:
    """The JSON object in `path`. UserError where the file is missing, cannot be read or holds something else."""
    if not path.exists():
        raise UserError(
            "missing file",
            where=path.parent,
            got=f"no {path.name}",
            expected="this file in the checkpoint",
            next_step=COPY_AGAIN,
        )
    text = read_text(path)
    if text.startswith("\ufeff"):  # transformers does not read it either
        raise UserError(
            "not JSON",
            where=path,
            got="a byte order mark at its start",
            expected="a JSON object",
            next_step="save it as UTF-8 without a byte order mark",
        )
    try:
        value = parsed_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError("not JSON", where=path, got=error, expected="a JSON object", next_step=COPY_AGAIN) from None
    if not isinstance(value, dict):
        raise UserError(
            "not a JSON object",
            where=path,
            got=type(value).__name__,
            expected="a JSON object",
            next_step=COPY_AGAIN,
        )
    return value
