"""Digests of a checkpoint's files in the format of `sha256sum`: written by stage prove, checked on request.

The model card has none: it is text for people, and who publishes a model edits it, in a browser even.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.artifacts import CARD
from gptoss_nf4.storage.machine import cores
from gptoss_nf4.storage.progress import Progress
from gptoss_nf4.storage.reading import read_text
from gptoss_nf4.storage.writing import sha256_of, write_text

LINE = re.compile(r"([0-9a-f]{64})  ([^/\0]+)")


def write_digests(checkpoint: Path, target: Path) -> None:
    """Write the SHA-256 of each file of `checkpoint` to `target`. `sha256sum -c` there checks them too."""
    write_text(target, "".join(f"{digest}  {name}\n" for name, digest in _digests(checkpoint, but=(CARD,)).items()))


def _digests(checkpoint: Path, but: tuple[str, ...]) -> dict[str, str]:
    # A name that starts with a dot is none of ours: DVC puts .gitignore files beside its outputs.
    files = sorted(path for path in checkpoint.iterdir() if path.is_file() and not path.name.startswith("."))
    files = [path for path in files if path.name not in but]
    size = sum(path.stat().st_size for path in files)
    # hashlib lets go of the interpreter lock.
    with Progress(size, "hashing") as progress, ThreadPoolExecutor(cores()) as pool:
        digests = pool.map(lambda path: sha256_of(path, progress.advance), files)
        return dict(zip((path.name for path in files), digests, strict=True))


def verify(checkpoint: Path, recorded: Path, next_step: str) -> int:
    """Check every file of `checkpoint` against the list `recorded`, and return how many there are.

    UserError for the first file that differs, is missing or is not in the list. It ends with `next_step`. A model card is
    checked only where the list names it.
    """

    def differs(name: str, got: str, expected: str) -> UserError:
        return UserError(
            "checkpoint changed",
            where=checkpoint / name,
            got=got,
            expected=expected,
            next_step=next_step,
        )

    expected = read_digests(recorded)
    found = _digests(checkpoint, but=() if CARD in expected else (CARD,))
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise differs(
                name,
                f"SHA-256 {found[name]}" if name in found else "no such file",
                f"SHA-256 {expected[name]}" if name in expected else "no such file",
            )
    return len(found)


def read_digests(recorded: Path) -> dict[str, str]:
    """The list `recorded`: SHA-256 in hex by file name. UserError where it is missing or in another form."""
    if not recorded.is_file():
        raise UserError(
            "missing digest list",
            where=recorded,
            got="no such file",
            expected="a list as `sha256sum` writes it",
            next_step="check the path, or make the list with `sha256sum * > FILE` in the checkpoint",
        )
    lines = [LINE.fullmatch(line) for line in read_text(recorded).splitlines()]
    if not lines or None in lines:
        raise UserError(
            "damaged digest list",
            where=recorded,
            got=f"line {lines.index(None) + 1} in another form" if lines else "an empty file",
            expected="lines as `sha256sum` writes them",
            next_step="make it again with `sha256sum * > FILE`",
        )
    return {match[2]: match[1] for match in lines if match}
