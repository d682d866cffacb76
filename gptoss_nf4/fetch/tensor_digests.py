"""SHA-256 of every tensor of a source. Those of files that have not changed are remembered.

A file counts as unchanged if its size, times and inode are the same. DVC decides by these, too, whether to hash a file.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.machine import cores
from gptoss_nf4.storage.progress import Progress
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json

# A file that changed less than this before it was hashed is not remembered: another change within the same tick of the file
# system's clock would not show in its times.
SETTLED_SECONDS = 2.0


SAMPLE_BYTES = 1 << 26  # for each core; a fraction of a second of hashing


def bytes_to_hash(checkpoint: Checkpoint, memory: Path) -> int:
    """Bytes of the tensors whose digests `memory` does not have."""
    known = _recall(memory, {file: _identity(file) for file in checkpoint.weight_files})
    return sum(info.bytes for name, info in checkpoint.tensors.items() if name not in known)


def hashing_speed(checkpoint: Checkpoint) -> float:
    """Bytes that all cores together read and hash in a second: measured on a sample of the checkpoint."""
    sample: list[list[str]] = [[] for _ in range(cores())]
    sizes = [0] * len(sample)
    for name, info in checkpoint.tensors.items():
        least = sizes.index(min(sizes))
        if sizes[least] < SAMPLE_BYTES:
            sample[least].append(name)
            sizes[least] += info.bytes
    started = time.monotonic()
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(lambda names: [_sha256(checkpoint.pieces(name)) for name in names], sample))
    return sum(sizes) / (time.monotonic() - started)


def describe(checkpoint: Checkpoint, groups: list[list[str]], memory: Path) -> list[dict[str, dict]]:
    """The content of each tensor of `groups`, which are lists of names: in each group dtype, shape and SHA-256 by name.

    Where a tensor lies in the files makes no difference. `memory` is the file of remembered digests: read, then replaced.
    """
    started, seen = time.time(), {file: _identity(file) for file in checkpoint.weight_files}
    known = _recall(memory, seen)
    size = sum(checkpoint.tensors[name].bytes for group in groups for name in group if name not in known)

    def describe_group(names: list[str]) -> dict[str, dict]:
        return {
            name: {
                "dtype": checkpoint.tensors[name].dtype,
                "shape": checkpoint.tensors[name].shape,
                "sha256": known.get(name) or _sha256(checkpoint.pieces(name), progress.advance),
            }
            for name in names
        }

    # hashlib lets go of the interpreter lock.
    with Progress(size, "hashing the source") as progress, ThreadPoolExecutor(cores()) as pool:
        described = list(pool.map(describe_group, groups))
    digests = {name: fields["sha256"] for group in described for name, fields in group.items()}
    _remember(memory, checkpoint, digests, {file: was for file, was in seen.items() if _settled(file, was, started)})
    return described


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


def _sha256(pieces: Iterator[np.ndarray], advance: Callable[[int], None] = lambda count: None) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.data)
        advance(piece.nbytes)
    return digest.hexdigest()
