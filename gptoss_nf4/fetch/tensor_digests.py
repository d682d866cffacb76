"""SHA-256 of every tensor of a source. Those of files that have not changed are remembered.

A file counts as unchanged if its size, times and inode are the same. DVC decides by these, too, whether to hash a file.
"""

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.machine import cores
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json

# A file that changed less than this before it was hashed is not remembered: another change within the same tick of the file
# system's clock would not show in its times.
SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class Described:
    """What `describe` found.

    `groups`: in each, dtype, shape and SHA-256 by tensor name. `hashed_bytes` and `seconds`: what had to be hashed, and how
    long that took.
    """

    groups: list[dict[str, dict]]
    hashed_bytes: int
    seconds: float


def describe(checkpoint: Checkpoint, groups: list[list[str]], memory: Path) -> Described:
    """Describe the content of each tensor of `groups`, which are lists of names.

    Where a tensor lies in the files makes no difference. `memory` is the file of remembered digests: read, then replaced.
    """
    started, seen = time.time(), {file: _identity(file) for file in checkpoint.weight_files}
    known = _recall(memory, seen)

    def describe_group(names: list[str]) -> dict[str, dict]:
        return {
            name: {
                "dtype": checkpoint.tensors[name].dtype,
                "shape": checkpoint.tensors[name].shape,
                "sha256": known.get(name) or _sha256(checkpoint.pieces(name)),
            }
            for name in names
        }

    begun = time.monotonic()
    with ThreadPoolExecutor(cores()) as pool:  # hashlib lets go of the interpreter lock
        described = list(pool.map(describe_group, groups))
    took = time.monotonic() - begun
    digests = {name: fields["sha256"] for group in described for name, fields in group.items()}
    _remember(memory, checkpoint, digests, {file: was for file, was in seen.items() if _settled(file, was, started)})
    return Described(described, sum(checkpoint.tensors[name].bytes for name in digests if name not in known), took)


def _identity(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _settled(file: Path, was: list[int], looked_at: float) -> bool:
    return max(was[1], was[2]) / 1e9 < looked_at - SETTLED_SECONDS and _identity(file) == was


def _recall(memory: Path, seen: dict[Path, list[int]]) -> dict[str, str]:
    """Digests by tensor name, of the files that have not changed. Empty where `memory` is missing or damaged."""
    try:
        files = read_json_object(memory)
        unchanged = [
            files[file.name] for file, identity in seen.items() if files.get(file.name, {}).get("identity") == identity
        ]
        return {name: digest for entry in unchanged for name, digest in entry["sha256"].items() if len(digest) == 64}
    except (UserError, KeyError, TypeError, AttributeError):
        return {}


def _remember(memory: Path, checkpoint: Checkpoint, digests: dict[str, str], seen: dict[Path, list[int]]) -> None:
    files: dict[str, dict] = {file.name: {"identity": was, "sha256": {}} for file, was in seen.items()}
    for name, digest in digests.items():
        if checkpoint.tensors[name].file in seen:
            files[checkpoint.tensors[name].file.name]["sha256"][name] = digest
    write_json(memory, files)


def _sha256(pieces: Iterator[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.data)
    return digest.hexdigest()
